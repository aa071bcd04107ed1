"""What the leader and the followers of one pipeline call tell each other beside the core.

The core carries points and outputs. Here goes what is said once: encoder outputs, who has the run's
other end, what a step returns, who failed before there was a run. A follower that waits is always
let go: at the latest when the leader's call ends.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .. import _core
from ..options import Options
from ..speculation import with_room
from .batching import Meeting
from .leaving import Leave
from .memory import Peak
from .teams.helpers import Helper
from .tensors import finished, map_tensors, private

Given = tuple[tuple[Any, ...], dict[str, Any]]  # a pipeline call's (args, kwargs), for a replica


@dataclasses.dataclass
class Loop:
    """A sampling loop of a call that is over: its steps, what those of its last iteration returned,
    the states that the call's generators had when the next one began, and how often denoisers were
    called between them.
    """

    steps: int
    returned: list[Any]
    states: list[torch.Tensor]
    calls: int


class Followers(Protocol):
    """The followers of one call, here or elsewhere."""

    @property
    def evaluated(self) -> dict[int, int]:
        """Evaluations of each rank, as far as they are known."""

    def start(self) -> None:
        """The loop is about to begin: the leader has encoded, warned, or raised by then."""

    def start_lane(self) -> None:
        """Steps ahead of the loop are wanted on the leader's own device."""

    def gather(self, lost: set[int]) -> None:
        """Waits for those that are about to leave; `lost` are those that were left out."""


class Remote(Protocol):
    """A rank in another process, as the leader's call tells it things."""

    @property
    def transport(self) -> str:
        """What takes the latents there."""

    def carrier(self) -> Any:
        """As `_core.Leader` takes it."""

    def begin(self, arguments: bytes) -> None: ...
    def encoded(self, key: tuple[str, str], output: Any) -> None: ...
    def begun(self, returned: Any) -> None: ...
    def open(self, told: _core.Inbox | _core.Pair, x: torch.Tensor) -> None: ...
    def next_loop(self, loop: Loop) -> None: ...
    def over(self) -> None: ...


