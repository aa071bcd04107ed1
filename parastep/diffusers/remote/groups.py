"""The processes of a group: the same script in every one, started by torchrun, Slurm or MPI.

Process 0 leads. Its call of the pipeline is everybody's: the others follow it with their own
replica, or help a process that does (`members`), and return, or raise, what it returned or raised.
Frames travel by torch.distributed's send and receive (gloo) or by mpi4py's.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import os
import queue
import sys
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
from ...processes.streams import MpiStream, TorchStream
from ...report import Report
from ..call import Call
from ..parts import denoisers_of
from ..replicas import fingerprint, refresh, replicate
from ..teams.crew import Cuts
from .helping import RemoteHelper
from .link import Link, RemoteFollowers, RemoteTeam
from .members import CHANNEL, Head, Jobs, Member, Refusing
from .packing import pack, unpack
from .serving import RemoteCall, Server

_log = logging.getLogger(__name__)
_FOREVER = datetime.timedelta(days=3650)
_LATE = 30.0  # seconds until a rank that waits for the others says so
_PATIENCE = 5.0  # seconds for the other ranks to say goodbye

# ---- meeting -------------------------------------------------------------------------------------


def group_of(group: Any, device: torch.device, split: str | int | None = None) -> Group | None:
    """The group given, or that of the launcher that started this script, open, with this process on
    that device; None: there is neither. All processes have to call it, and wait for each other.
    `split`: as `parallelize` has it; None is "none".
    """
    if hasattr(group, "Get_rank") and hasattr(group, "Dup"):
        return _meet(_mpi_group, group, device, split)
    if group is not None:
        return _meet(_torch_group, group, device, split)
    if torch.distributed.is_available() and _in_torch_group():
        return _meet(_torch_group, None, device, split)
    if "mpi4py.MPI" in sys.modules or _by_mpirun():
        try:
            from mpi4py import MPI
        except ImportError:
            return None
        world = MPI.COMM_WORLD
        return _meet(_mpi_group, world, device, split) if world.Get_size() > 1 else None
    return None


def _meet(
    make: Callable[[Any], Group], group: Any, device: torch.device, split: str | int | None
) -> Group:
    """In a thread: who waits for other ranks in C++ or in MPI does not hear Ctrl-C."""
    outcome: queue.SimpleQueue[Group | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            made = make(group)
            made.open(device, split)
            outcome.put(made)
        except BaseException as error:
            outcome.put(error)

    threading.Thread(target=work, name="parastep-meet", daemon=True).start()
    try:
        met = outcome.get(timeout=_LATE)
    except queue.Empty:
        _log.warning("waiting for the other ranks: each rank of the group has to call parallelize")
        met = outcome.get()
    if isinstance(met, Group):
        return met
    if isinstance(met, _core.Error):
        raise met
    words = f"the other ranks of the group cannot be reached: {describe(met)}"
    raise _core.LostError(words) from met


def _in_torch_group() -> bool:
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size() > 1
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return launched and int(os.environ["WORLD_SIZE"]) > 1


def _by_mpirun() -> bool:
    sizes = (os.environ.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    return any(size.isdigit() and int(size) > 1 for size in sizes)


def _torch_group(group: Any) -> Group:
    dist = torch.distributed
    if group is not None and not (dist.is_available() and dist.is_initialized()):
        raise _core.InvalidError(f"group: {type(group).__name__} is not a process group")
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    try:
        ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    except Exception as error:
        raise _core.InvalidError(f"group: not a process group: {describe(error)}") from error
    if dist.get_rank() not in ranks:
        raise _core.InvalidError("group: this process is not in it")
    own = dist.new_group(ranks, _FOREVER, backend="gloo", use_local_synchronization=True)
    rank = ranks.index(dist.get_rank())
    return Group(rank, len(ranks), lambda peer, channel: TorchStream(own, peer, channel))


def _mpi_group(comm: Any) -> Group:
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise _core.UnsupportedError(
            "group: this MPI was initialised without threads; MPI_THREAD_MULTIPLE is needed"
        )
    own, rank, size = comm.Dup(), comm.Get_rank(), comm.Get_size()
    return Group(rank, size, lambda peer, channel: MpiStream(own, peer, channel))


# ---- the group -----------------------------------------------------------------------------------


class Group:
    """This process's part in the group, for one parallel pipeline; made in all processes at once.
    `connect` gives the stream to another one, on a channel that both have. `shares`: the processes
    of each rank, its head first, None where that is chosen call by call.
    """

    def __init__(self, rank: int, size: int, connect: Callable[[int, int], Stream]) -> None:
        self.rank, self.size = rank, size
        self.shares: list[tuple[int, ...]] | None = [(k,) for k in range(size)]
        self._connect = connect
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

    def open(self, device: torch.device, split: str | int | None = None) -> None:
        """Greets the others and begins to listen."""
        teams = teams_of(self.size, split)
        own = {"version": __version__, "boot": _boot(), "device": str(device), "teams": teams}
        if self.rank == 0:
            devices = self._greet_all(own)
        else:
            devices = self._follow_from(device, own)
        self._devices = [torch.device(each) for each in devices]
        self.shares = None if split == "auto" else [tuple(team) for team in teams]
        team = next((team for team in teams if self.rank in team), [self.rank])
        if team[0] == self.rank:
            for place in team[1:]:
                stream = self._connect(place, CHANNEL)
                member = Member(stream, place, self.where(place))
                self._members[place] = member
                self._ends.append(member)
        else:
            self._head = Head(self._connect(team[0], CHANNEL), self._jobs)
            self._ends.append(self._head)

    def _greet_all(self, own: dict[str, Any]) -> list[str]:
        """The others speak first: a send may wait for its receive. All of them hear the same."""
        streams = {peer: self._connect(peer, 0) for peer in range(1, self.size)}
        told = {peer: _hear(stream) for peer, stream in streams.items()}
        devices = [own["device"], *(told[peer].get("device", "cpu") for peer in streams)]
        refusals = (_why_unlike(own, told[peer]) for peer in streams)
        refusal = next((why for why in refusals if why is not None), None)
        for stream in streams.values():
            _say(stream, {**own, "devices": devices, "refusal": refusal})
        if refusal is not None:
            raise _core.ProtocolError(refusal)
        for peer, stream in streams.items():
            same_clock = bool(own["boot"]) and told[peer].get("boot") == own["boot"]
            self._links[peer] = Link(stream, f"parastep-rank-{peer}", same_clock)
            self._ends.append(self._links[peer])
        return devices

    def _follow_from(self, device: torch.device, own: dict[str, Any]) -> list[str]:
        stream, jobs = self._connect(0, 0), self._jobs
        _say(stream, own)
        told = _hear(stream)
        refusal = told.get("refusal") or _why_unlike(own, told)
        if refusal is not None:
            raise _core.ProtocolError(refusal)
        self._follower = Server(stream, self.rank, device, jobs.put, jobs.put, jobs.put)
        self._ends.append(self._follower)
        devices: list[str] = told["devices"]
        return devices

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
        helpers = [self.helper(place, self._cuts) for place in self._helping]
        self._follower.serve(call, self._replica, helpers, self._cuts, self.where(self.rank))
        for helper in helpers:
            if helper.lost is not None:
                self._cuts.drop(helper.place)

    def _help(self, asked: Frame, pipe: Any) -> None:
        """Serves its head through one call, unless that is over here."""
        assert self._follower is not None and self._head is not None
        if asked.call != self._number:
            self._head.leave(asked, self._made)
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
            self._replica = replicate(pipe, self._follower.device)
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


def teams_of(size: int, split: str | int | None) -> list[list[int]]:
    """The processes of each rank, its head first; by "auto" those that may be one."""
    each = split if isinstance(split, int) else 2 if split == "auto" else 1
    if isinstance(split, int) and size % split:
        raise _core.InvalidError(
            f"split={split}: {size} processes are no whole number of teams of {split}"
        )
    return [list(range(k, min(k + each, size))) for k in range(0, size, each)]


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


def _why_unlike(own: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Why two processes, by what they say of themselves, cannot be of one group, or None."""
    if other.get("version") != own["version"]:
        return (
            f"one process of the group has parastep {own['version']}, another one "
            f"{other.get('version')}: all must have the same"
        )
    if other.get("teams") != own["teams"]:
        return "the processes of the group do not agree on split: all must say the same"
    return None


def _boot() -> str:
    """The same for two processes that read one monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
