"""What is in a parallel call: a module, or a scheduler, serves one such call at a time.

Two pipelines may hold the same modules, in two threads or one within the other's callback. The
second call runs as if untouched: its replicas would be copied from modules with the first one's
hooks on them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch

from .parts import denoisers_of, is_scheduler

_lock = threading.Lock()
_claimed: dict[int, Any] = {}  # the objects, by id, of all calls in progress


@contextlib.contextmanager
def claimed(pipe: Any) -> Iterator[str | None]:
    """Within, what the pipe consists of is this call's; or gives the reason why it is not."""
    parts = _parts_of(pipe)
    own = {id(obj): obj for objects in parts.values() for obj in objects}
    with _lock:
        taken = [name for name, objects in parts.items() if any(id(o) in _claimed for o in objects)]
        if not taken:
            _claimed.update(own)
    try:
        yield _words(pipe, taken) if taken else None
    finally:
        if not taken:
            with _lock:
                for key in own:
                    _claimed.pop(key, None)


def _parts_of(pipe: Any) -> dict[str, list[Any]]:
    """Modules with all that they are made of, of which another pipeline may hold a part alone."""
    parts: dict[str, list[Any]] = {}
    for name, value in vars(pipe).items():
        if isinstance(value, torch.nn.Module):
            parts[name] = list(value.modules())
        elif is_scheduler(value):
            parts[name] = [value]
    return parts


def _words(pipe: Any, taken: list[str]) -> str:
    """The denoisers tell it best; a scheduler of two calls is wrong with and without us."""
    own = vars(pipe)
    denoisers = [name for name in taken if name in denoisers_of(pipe)]
    schedulers = [name for name in taken if is_scheduler(own[name])]
    named = [*(denoisers or taken[:1]), *schedulers]
    named = list(dict.fromkeys(named))
    verb = "is" if len(named) == 1 else "are"
    words = f"{' and '.join(named)} {verb} in use by another call"
    if schedulers:
        words += "; each pipeline needs a scheduler of its own, in parallel or not"
    return words


def _begin_again() -> None:
    """A forked child is in none of its parent's calls."""
    global _lock
    _lock = threading.Lock()
    _claimed.clear()


os.register_at_fork(after_in_child=_begin_again)
