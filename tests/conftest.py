"""What all tests begin with: Ctrl-C arrives, even where a shell has started them in the background
and so with SIGINT ignored, which the processes that they start would inherit.
"""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
