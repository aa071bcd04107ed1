"""The followers of one call that are threads of this process; `remote` has those that are not."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from ..messages import describe
from ..quiet import thread_name
from ..threads import HostContext, Task, finish_work
from ..tracing.draws import cloned_global_generator
from .call import Call
from .follower import Follower
from .tensors import own_copy

_PATIENCE = 10.0  # seconds for those that are about to leave


class LocalFollowers:
    """Their arguments and their threads, as the leader starts them.

    To be made before the pipeline runs: arguments and the states of generators are taken here.
    `given` are the call's (args, kwargs), `replicas` those of the ranks here, by rank; what is not
    to be used again is told to `drop`.
    """

    def __init__(
        self,
        call: Call,
        replicas: dict[int, Any],
        given: tuple[tuple[Any, ...], dict[str, Any]],
        drop: Callable[[int], None],
    ) -> None:
        self.ranks: dict[int, Follower] = {}
        self._call, self._replicas, self._drop = call, replicas, drop
        self._arguments = own_copy(given)
        self._context = HostContext()
        self._random = cloned_global_generator(call.home).get_state()
        self._threads: dict[int, threading.Thread | Task] = {}

    def start(self) -> None:
        """When the leader is about to evaluate: by then it has encoded, warned and logged, or has
        raised what is wrong with the arguments.
        """
        finish_work(*self._call.devices)
        for rank in range(1, self._call.ranks):
            if rank in self._replicas:  # the others are in processes of their own
                self._start(rank)

    def start_lane(self) -> None:
        """A follower on the leader's own device, once steps ahead of its loop are wanted."""
        self._start(0)

    def _start(self, rank: int) -> None:
        device = self._call.devices[rank]
        follower = Follower(self._replicas[rank], rank, self._call, device)
        random = torch.Generator(device)
        random.set_state(self._random)
        body = functools.partial(follower.run, lambda: own_copy(self._arguments), random)
        # The leader keeps its own number of threads, which its bits may depend on.
        intraop, stream = (1 if device.type == "cpu" else None), None
        if self._call.meeting is not None:  # one calls for all, each as the leader would
            intraop = self._context.threads
        if device.type == "cuda" and (self._call.meeting is not None or rank == 0):
            # The lane evaluates in turn with the leader: memory is cached for a stream.
            stream = torch.cuda.current_stream(device)
        self.ranks[rank] = follower
        try:
            self._threads[rank] = self._context.start(
                body, thread_name(rank), intraop, device, stream, self._call.home
            )
        except RuntimeError as error:  # no more threads
            self._call.fail(rank, describe(error))

    @property
    def evaluated(self) -> dict[int, int]:
        """Evaluations of each rank."""
        return {rank: follower.evaluated for rank, follower in self.ranks.items()}

    def gather(self, lost: set[int]) -> None:
        """Waits for those that are about to leave. A replica of a lost rank, or whose thread hangs,
        is not used again.
        """
        until = time.monotonic() + _PATIENCE
        for rank, thread in self._threads.items():
            thread.join(0.05 if rank in lost else max(until - time.monotonic(), 0.0))
            if thread.is_alive() or rank in lost:
                self._drop(rank)
