"""Followers in processes of our own: the end of their pipe is theirs.

`parallelize(..., mode="processes")` keeps a `Workers`: one process for each follower, started with
the first call and kept for the next ones. The model goes over once, as memory that all workers map.
`worker` is what runs in one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ... import _core
from ...processes.frames import Frame, Kind, write_frame
from ...processes.spawning import Spawned
from ..call import Call
from ..replicas import fingerprint
from .link import Link, RemoteFollowers
from .packing import pipeline_to_memory
from .worker import main

_LOADING = 600.0  # seconds for a worker to start and to load the model


class Workers:
    """The workers of one parallel pipeline; used by one thread at a time."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = dict(enumerate(devices[1:], 1))
        self._calls = itertools.count(1)
        self._begin()

    def _begin(self) -> None:
        self._workers: dict[int, _Worker] = {}
        self._made_from: int | None = None
        self._process = os.getpid()
        self._close = weakref.finalize(self, _end_all, self._workers, self._process)

    def refresh(self, pipe: Any) -> None:
        """A worker for each rank, with the pipeline as it is now.

        Raises where none has it; one without it fails in the call. Workers belong to the process
        that started them: a forked child starts its own.
        """
        if os.getpid() != self._process:
            self._begin()
        now = fingerprint(pipe)
        if now != self._made_from:
            for worker in self._workers.values():
                worker.has_model = False
            self._made_from = now
        for rank, device in self._devices.items():
            if rank in self._workers and not self._workers[rank].alive():
                self._workers.pop(rank).end()
            if rank not in self._workers:
                self._workers[rank] = _Worker(rank, device)
        without = [worker for worker in self._workers.values() if not worker.has_model]
        if without:
            _load(pipe, without)
        if not any(worker.has_model for worker in self._workers.values()):
            raise _core.LostError(next(iter(self._workers.values())).why_not())

    def followers(self, call: Call, pipe: Any, given: Any) -> RemoteFollowers:
        ready = {rank: worker for rank, worker in self._workers.items() if worker.has_model}
        links = {rank: worker.link for rank, worker in ready.items()}
        followers = RemoteFollowers(links, next(self._calls), call, pipe, given, self.drop)
        for rank in self._workers.keys() - ready.keys():
            call.fail(rank, self._workers[rank].why_not())
        return followers

    def drop(self, lost: set[int], stuck: set[int]) -> None:
        """Ends those that do not leave a call: the next call starts new ones. Those that failed and
        left get a new replica.
        """
        for rank in stuck & self._workers.keys():
            self._workers.pop(rank).end()
        for rank in lost & self._workers.keys():
            self._workers[rank].has_model = False

    def close(self) -> None:
        self._close()


def _end_all(workers: dict[int, _Worker], process: int) -> None:
    if os.getpid() == process:  # a forked child has only copies of their sockets
        for worker in workers.values():
            worker.end()
        workers.clear()


def _load(pipe: Any, workers: list[_Worker]) -> None:
    memory = pipeline_to_memory(pipe)
    try:
        for worker in workers:
            worker.load(memory)
    finally:
        os.close(memory)
    until = time.monotonic() + _LOADING
    for worker in workers:
        worker.wait_for_model(until)


class _Worker:
    """A process, and the connection to it."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._process = Spawned(main.__module__)
        stream = self._process.stream
        hello = {"path": sys.path, "rank": rank, "device": str(device)}
        with contextlib.suppress(OSError):  # it died at once: the link is going to say so
            write_frame(stream, Frame(Kind.HELLO, 0, json.dumps(hello).encode()))
        name = f"parastep-worker-{rank}"
        self.link = Link(stream, name, same_clock=True, ending=self._process.ending)
        self.has_model = False

    def alive(self) -> bool:
        return self.link.alive and self._process.alive

    def load(self, memory: int) -> None:
        self.link.loaded = None
        self.link.peer.send(Kind.MODEL, 0, descriptor=os.dup(memory))

    def wait_for_model(self, until: float) -> None:
        self.link.wait(lambda: self.link.loaded is not None, until)
        self.has_model = self.link.alive and self.link.loaded == ""

    def why_not(self) -> str:
        """Why it has no model."""
        if self.link.loaded is None and self.link.alive:
            return f"the worker has not loaded the pipeline within {_LOADING:.0f} s"
        if self.link.loaded:
            return f"the worker cannot load the pipeline: {self.link.loaded}"
        return f"the worker ended while loading the pipeline ({self._process.ending()})"

    def end(self) -> None:
        """Its pipe ends and it is killed."""
        self._process.end()
        self.link.close()
