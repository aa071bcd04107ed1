"""Ranks of a process group: the same script on every rank, started by torchrun, Slurm or MPI.

Rank 0 leads. Its call of the pipeline is everybody's: the others follow it with their own replica
and return, or raise, what it returned or raised. Frames travel by torch.distributed's send and
receive (gloo) or by mpi4py's.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ... import _core
from ..._version import __version__
from ...messages import describe
from ...processes.frames import Frame, Kind, Stream, read_frame, write_frame
from ...processes.streams import MpiStream, TorchStream
from ...report import Report
from ..call import Call
from ..replicas import fingerprint, refresh, replicate
from .link import Link, RemoteFollowers
from .packing import pack, unpack
from .serving import RemoteCall, Server

_log = logging.getLogger(__name__)
_FOREVER = datetime.timedelta(days=3650)
_LATE = 30.0  # seconds until a rank that waits for the others says so
_PATIENCE = 5.0  # seconds for the other ranks to say goodbye

# ---- meeting -------------------------------------------------------------------------------------


def group_of(group: Any, device: torch.device) -> Group | None:
    """The group given, or that of the launcher that started this script, open, with this rank on
    that device; None: there is neither. All ranks have to call it, and wait for each other.
    """
    if hasattr(group, "Get_rank") and hasattr(group, "Dup"):
        return _meet(_mpi_group, group, device)
    if group is not None:
        return _meet(_torch_group, group, device)
    if torch.distributed.is_available() and _in_torch_group():
        return _meet(_torch_group, None, device)
    if "mpi4py.MPI" in sys.modules or _by_mpirun():
        try:
            from mpi4py import MPI
        except ImportError:
            return None
        world = MPI.COMM_WORLD
        return _meet(_mpi_group, world, device) if world.Get_size() > 1 else None
    return None


def _meet(make: Callable[[Any], Group], group: Any, device: torch.device) -> Group:
    """In a thread: who waits for other ranks in C++ or in MPI does not hear Ctrl-C."""
    outcome: queue.SimpleQueue[Group | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            made = make(group)
            made.open(device)
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
    rank, others = ranks.index(dist.get_rank()), _others(ranks.index(dist.get_rank()), len(ranks))
    return Group(rank, len(ranks), {peer: TorchStream(own, peer) for peer in others})


def _mpi_group(comm: Any) -> Group:
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise _core.UnsupportedError(
            "group: this MPI was initialised without threads; MPI_THREAD_MULTIPLE is needed"
        )
    own, rank, size = comm.Dup(), comm.Get_rank(), comm.Get_size()
    return Group(rank, size, {peer: MpiStream(own, peer) for peer in _others(rank, size)})


def _others(rank: int, size: int) -> range:
    """Whom a rank talks to: the leader to all, the others to the leader."""
    return range(1, size) if rank == 0 else range(1)


# ---- the group -----------------------------------------------------------------------------------


class Group:
    """This process's part in the group, for one parallel pipeline; made on all ranks at once."""

    def __init__(self, rank: int, size: int, streams: dict[int, Stream]) -> None:
        self.rank, self.size = rank, size
        self._streams = streams
        self._process = os.getpid()
        self._calls = itertools.count(1)
        self._number = 0  # of the call that this rank is in
        self._links: dict[int, Link] = {}
        self._follower: Server | None = None
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()  # calls, results, and the end
        self._replica: Any = None
        self._made_from: int | None = None
        self._ends: list[Link | Server] = []
        self._close = weakref.finalize(self, _close_all, self._ends, os.getpid())

    def open(self, device: torch.device) -> None:
        """Greets the others and begins to listen."""
        for peer, stream in self._streams.items():
            same_clock = _greet(stream, leads=self.rank == 0)
            if self.rank == 0:
                self._links[peer] = Link(stream, f"parastep-rank-{peer}", same_clock)
                self._ends.append(self._links[peer])
            else:
                jobs = self._jobs
                follower = Server(stream, self.rank, device, jobs, jobs.put, jobs.put)
                self._follower = follower
                self._ends.append(follower)

    def close(self) -> None:
        self._close()

    def _next_call(self) -> int:
        if os.getpid() != self._process:
            raise _core.StateError(
                "this process was forked from a rank of the group, which alone can use the group; "
                "call the pipeline itself here"
            )
        return next(self._calls)

    # The leader.

    def refresh(self, pipe: Any, places: Any) -> None:
        """Nothing to be made: every rank has a pipeline of its own."""

    def followers(
        self, call: Call, pipe: Any, given: Any, shares: Any, options: Any
    ) -> RemoteFollowers:
        """Each has one device."""
        return RemoteFollowers(self._links, self._number, call, pipe, given, self.drop)

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
        self._number = self._next_call()
        while True:
            job = self._jobs.get()
            if isinstance(job, str):
                self._jobs.put(job)  # for the calls after this one
                raise _core.LostError(f"the leader's process cannot be reached: {job}")
            if isinstance(job, RemoteCall) and job.number == self._number:
                self._serve(job, pipe)
            elif isinstance(job, Frame) and (job.kind, job.call) == (Kind.RESULT, self._number):
                return self._result(job.body)

    def _serve(self, call: RemoteCall, pipe: Any) -> None:
        assert self._follower is not None
        try:
            now = fingerprint(pipe)
            if now != self._made_from:
                self._replica = replicate(pipe, self._follower.device)
                self._made_from = now
            refresh(self._replica, pipe)
        except Exception as error:
            self._replica = None
            call.fail(self.rank, f"its replica cannot be made: {describe(error)}")
        self._follower.serve(call, self._replica)

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


def _close_all(ends: list[Link | Server], process: int) -> None:
    """Says goodbye to all at once, so that one who is busy is waited for only once."""
    if os.getpid() == process:
        closing = [threading.Thread(target=end.close, args=(_PATIENCE,)) for end in ends]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
    ends.clear()


def _greet(stream: Stream, leads: bool) -> bool:
    """Whether the other process reads the same clock. The follower speaks first: a send may wait
    for its receive.
    """
    own = {"version": __version__, "boot": _boot()}
    hello = Frame(Kind.HELLO, 0, json.dumps(own).encode())
    if not leads:
        write_frame(stream, hello)
    frame = read_frame(stream)
    if leads:
        write_frame(stream, hello)
    other = json.loads(frame.body) if frame.kind == Kind.HELLO else {}
    if other.get("version") != __version__:
        raise _core.ProtocolError(
            f"this rank has parastep {__version__}, another one {other.get('version')}: "
            "all must have the same"
        )
    return bool(own["boot"]) and other.get("boot") == own["boot"]


def _boot() -> str:
    """The same for two processes that read one monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
