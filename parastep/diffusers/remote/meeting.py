"""How the processes of a group find each other: torch.distributed or MPI, the group given, or that
of the launcher that started the script.
"""

from __future__ import annotations

import datetime
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from ... import _core
from ...messages import describe
from ...processes.streams import MpiStream, TorchStream
from ..context import Context
from .groups import Group

_log = logging.getLogger(__name__)
_FOREVER = datetime.timedelta(days=3650)
_LATE = 30.0  # seconds until a process that waits for the others says so


def group_of(
    group: Any,
    device: torch.device,
    split: str | int | None = None,
    context: Context | None = None,
) -> Group | None:
    """The group given, or that of the launcher that started this script, open, with this process on
    that device; None: there is neither. All processes have to call it, and wait for each other.
    `split`: as `parallelize` has it, None is "none"; `context`: what the pipe's denoisers are.
    """
    if hasattr(group, "Get_rank") and hasattr(group, "Dup"):
        return _meet(_mpi_group, group, device, split, context)
    if group is not None:
        return _meet(_torch_group, group, device, split, context)
    if torch.distributed.is_available() and _in_torch_group():
        return _meet(_torch_group, None, device, split, context)
    if "mpi4py.MPI" in sys.modules or _by_mpirun():
        try:
            from mpi4py import MPI
        except ImportError:
            return None
        world = MPI.COMM_WORLD
        return _meet(_mpi_group, world, device, split, context) if world.Get_size() > 1 else None
    return None


def _meet(
    make: Callable[[Any], Group],
    group: Any,
    device: torch.device,
    split: str | int | None,
    context: Context | None,
) -> Group:
    """In a thread: who waits for other ranks in C++ or in MPI does not hear Ctrl-C."""
    outcome: queue.SimpleQueue[Group | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            made = make(group)
            made.open(device, split, context)
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
    return Group(rank, len(ranks), lambda peer, channel: TorchStream(own, peer, channel), ranks)


def _mpi_group(comm: Any) -> Group:
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise _core.UnsupportedError(
            "group: this MPI was initialised without threads; MPI_THREAD_MULTIPLE is needed"
        )
    own, rank, size = comm.Dup(), comm.Get_rank(), comm.Get_size()
    return Group(rank, size, lambda peer, channel: MpiStream(own, peer, channel))
