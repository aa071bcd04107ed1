"""What all tests begin with.

Ctrl-C arrives, even where a shell has started them in the background and so with SIGINT ignored,
which the processes that they start would inherit. And what importing them has made is out of the
garbage collector's sight: many tests collect to see that nothing is left, and it would look at half
a million objects of torch and the hosts each time.
"""

from __future__ import annotations

import gc
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
