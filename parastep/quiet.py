"""Silences the followers: what a pipeline's code logs and warns of comes from the leader, once.

They run the same code as the leader, a little later, in threads that are known by their name.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_LOGGERS = (None, "diffusers", "transformers")
_lock = threading.Lock()
_calls = 0  # calls of parallel pipelines in progress, in whatever thread
_show: Any = None  # what warnings are shown with outside of them


def thread_name(rank: int) -> str:
    """The name of a follower's thread."""
    return f"parastep-{rank}"


def _is_follower(thread: str | None) -> bool:
    return (thread or "").startswith("parastep-")


class _NotFollowers(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _is_follower(record.threadName)


def _show_warning(*args: Any, **kwargs: Any) -> None:
    if not _is_follower(threading.current_thread().name):
        _show(*args, **kwargs)


@contextlib.contextmanager
def quiet_followers() -> Iterator[None]:
    """Within, neither log handlers nor warnings let anything of the followers through."""
    global _calls, _show
    handlers = [h for name in _LOGGERS for h in logging.getLogger(name).handlers]
    quiet = _NotFollowers()
    with _lock:
        _calls += 1
        if _calls == 1:
            _show, warnings.showwarning = warnings.showwarning, _show_warning
    for handler in handlers:
        handler.addFilter(quiet)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(quiet)
        with _lock:
            _calls -= 1
            if _calls == 0 and warnings.showwarning is _show_warning:
                warnings.showwarning = _show
