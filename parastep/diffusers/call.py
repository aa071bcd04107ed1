"""One call of a parallel pipeline: what its leader and its followers tell each other beside the
core.

The core carries points and outputs. Here goes what is said once: encoder outputs, who has the run's
other end, what a step returns, who failed before there was a run. A follower that waits is always
let go: at the latest when the leader's call ends.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import _core
from ..threads import finish_work
from ..tracing.noise import cloned_generator
from .hooks import map_tensors

if TYPE_CHECKING:
    from .batching import Meeting
    from .remote.link import FarRank


class Leave(BaseException):
    """Takes a follower out of its pipeline's loop: the run is over.

    Not an Exception, so that no pipeline's own handler catches it.
    """


class GoBack(BaseException):
    """Takes a follower out of its loop to enter the call again: its next step lies behind it."""


class Call:
    """`devices`: one for each rank, where they are threads of this process. `lane`: steps ahead of
    the leader's loop may be evaluated on its own device, by a follower of rank 0.
    """

    def __init__(
        self, ranks: int, devices: Sequence[torch.device] = (), lane: bool = False
    ) -> None:
        self.ranks, self.devices, self.lane = ranks, devices, lane
        self.returned: Any = None  # what the leader's first step returned: the followers' form
        self._changed = threading.Condition()
        self._encoded: dict[tuple[str, str], list[Any]] = defaultdict(list)
        self._followers: dict[int, _core.Follower] = {}
        self._failed: dict[int, str] = {}
        self._arrived: set[int] = set()  # ranks that have reached their loop
        self._begun = False  # no more encoder outputs will come
        self.over = False
        self.meeting: Meeting | None = None  # where evaluations share a batch
        self.far: dict[int, FarRank] = {}  # ranks in other processes, which are told by frames
        self._far_begun = False
        self._x: torch.Tensor | None = None  # a latent of the run

    # Leader.

    @property
    def home(self) -> torch.device:
        """The leader's device."""
        return self.devices[0]

    @property
    def transports(self) -> list[str]:
        """What takes the latents to each rank; nothing to rank 0."""
        others = range(1, self.ranks)
        return ["", *(self.far[k].transport if k in self.far else "threads" for k in others)]

    def begin_far(self, arguments: bytes) -> None:
        """The loop is about to begin: ranks in other processes enter theirs."""
        self._far_begun = True
        for far in self.far.values():
            far.begin(arguments)
            for key, outputs in self._encoded.items():
                for output in outputs:
                    far.encoded(key, output)

    def lead(self, program: _core.Program, x: torch.Tensor, options: dict[str, Any]) -> Any:
        """The leader of the run."""
        self._x = x
        if not self.lane:
            options = options | {"max_stride": 1}  # nobody evaluates ahead on the leader's device
        carriers = {rank: far.carrier() for rank, far in self.far.items()}
        places = [d.index if d.type == "cuda" else -1 for d in self.devices[: self.ranks]]
        devices = places if x.is_cuda and len(places) == self.ranks else None
        return _core.Leader(
            program,
            x,
            ranks=self.ranks,
            lane=self.lane,
            carriers=carriers,
            devices=devices,
            **options,
        )

    def tell_encoded(self, key: tuple[str, str], output: Any) -> None:
        """A copy: pipelines edit embeddings in place, the leader's and every follower's own."""
        output = map_tensors(_own, output)
        map_tensors(_finished, output)
        with self._changed:
            self._encoded[key].append(output)
            self._changed.notify_all()
        for far in self.far.values() if self._far_begun else ():
            far.encoded(key, output)

    def open(self, leader: _core.Leader, returned: Any, patience: float) -> None:
        """The run exists: followers may take their ends.

        Those that failed before are left out, and those that have not reached their loop within
        `patience` seconds: one may wait for a lock that the pipeline holds in its call.
        """
        for far in self.far.values():
            far.begun(returned)
        self.begin(returned)
        with self._changed:
            ranks = set(range(0 if self.lane else 1, self.ranks))
            self._changed.wait_for(lambda: self._arrived | self._failed.keys() >= ranks, patience)
            late = f"it has not reached its loop within {patience:.3g} s"
            there = self._arrived & ranks - self._failed.keys()
            for rank in sorted(ranks):
                if rank in there:
                    self._open_rank(leader, rank)
                else:
                    leader.leave_out(rank, self._failed.get(rank, late))
            if self.meeting is not None:
                self.meeting.open(there, self.lane, patience / 2)
            self._changed.notify_all()

    def begin(self, returned: Any) -> None:
        """The leader's first step returned this; no more encoder outputs will come."""
        map_tensors(_finished, returned)
        with self._changed:
            self.returned, self._begun = returned, True
            self._changed.notify_all()

    def _open_rank(self, leader: _core.Leader, rank: int) -> None:
        if rank in self.far:
            assert self._x is not None
            self.far[rank].open(leader.inbox(rank), self._x)
        else:
            self._followers[rank] = leader.follower(rank)

    def admit(self, rank: int, follower: _core.Follower) -> None:
        """This rank's end of a run that is led in another process."""
        with self._changed:
            self._followers[rank] = follower
            self._changed.notify_all()

    def end(self) -> None:
        """No more is to come: whoever waits leaves."""
        for far in self.far.values() if self._far_begun else ():
            far.over()
        with self._changed:
            self.over = True
            self._changed.notify_all()
        if self.meeting is not None:
            self.meeting.end()

    # Followers.

    def arrive(self, rank: int) -> None:
        """This rank is about to evaluate step 0."""
        with self._changed:
            self._arrived.add(rank)
            self._changed.notify_all()

    def encoded(self, key: tuple[str, str], ordinal: int) -> list[Any]:
        """[the leader's output of this call of an encoder], as soon as it is there.

        Empty where the leader did not make this call before its loop, and never will.
        """
        with self._changed:
            told = self._encoded[key]
            self._changed.wait_for(lambda: self.over or self._begun or len(told) > ordinal)
            if self.over:
                raise Leave
            return told[ordinal : ordinal + 1]

    def follower(self, rank: int) -> _core.Follower:
        """This rank's end of the run, as soon as there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self.over or rank in self._followers)
            if rank not in self._followers:
                raise Leave
            return self._followers[rank]

    def fail(self, rank: int, why: str) -> None:
        """This rank cannot go on: told through the core, or kept until there is a run."""
        with self._changed:
            follower = self._followers.get(rank)
            if follower is None:
                self._failed[rank] = why
                self._changed.notify_all()
        if self.meeting is not None:
            self.meeting.done(rank)
        if follower is not None:
            follower.fail(why)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _finished(tensor: torch.Tensor) -> torch.Tensor:
    finish_work(tensor.device)
    return tensor


def own_copy(value: Any) -> Any:
    """A call's argument as nobody else has it: pipelines draw from generators and edit arguments in
    place, and images are read from their files when first used.
    """
    if isinstance(value, torch.Generator):
        return cloned_generator(value)
    if isinstance(value, torch.Tensor):
        return _own(value)
    if type(value) in (list, tuple):
        return type(value)(own_copy(item) for item in value)
    if type(value) is dict:
        return {key: own_copy(item) for key, item in value.items()}
    if type(value).__module__.partition(".")[0] in ("PIL", "numpy") and hasattr(value, "copy"):
        return value.copy()
    return value