class Call:
    """`devices`: one for each rank, where they are threads of this process. `lane`: steps ahead of
    the leader's loop may be evaluated on its own device, by a follower of rank 0.
    """

    def __init__(
        self, ranks: int, devices: Sequence[torch.device] = (), lane: bool = False
    ) -> None:
        self.ranks, self.devices, self.lane = ranks, devices, lane
        self.returned: Any = None  # what the leader's first iteration was: an `Iteration`
        self.loops: list[Loop] = []  # those before the one that is run
        self._changed = threading.Condition()
        self._encoded: dict[tuple[str, str], list[Any]] = defaultdict(list)
        self._followers: dict[int, _core.Follower] = {}
        self._failed: dict[int, str] = {}
        self._arrived: set[int] = set()  # ranks that have reached their loop
        self._begun = False  # no more encoder outputs will come
        self.over = False
        self.meeting: Meeting | None = None  # where evaluations share a batch
        self.team: Any = None  # of the leader, where its forwards are shared out
        self.teams: dict[int, Any] = {}  # and of its followers, by rank: as a `Team` is told of
        self.helpers: list[Helper] = []  # of all of them
        self.made_from: int | None = None  # the denoisers' fingerprint that theirs have
        self.peak: Peak | None = None  # of the leader's forwards, which it measures at step 0
        self.remote: dict[int, Remote] = {}  # ranks in other processes
        self._remote_begun = False
        self._x: torch.Tensor | None = None  # a latent of the run

    # Leader.

    def dissolve(self, reason: str) -> None:
        """Heads evaluate alone from here on."""
        for team in filter(None, (self.team, *self.teams.values())):
            team.dissolve(reason)

    def doubt(self) -> None:
        """What was found out about the leader's helpers in earlier calls may no longer be true; a
        follower's are judged by its output of step 0, as it is.
        """
        if self.team is not None:
            self.team.doubt()

    @property
    def home(self) -> torch.device:
        """The leader's device."""
        return self.devices[0]

    @property
    def shares_home(self) -> bool:
        """Whether others evaluate on the leader's device in this process."""
        here = [rank for rank in range(1, self.ranks) if rank not in self.remote]
        return self.lane or any(self.devices[rank] == self.home for rank in here)

    def steps_before(self, loop: int) -> int:
        """Of the loops before the one of this number."""
        return sum(each.steps for each in self.loops[:loop])

    @property
    def transports(self) -> list[str]:
        """What takes the latents to each rank; nothing to rank 0."""
        others = range(1, self.ranks)
        return ["", *(self.remote[k].transport if k in self.remote else "threads" for k in others)]

    def begin_remote(self, arguments: bytes) -> None:
        """The loop is about to begin: ranks in other processes enter theirs."""
        self._remote_begun = True
        for remote in self.remote.values():
            remote.begin(arguments)
            for key, outputs in self._encoded.items():
                for output in outputs:
                    remote.encoded(key, output)

    def lead(self, program: _core.Program, x: torch.Tensor, options: Options) -> Any:
        """The leader of the run."""
        self._x = x
        if not self.lane:  # nobody evaluates ahead on the leader's device
            options = dataclasses.replace(options, max_stride=1)
        carriers = {rank: remote.carrier() for rank, remote in self.remote.items()}
        places = [d.index if d.type == "cuda" else -1 for d in self.devices[: self.ranks]]
        devices = places if x.is_cuda and len(places) == self.ranks else None
        return with_room(
            functools.partial(
                _core.Leader,
                program,
                x,
                ranks=self.ranks,
                lane=self.lane,
                carriers=carriers,
                devices=devices,
                **options.for_core(),
            )
        )

    def tell_encoded(self, key: tuple[str, str], output: Any) -> None:
        """A copy: pipelines edit embeddings in place, the leader's and every follower's own."""
        output = map_tensors(private, output)
        map_tensors(finished, output)
        with self._changed:
            self._encoded[key].append(output)
            self._changed.notify_all()
        for remote in self.remote.values() if self._remote_begun else ():
            remote.encoded(key, output)

    def open(self, leader: _core.Leader, returned: Any, patience: float) -> None:
        """The run exists: followers may take their ends.

        Those that failed before are left out, and those that have not reached their loop within
        `patience` seconds: one may wait for a lock that the pipeline holds in its call.
        """
        for remote in self.remote.values():
            remote.begun(returned)
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
        """This was the leader's first iteration; no more encoder outputs will come."""
        map_tensors(finished, returned)
        with self._changed:
            self.returned, self._begun = returned, True
            self._changed.notify_all()

    def _open_rank(self, leader: _core.Leader, rank: int) -> None:
        if rank in self.remote:
            assert self._x is not None
            self.remote[rank].open(leader.inbox(rank), self._x)
        else:
            self._followers[rank] = leader.follower(rank)

    def admit(self, rank: int, follower: _core.Follower) -> None:
        """This rank's end of a run that is led in another process."""
        with self._changed:
            self._followers[rank] = follower
            self._changed.notify_all()

    def begin_next_loop(self, loop: Loop, lost: dict[int, str]) -> None:
        """A run is over, and another one begins in the same call; not for ranks that were lost."""
        map_tensors(finished, loop.returned)
        if self.meeting is not None:
            self.meeting.begin_loop()
        with self._changed:
            self._failed = {**lost, **self._failed}
            self._arrived.clear()
            self._followers.clear()
            self._begun = False
            self.loops.append(loop)
            self._changed.notify_all()
        for remote in self.remote.values():  # which may arrive at once
            remote.next_loop(loop)

    def end(self) -> None:
        """No more is to come: whoever waits leaves."""
        for remote in self.remote.values() if self._remote_begun else ():
            remote.over()
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

    def loop_before(self, ordinal: int) -> Loop:
        """The loop of this number, as soon as the next one begins; none may."""
        with self._changed:
            self._changed.wait_for(lambda: self.over or len(self.loops) > ordinal)
            if len(self.loops) <= ordinal:
                raise Leave
            return self.loops[ordinal]

    def has_others(self, rank: int) -> bool:
        """Whether other followers are left, so that this one may leave."""
        with self._changed:
            return len({*range(1, self.ranks)} - {rank} - self._failed.keys()) > 0

    def fail(self, rank: int, why: str) -> None:
        """This rank cannot go on: told through the core, or kept until there is a run."""
        with self._changed:
            follower = self._followers.get(rank)
            self._failed[rank] = why
            if follower is None:
                self._changed.notify_all()
        if self.meeting is not None:
            self.meeting.done(rank)
        if follower is not None:
            follower.fail(why)
