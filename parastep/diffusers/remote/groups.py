"""The processes of a group: the same script in every one, started by torchrun, Slurm or MPI.

Process 0 leads. Its call of the pipeline is everybody's: the others follow it with their own
replica, or help a process that does (`members`), and return, or raise, what it returned or raised.
Frames travel by torch.distributed's send and receive (gloo) or by mpi4py's.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import _core
from ..._version import __version__
from ...messages import describe
from ...options import Options
from ...processes.frames import Frame, Kind, Stream, read_frame, write_frame
from ...report import Report
from ..call import Call
from ..context import Context, context_of, stand_ins
from ..parts import denoisers_of
from ..replicas import fingerprint, refresh, replicate
from ..teams.crew import Cuts
from ..teams.helpers import LocalHelper
from ..teams.together import ContextTeam, Together
from .helping import RemoteHelper
from .link import Link, RemoteFollowers, RemoteTeam
from .members import CHANNEL, Head, Jobs, Member, Refusing
from .packing import pack, unpack
from .serving import RemoteCall, Server, team_of

_PATIENCE = 5.0  # seconds for the other ranks to say goodbye


class Group:
    """This process's part in the group, for one parallel pipeline; made in all processes at once.
    `connect` gives the stream to another one, on a channel that both have; `numbers`: those that
    torch.distributed has for them.

    `shares`: the processes of each rank, its head first, None where that is chosen call by call;
    `context`: the denoisers whose forwards the processes of a rank enter together.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        connect: Callable[[int, int], Stream],
        numbers: Sequence[int] = (),
    ) -> None:
        self.rank, self.size = rank, size
        self.shares: list[tuple[int, ...]] | None = None
        self.context: Context | None = None
        self._connect, self._numbers = connect, numbers
        self._together: Together | None = None  # of the call that this process is in
        self._broken: str | None = None  # why there can be no other one
        self._process = os.getpid()
        self._calls = itertools.count(1)
        self._number = 0  # of the call that this process is in
        self._devices: list[torch.device] = []  # of all processes
        self._links: dict[int, Link] = {}
        self._follower: Server | None = None
        self._members: dict[int, Member] = {}  # that help this process, by place
        self._head: Head | None = None  # that this one helps
        self._helping: list[int] = []  # members that do so in the call that comes
        # Calls, sessions and their forwards, results, and the end.
        self._jobs = Jobs()
        self._replica: Any = None
        self._made_from: int | None = None
        self._made = 0  # replicas so far
        self._cuts = Cuts()
        self._ends: list[Link | Server | Member | Head] = []
        self._close = weakref.finalize(self, _close_all, self._ends, os.getpid())

    def open(
        self, device: torch.device, split: str | int | None = None, context: Context | None = None
    ) -> None:
        """Greets the others and begins to listen."""
        if context is None:
            team, how = team_of_size(self.rank, self.size, split), f"split {split or 'none'}"
        else:
            team, how = self._team_in(context), f"context {', '.join(context.names)}"
        self.context = context
        own: dict[str, Any] = {"version": __version__, "boot": _boot(), "device": str(device)}
        own |= {"team": team, "how": how}
        every = self._greet_all(own) if self.rank == 0 else self._follow_from(device, own)
        self._devices = [torch.device(each["device"]) for each in every]
        shares = dict.fromkeys(tuple(each["team"]) for each in every)
        self.shares = None if split == "auto" and context is None else list(shares)
        if team[0] == self.rank:
            for place in team[1:]:
                self._members[place] = Member(
                    self._connect(place, CHANNEL), place, self.where(place)
                )
                self._ends.append(self._members[place])
        else:
            self._head = Head(self._connect(team[0], CHANNEL), self._jobs)
            self._ends.append(self._head)

    def _team_in(self, context: Context) -> list[int]:
        if not set(context.ranks) <= set(self._numbers):
            raise _core.UnsupportedError(
                f"{context.names[0]} is split over processes of torch.distributed that are not all "
                "in this group"
            )
        return sorted(map(self._numbers.index, context.ranks))

    def _greet_all(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """The others speak first: a send may wait for its receive. All of them hear the same."""
        streams = {peer: self._connect(peer, 0) for peer in range(1, self.size)}
        every = [own, *(_hear(stream) for stream in streams.values())]
        refusal = _why_not(every)
        for stream in streams.values():
            _say(stream, {**own, "every": every, "refusal": refusal})
        if refusal is not None:
            raise _core.ProtocolError(refusal)
        for peer, stream in streams.items():
            same_clock = bool(own["boot"]) and every[peer].get("boot") == own["boot"]
            self._links[peer] = Link(stream, f"parastep-rank-{peer}", same_clock)
            self._ends.append(self._links[peer])
        return every

    def _follow_from(self, device: torch.device, own: dict[str, Any]) -> list[dict[str, Any]]:
        stream, jobs = self._connect(0, 0), self._jobs
        _say(stream, own)
        told = _hear(stream)
        refusal = told.get("refusal") or _why_not([told, own], all_of_them=False)
        if refusal is not None:
            raise _core.ProtocolError(refusal)
        self._follower = Server(stream, self.rank, device, jobs.put, jobs.put, jobs.put)
        self._ends.append(self._follower)
        every: list[dict[str, Any]] = told["every"]
        return every

    def check(self, pipe: Any) -> None:
        """Raises where denoisers are split over processes in another way than when it was made."""
        if context_of(pipe) != self.context:
            raise _core.UnsupportedError(
                "its denoisers are split over processes in another way than when it was made "
                "parallel (enable_parallelism): call parallelize after that"
            )

    def close(self) -> None:
        self._close()

    def where(self, place: int) -> str:
        """A process and what it works on, for reports."""
        return f"{self._devices[place]} (process {place})"

    def _next_call(self) -> int:
        if os.getpid() != self._process:
            raise _core.StateError(
                "this process was forked from a rank of the group, which alone can use the group; "
                "call the pipeline itself here"
            )
        return next(self._calls)

    def helper(self, place: int, cuts: Cuts) -> RemoteHelper:
        """One of this process's own, in the call that it is in. `cuts`: what is known of it."""
        known = place in cuts.close | cuts.exact
        return self._members[place].helper(self._number, self._devices[self.rank], known)

    def enter_together(
        self, pipe: Any, deadline: float | None, over: Callable[[], bool] = lambda: False
    ) -> tuple[Together, list[str]]:
        """A context group's forwards, for the call that this process is in, and what reports call
        those who make them.
        """
        if self._broken is not None:
            raise _core.LostError(self._broken)
        assert self.context is not None
        home, others = self._devices[self.rank], self._members.values()
        helpers = [member.helper(self._number, home, quiet=True) for member in others]
        missing = next((helper for helper in helpers if helper.gone is not None), None)
        if missing is not None:  # before anybody has entered a forward, which would wait for it
            for helper in helpers:
                helper.close(0.0)
            raise _core.LostError(
                f"its context group cannot go on: {missing.where}: {missing.gone}"
            )
        own = LocalHelper(pipe, home, home, self.rank)
        together = Together(self.context.names, own, helpers, deadline, self._break, over)
        self._together = together
        return together, [self.where(place) for place in (self.rank, *self._members)]

    def _break(self, why: str) -> None:
        self._broken = why

    def replica(self, pipe: Any, device: torch.device, **how: Any) -> Any:
        """As `replicate` makes one; what is split stands for the pipe's own there."""
        names = self.context.names if self.context is not None else ()
        return replicate(pipe, device, instead=stand_ins(pipe, names, self._enter), **how)

    def _enter(self, name: str, args: Any, kwargs: Any) -> Any:
        if self._together is None:
            raise _core.StateError(f"{name} of a replica was called beside its pipeline")
        return self._together.evaluate(name, args, kwargs)

    # The leader.

    def refresh(self, pipe: Any, places: Any) -> None:
        """Nothing to be made: every rank has a pipeline of its own."""

    def followers(
        self, call: Call, pipe: Any, given: Any, shares: Sequence[tuple[int, ...]], options: Options
    ) -> RemoteFollowers:
        """Each with the helpers of its own, which it talks to by itself."""
        links, helpers = {}, {}
        for rank, share in enumerate(shares[1:], 1):
            links[rank] = self._links[share[0]]
            helpers[rank] = {place: _Elsewhere(self._devices[place]) for place in share[1:]}
            if len(share) > 1:
                call.teams[rank] = RemoteTeam([self.where(place) for place in share])
        team, number = (options.exact, options.deadline), self._number
        return RemoteFollowers(links, number, call, pipe, given, self.drop, helpers, team)

    def drop(self, lost: set[int], stuck: set[int]) -> None:
        """A rank that failed is there again for the next call, if it has left this one by then."""

    def lead(self, call: Callable[[], Any], report: Callable[[], Report | None]) -> Any:
        """The leader's call; what it returns or raises goes to all ranks."""
        self._number = self._next_call()
        try:
            result = call()
        except BaseException as error:
            self._share(False, error, report())
            raise
        self._share(True, result, report())
        return result

    def _share(self, returned: bool, value: Any, report: Report | None) -> None:
        try:
            body = pack((returned, value, report))
        except Exception as error:
            words = f"the leader's {type(value).__name__} cannot be sent: {describe(error)}"
            body = pack((False, _core.UnsupportedError(words), report))
        for link in self._links.values():
            link.peer.send(Kind.RESULT, self._number, body)

    # A follower.

    def follow(self, pipe: Any) -> tuple[Any, Report | None]:
        """The leader's call, followed; returns its result and report, or raises what it raised."""
        self._number, self._helping = self._next_call(), []
        ahead: list[Frame] = []
        try:
            return self._follow(pipe, ahead)
        finally:
            self._jobs.put_back(ahead)

    def _follow(self, pipe: Any, ahead: list[Frame]) -> tuple[Any, Report | None]:
        """`ahead`: what a head says that is in the next call already."""
        while True:
            job = self._jobs.get()
            if isinstance(job, str):
                self._jobs.put(job)  # for the calls after this one
                raise _core.LostError(f"the leader's process cannot be reached: {job}")
            if isinstance(job, RemoteCall) and job.number == self._number:
                self._serve(job, pipe)
            elif isinstance(job, Frame) and job.kind in (Kind.SERVE, Kind.FORWARD, Kind.END):
                if ahead or (job.kind == Kind.SERVE and job.call > self._number):
                    ahead.append(job)
                elif job.kind == Kind.SERVE:
                    self._help(job, pipe)
            elif isinstance(job, Frame) and job.call == self._number:
                if job.kind == Kind.RESULT:
                    return self._result(job.body)
                if job.kind == Kind.HELPER:
                    self._helping.append(json.loads(job.body)[0])

    def _serve(self, call: RemoteCall, pipe: Any) -> None:
        assert self._follower is not None
        try:
            self._refresh_replica(pipe)
        except Exception as error:
            self._replica = None
            call.fail(self.rank, f"its replica cannot be made: {describe(error)}")
        if self.context is not None:
            self._serve_together(call, pipe)
            return
        helpers = [self.helper(place, self._cuts) for place in self._helping]
        team = team_of(self._follower.device, helpers, self._cuts, self.where(self.rank))
        self._follower.serve(call, self._replica, helpers, team)
        for helper in helpers:
            if helper.lost is not None:
                self._cuts.drop(helper.place)

    def _serve_together(self, call: RemoteCall, pipe: Any) -> None:
        assert self._follower is not None
        helpers: list[Any] = []

        def make(exact: bool, deadline: float | None, over: Any, leaves: Any) -> ContextTeam:
            together, where = self.enter_together(pipe, deadline, over)
            helpers.extend((*together.others, together.own))
            return ContextTeam(together, where, watches=True)

        self._follower.serve(call, self._replica, helpers, make)
        self._together = None

    def _help(self, asked: Frame, pipe: Any) -> None:
        """Serves its head through one call, unless that is over here."""
        assert self._follower is not None and self._head is not None
        if asked.call != self._number:
            self._head.leave(asked, self._made)
            return
        if self.context is not None:
            self._head.take_part(asked, denoisers_of(pipe), self._follower.device)
            return
        try:
            self._refresh_replica(pipe)
            modules: dict[str, Any] = denoisers_of(self._replica)
        except Exception as error:
            self._replica = None
            modules = Refusing(f"its replica cannot be made: {describe(error)}")
        self._head.serve(asked, self._made, modules, self._follower.device)
        if self._replica is not None:
            self._replica.as_made.restore()

    def _refresh_replica(self, pipe: Any) -> None:
        """As the pipeline is now; another one where what it was made of has changed."""
        assert self._follower is not None
        now = fingerprint(pipe)
        if now != self._made_from or self._replica is None:
            self._replica, self._made_from = None, None
            self._cuts, self._made = Cuts(), self._made + 1
            self._replica = self.replica(pipe, self._follower.device)
            self._made_from = now
        refresh(self._replica, pipe)

    def _result(self, body: bytes | bytearray) -> tuple[Any, Report | None]:
        assert self._follower is not None
        try:
            returned, value, report = unpack(body, self._follower.device)
        except Exception as error:
            words = f"what the leader returned or raised cannot be read here: {describe(error)}"
            raise _core.ProtocolError(words) from error
        if not returned:
            raise value
        return value, report


class _Elsewhere(NamedTuple):
    """A helper of another head's, which needs no more than to be told of it."""

    device: torch.device
    made: int = 0

    def serve(self, number: int) -> None:
        """Its head says so."""


def team_of_size(rank: int, size: int, split: str | int | None) -> list[int]:
    """Of this process: its rank's, the head first; by "auto" those that may be one."""
    each = split if isinstance(split, int) else 2 if split == "auto" else 1
    if isinstance(split, int) and size % split:
        raise _core.InvalidError(
            f"split={split}: {size} processes are no whole number of teams of {split}"
        )
    first = rank - rank % each
    return list(range(first, min(first + each, size)))


def _close_all(ends: list[Link | Server | Member | Head], process: int) -> None:
    """Says goodbye to all at once, so that one who is busy is waited for only once."""
    if os.getpid() == process:
        closing = [threading.Thread(target=end.close, args=(_PATIENCE,)) for end in ends]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
    ends.clear()


def _say(stream: Stream, told: dict[str, Any]) -> None:
    write_frame(stream, Frame(Kind.HELLO, 0, json.dumps(told).encode()))


def _hear(stream: Stream) -> dict[str, Any]:
    frame = read_frame(stream)
    told = json.loads(frame.body) if frame.kind == Kind.HELLO else {}
    return told if isinstance(told, dict) else {}


def _why_not(every: list[dict[str, Any]], all_of_them: bool = True) -> str | None:
    """Why processes, by what they say of themselves, cannot be one group, or None."""
    versions = [each.get("version") for each in every]
    if len(set(versions)) > 1:
        found = " and ".join(sorted({str(version) for version in versions}))
        return f"the processes of the group have parastep {found}: all must have the same"
    if not all_of_them:
        return None
    hows = list(dict.fromkeys(each.get("how") for each in every))
    if len(hows) > 1:
        return f"the processes of the group do not agree on split: {' and '.join(map(str, hows))}"
    for rank, each in enumerate(every):
        if rank not in each["team"] or any(every[k]["team"] != each["team"] for k in each["team"]):
            return f"the processes of the group do not agree on their teams: {each['team']}"
    return None


def _boot() -> str:
    """The same for two processes that read one monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
