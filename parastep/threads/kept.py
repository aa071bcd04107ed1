"""What outlives a run on CUDA devices: for each rank of a device a stream, and its thread.

torch keeps freed memory for the stream that it was allocated on, cuBLAS a workspace a stream, and
cuDNN its plans a thread: with new ones for every call, each would begin with none of that, and what
the ones before had would stay taken. Used by `context`.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

_IDLE = 60.0  # seconds after which a thread that nobody needs ends

_lock = threading.Lock()
_streams: dict[tuple[Any, str], Any] = {}  # by device, and name of who works on it
_idle: dict[tuple[Any, str], list[_Kept]] = defaultdict(list)


def stream_of(device: Any, name: str) -> Any:
    """The CUDA stream of this name on a device, the same in every call."""
    torch: Any = sys.modules["torch"]
    with _lock:
        if (device, name) not in _streams:
            _streams[device, name] = torch.cuda.Stream(device)
        return _streams[device, name]


class Task:
    """A body that a kept thread runs, with what of `threading.Thread` its starter needs."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self.body = body
        self._done = threading.Event()

    def run(self) -> None:
        try:
            self.body()
        except BaseException:  # shown as a thread's own would be, which goes on
            given = (*sys.exc_info(), threading.current_thread())
            threading.excepthook(threading.ExceptHookArgs(given))
        finally:
            del self.body  # and what it holds

    def end(self) -> None:
        """Its thread is there for others: whoever waited for the task finds it idle."""
        self._done.set()

    def is_alive(self) -> bool:
        return not self._done.is_set()

    def join(self, timeout: float | None = None) -> None:
        self._done.wait(timeout)


class _Kept:
    """A thread that waits for tasks. One that hangs in a task is not idle, and so not used."""

    def __init__(self, key: tuple[Any, str]) -> None:
        self._key = key
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=key[1], daemon=True).start()

    def give(self, task: Task) -> None:
        self._tasks.put(task)

    def _work(self) -> None:
        while (task := self._next()) is not None:
            task.run()
            with _lock:
                _idle[self._key].append(self)
            task.end()
            del task

    def _next(self) -> Task | None:
        try:
            return self._tasks.get(timeout=_IDLE)
        except queue.Empty:
            with _lock:
                if self in _idle[self._key]:
                    _idle[self._key].remove(self)
                    return None
            return self._tasks.get()  # somebody has just taken it


def start(device: Any, name: str, body: Callable[[], Any]) -> Task:
    """Runs the body in the thread of this name on a device: one that is idle, else a new one."""
    task = Task(body)
    with _lock:
        found = _idle[device, name].pop() if _idle[device, name] else None
    (found or _Kept((device, name))).give(task)
    return task


def _begin_again() -> None:
    """A forked child has none of its parent's threads, and no CUDA."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()
    _streams.clear()


os.register_at_fork(after_in_child=_begin_again)
