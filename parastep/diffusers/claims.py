"""What is in a parallel call: a pipeline, a module, or a scheduler, serves one such call at a time.

Two pipelines may hold the same modules, in two threads or one within the other's callback. The
second call does as `busy` says: it runs as if untouched, since its replicas would be copied from
modules with the first one's hooks on them, or it waits for its turn, or it raises.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import _core
from .parts import denoisers_of, is_scheduler

BUSY = ("serial", "wait", "raise")

_changed = threading.Condition()  # guards all below, and is told when a claim or a waiter goes
_claimed: dict[int, Any] = {}  # the objects, by id, of all calls in progress
_waiting: list[dict[int, Any]] = []  # what calls wait for, the longest waiting one first
_calls: list[tuple[int, Any]] = []  # in progress: the thread of each, and the parallel pipeline


def check_busy(busy: Any) -> str:
    if busy not in BUSY:
        raise _core.InvalidError(f"busy is {busy!r}: one of {', '.join(BUSY)}")
    return str(busy)


@contextlib.contextmanager
def called(call: Any, busy: str) -> Iterator[None]:
    """Within, the parallel pipeline is in a call of this thread's.

    Raises:
        StateError: it is in one already, or the wait for its end would be one for ever.
    """
    own, entry = {id(call): call}, (threading.get_ident(), call)
    with _changed:
        if busy == "wait":
            _wait_for(own, call)
        if id(call) in _claimed:
            raise _core.StateError(
                "this pipeline is in a call already, in another thread or in its own callback: one "
                "at a time, since both would step one scheduler; parallelize another pipeline, or "
                'with busy="wait"'
            )
        _claimed.update(own)
        _calls.append(entry)
    with _given_back(own, lambda: _calls.remove(entry)):
        yield


@contextlib.contextmanager
def claimed(call: Any, pipe: Any, busy: str) -> Iterator[str | None]:
    """Within a call, what the pipe consists of is this call's; or gives the reason why it is not.

    Raises:
        StateError: with "raise" in place of the reason; or the wait would be one for ever.
    """
    parts = _parts_of(pipe)
    own = {id(obj): obj for objects in parts.values() for obj in objects}
    with _changed:
        if busy == "wait":
            _wait_for(own, call)
        taken = [name for name, objects in parts.items() if any(id(o) in _claimed for o in objects)]
        reason = _words(pipe, taken) if taken else None
        if reason is not None and busy == "raise":
            raise _core.StateError(f'{reason}; busy="wait" would wait for its end')
        own = own if reason is None else {}
        _claimed.update(own)
    with _given_back(own, lambda: None):
        yield reason


@contextlib.contextmanager
def _given_back(own: dict[int, Any], also: Callable[[], Any]) -> Iterator[None]:
    process = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == process:  # a forked child begins without any
            with _changed:
                for key in own:
                    _claimed.pop(key, None)
                also()
                _changed.notify_all()


def _wait_for(own: dict[int, Any], call: Any) -> None:
    """Until none of it is claimed; of those who wait for one thing the first one gets it.

    A thread that is in a call of another pipeline's never waits, so that whoever holds a pipeline's
    parts goes on and no two wait for each other.
    """
    if not _is_wanted(own, _waiting):
        return
    within = [other for thread, other in _calls if thread == threading.get_ident()]
    if any(other is not call or id(call) in own for other in within):
        raise _core.StateError(
            "a call in the callback of another one, or of its own pipeline, cannot wait: that one "
            "would never end"
        )
    _waiting.append(own)
    try:
        while _is_wanted(own, list(itertools.takewhile(lambda o: o is not own, _waiting))):
            _changed.wait()
    finally:
        _waiting[:] = [other for other in _waiting if other is not own]
        _changed.notify_all()


def _is_wanted(own: dict[int, Any], before: list[dict[int, Any]]) -> bool:
    return any(not own.keys().isdisjoint(taken) for taken in (_claimed, *before))


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
    global _changed
    _changed = threading.Condition()
    _claimed.clear()
    _waiting.clear()
    _calls.clear()


os.register_at_fork(after_in_child=_begin_again)
