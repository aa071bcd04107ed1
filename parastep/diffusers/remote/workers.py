"""Followers in processes of our own: the end of their pipe is theirs.

`parallelize(..., mode="processes")` keeps a `Workers`: one process for each follower and helper,
started with the first call that needs it and kept for the next ones. The model goes over once, as
memory that all workers map. `worker` is what runs in one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import time
import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ... import _core
from ...options import Options
from ...processes.frames import Frame, Kind, write_frame
from ...processes.spawning import Spawned
from ..call import Call
from ..replicas import fingerprint
from .helping import RemoteHelper, by_socket
from .link import Link, RemoteFollowers, RemoteTeam
from .packing import pipeline_to_memory
from .worker import main

_PATIENCE = 10.0  # seconds for helpers to leave a call that is over
_makes = itertools.count(1)
_LOADING = 600.0  # seconds for a worker to start and to load the model


class Workers:
    """The workers of one parallel pipeline, one for each of its devices but the leader's: in a call
    it follows as a rank, or helps one. Used by one thread at a time.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = list(devices)  # by place, the leader's first
        self._calls = itertools.count(1)
        self._begin()

    def _begin(self) -> None:
        self._workers: dict[int, _Worker] = {}  # by place
        self._made_from: int | None = None
        self._process = os.getpid()
        self._close = weakref.finalize(self, _end_all, self._workers, self._process)

    def refresh(self, pipe: Any, places: Collection[int]) -> None:
        """A worker for each of these places, with the pipeline as it is now.

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
        for place in places:
            if place in self._workers and not self._workers[place].alive():
                self._workers.pop(place).end()
            if place not in self._workers:
                self._workers[place] = _Worker(place, self._devices[place])
        wanted = [self._workers[place] for place in places]
        without = [worker for worker in wanted if not worker.has_model]
        if without:
            _load(pipe, without)
        if wanted and not any(worker.has_model for worker in wanted):
            raise _core.LostError(wanted[0].why_not())

    def followers(
        self, call: Call, pipe: Any, given: Any, shares: Sequence[tuple[int, ...]], options: Options
    ) -> RemoteFollowers:
        return _Followers(self, next(self._calls), call, pipe, given, shares, options)

    def helper(self, place: int) -> RemoteHelper:
        """One of the leader's own, in one call."""
        worker, number = self._workers[place], next(self._calls)
        return RemoteHelper(
            by_socket(worker.link.serve(number) if worker.has_model else _closed(), place),
            self._devices[place],
            self._devices[0],
            place,
            worker._process.ending if worker.has_model else worker.why_not,
            lambda patience: worker.leaves(number, time.monotonic() + patience),
        )

    def made(self, place: int) -> int:
        """Another one, when another process or another model is there."""
        return self._workers[place].link.made

    def at(self, place: int) -> _Worker:
        return self._workers[place]

    def release(self, place: int) -> None:
        """One that the leader lost."""
        left = place in self._workers and self._workers[place].link.current is None
        self.drop({place}, set() if left else {place})

    def drop(self, lost: set[int], stuck: set[int]) -> None:
        """Ends those at places that do not leave a call: the next call starts new ones. Those that
        failed and left get a new replica.
        """
        for place in stuck & self._workers.keys():
            self._workers.pop(place).end()
        for place in lost & self._workers.keys():
            self._workers[place].has_model = False

    def close(self) -> None:
        self._close()


class _Followers(RemoteFollowers):
    """Of one call, with those that serve them."""

    def __init__(
        self,
        workers: Workers,
        number: int,
        call: Call,
        pipe: Any,
        given: Any,
        shares: Sequence[tuple[int, ...]],
        options: Options,
    ) -> None:
        self._workers, self._number = workers, number
        self._heads = {rank: share[0] for rank, share in enumerate(shares) if rank > 0}
        at = {rank: workers.at(place) for rank, place in self._heads.items()}
        links = {rank: worker.link for rank, worker in at.items() if worker.has_model}
        self._helping: dict[int, _Worker] = {}
        helpers: dict[int, dict[int, Link]] = {}
        for rank in self._heads:
            there = {place: workers.at(place) for place in shares[rank][1:]}
            self._helping |= there
            helpers[rank] = {place: worker.link for place, worker in there.items()}
            if there:
                devices = [at[rank].device, *(worker.device for worker in there.values())]
                call.teams[rank] = RemoteTeam(devices)
        team = options.exact, options.deadline
        super().__init__(links, number, call, pipe, given, self._lose, helpers, team)
        for rank in at.keys() - links.keys():
            call.fail(rank, at[rank].why_not())

    def _lose(self, lost: set[int], stuck: set[int]) -> None:
        both = ({self._heads[r] for r in ranks & self._heads.keys()} for ranks in (lost, stuck))
        self._workers.drop(*both)

    def gather(self, lost: set[int]) -> None:
        """Helpers after their heads: whose head was ended is let go by that."""
        super().gather(lost)
        until = time.monotonic() + _PATIENCE
        lost = {place for rank in self.ranks.values() for place in rank.lost_helpers}
        stuck = set()
        for place, worker in self._helping.items():
            end = time.monotonic() + 0.05 if place in lost else until
            if not worker.leaves(self._number, end):
                stuck.add(place)
        self._workers.drop(lost, stuck)


def _closed() -> int:
    """A socket whose other end is gone."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


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

    def __init__(self, place: int, device: torch.device) -> None:
        self._process = Spawned(main.__module__)
        stream = self._process.stream
        hello = {"path": sys.path, "rank": place, "device": str(device)}
        with contextlib.suppress(OSError):  # it died at once: the link is going to say so
            write_frame(stream, Frame(Kind.HELLO, 0, json.dumps(hello).encode()))
        name = f"parastep-worker-{place}"
        self.device = device
        self.link = Link(stream, name, True, self._process.ending, device, self._process.kill)
        self.has_model = False

    def alive(self) -> bool:
        return self.link.alive and self._process.alive

    def load(self, memory: int) -> None:
        self.link.loaded, self.link.made = None, next(_makes)
        self.link.peer.send(Kind.MODEL, 0, descriptor=os.dup(memory))

    def wait_for_model(self, until: float) -> None:
        self.link.wait(lambda: self.link.loaded is not None, until)
        self.has_model = self.link.alive and self.link.loaded == ""

    def leaves(self, number: int, until: float) -> bool:
        """Whether it has left a call in which it helps, or is gone, by then."""

        def has_left() -> bool:
            return self.link.current is None or self.link.current.number != number

        return self.link.wait(has_left, until) or not self.alive()

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
