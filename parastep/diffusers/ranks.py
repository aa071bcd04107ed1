"""Where a pipeline's ranks are: threads with replicas here, workers of ours, or a process group.

Made once for a parallel pipeline from what the user wrote; before every call it brings the replicas
up to date, and gives the call its followers, or the reason why there are none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from .. import _core
from ..messages import describe
from ..options import Options
from .batching import Meeting
from .call import Call, Followers, Given
from .local import LocalFollowers
from .remote.groups import Group, group_of
from .remote.workers import Workers
from .replicas import (
    denoisers_of,
    fingerprint,
    refresh,
    replicate,
    split_over_processes,
    unfit,
)
from .state import State

_log = logging.getLogger(__name__)


class Ranks:
    """`devices`: one a rank, the leader's first. `remote`: where the others are, if not in threads;
    `batch`: they share one forward; `auto`: threads take the place of workers that cannot be.
    """

    def __init__(
        self,
        devices: list[torch.device],
        remote: Workers | Group | None = None,
        batch: bool = False,
        auto: bool = False,
    ) -> None:
        self.devices = devices
        self.group = remote if isinstance(remote, Group) else None
        self._remote, self._auto = remote, auto
        self._batch = batch and len(devices) > 1
        self._replicas: dict[int, Any] = {}
        self._made_from: int | None = None
        self.state = State()

    def __reduce__(self) -> Any:
        """A copy has what the user wrote, and nothing of what was made by it."""
        if self.group is not None:
            raise _core.UnsupportedError(
                "a pipeline of a process group cannot be copied or pickled, since its ranks would "
                "have to meet again: take `.pipe`, and have every rank call parallelize"
            )
        workers = isinstance(self._remote, Workers)
        return _ranks_at, (self.devices, workers, self._batch, self._auto)

    def close(self) -> None:
        """Lets the replicas go, and ends the workers; twice is fine."""
        self._replicas.clear()
        if self._remote is not None:
            self._remote.close()

    def leader_alone(self, options: Options) -> bool:
        """Whether nobody would evaluate ahead in any call."""
        return options.untouched or (len(self.devices) == 1 and not options.strides)

    def call(
        self, pipe: Any, given: Given, options: Options, reason: str | None = None
    ) -> tuple[Call, list[Followers], str | None]:
        """A call and its followers; or one of the leader alone, and the reason why, which may be
        known before.
        """
        if self.leader_alone(options):
            return Call(1), [], None
        reason = reason or unfit(pipe)
        if reason is None:
            reason = self.state.known(pipe)
            if reason is not None:
                self._replicas.clear()  # nobody will need them, and they hold memory
        if reason is not None:
            return Call(1), [], reason
        try:
            self._refresh_remote(pipe)
            self._refresh(pipe, options.strides)
        except Exception as error:  # a component that cannot be copied
            reason = f"replicas of the pipeline cannot be made: {describe(error)}"
            if isinstance(self._remote, Workers) and "mode='threads'" not in reason:
                reason += "; mode='threads' needs no other processes"
            return Call(1), [], reason
        call = Call(len(self.devices), self.devices, lane=options.strides)
        if self._batch:
            call.meeting = Meeting(call.ranks, leads=not options.exact)
        try:
            return call, self._followers(call, pipe, given), None
        except Exception as error:
            reason = f"the arguments cannot be sent to other processes: {describe(error)}"
        if self._goes_on_in_threads(reason):
            return self.call(pipe, given, options)
        return Call(1), [], reason

    def _followers(self, call: Call, pipe: Any, given: Given) -> list[Followers]:
        found: list[Followers] = []
        if self._remote is not None and call.ranks > 1:
            found.append(self._remote.followers(call, pipe, given))
        if self._replicas:
            found.append(LocalFollowers(call, self._replicas, given))
        return found

    def _refresh_remote(self, pipe: Any) -> None:
        """The replicas in other processes."""
        try:
            if self._remote is not None:
                self._remote.refresh(pipe)
        except Exception as error:
            if not self._goes_on_in_threads(describe(error)):
                raise

    def _goes_on_in_threads(self, why: str) -> bool:
        """Whether ranks may be threads in place of workers; from here on they are."""
        if self._auto and self._remote is not None:
            _log.warning("ranks are threads, not processes: %s", why)
            self._remote.close()
            self._remote = None
            return True
        return False

    def _refresh(self, pipe: Any, lane: bool) -> None:
        """Replicas of the pipe as it is now: made again where its weights or modules changed."""
        now = fingerprint(pipe)
        if now != self._made_from:
            self._replicas.clear()
            self._made_from = now
        for rank, device in enumerate(self.devices):
            here = lane if rank == 0 else self._remote is None
            if here and rank not in self._replicas:
                self._replicas[rank] = replicate(pipe, device)
        for replica in self._replicas.values():
            refresh(replica, pipe)


# ---- what the user wrote -------------------------------------------------------------------------


def ranks_of(
    pipe: Any,
    devices: Sequence[str | torch.device] | None,
    mode: str,
    group: Any,
    slots: str,
) -> Ranks:
    """Ranks by `parallelize`'s arguments; raises what that raises."""
    if mode not in ("auto", "threads", "processes"):
        raise _core.InvalidError(f"mode: {mode!r}: must be 'auto', 'threads' or 'processes'")
    if group is not None and (devices is not None or mode == "threads"):
        raise _core.InvalidError("group: its processes are the ranks: leave out devices and mode")
    if slots not in ("auto", "batch"):
        raise _core.InvalidError(f"slots: {slots!r}: must be 'auto' or 'batch'")
    if slots == "batch" and (group is not None or devices is None or mode == "processes"):
        raise _core.InvalidError(
            "slots='batch': give devices, one device as often as a batch has steps, as "
            "['cuda:0'] * 4, without group and mode"
        )
    home = _home_of(pipe)
    if devices is None and mode != "threads":
        found = group_of(group, home)
        if found is not None:
            return _of_group(pipe, found, home)
    places = _devices_of(home, devices)
    batch = slots == "batch"
    if batch and len(set(places)) > 1:
        named = ", ".join(dict.fromkeys(map(str, places)))
        raise _core.UnsupportedError(
            f"slots='batch': {named}: a batch is of one device, repeated; without slots each rank "
            "evaluates a step of its own"
        )
    return _ranks_at(places, by_workers(mode, places), batch, mode == "auto")


def _ranks_at(places: list[torch.device], workers: bool, batch: bool, auto: bool) -> Ranks:
    return Ranks(places, Workers(places) if workers else None, batch, auto)


def _of_group(pipe: Any, group: Group, home: torch.device) -> Ranks:
    try:
        refuse_split(pipe)
    except _core.Error:
        group.close()
        raise
    return Ranks([home] * group.size, group)


def refuse_split(pipe: Any) -> None:
    """A group whose processes share each forward of a denoiser cannot have them as ranks as well:
    they would wait for each other.
    """
    name = split_over_processes(pipe)
    if name is not None:
        raise _core.UnsupportedError(
            f"{name} is split over processes (enable_parallelism) that are to be ranks of a group "
            "here: they would wait for each other; leave out one of the two"
        )


def by_workers(mode: str, places: list[torch.device]) -> bool:
    """Whether followers are processes; "auto" has them where each rank has a device of its own."""
    if mode != "auto":
        return mode == "processes"
    return places[0].type == "cuda" and 1 < len(places) == len(set(places))


def _devices_of(
    home: torch.device, devices: Sequence[str | torch.device] | None
) -> list[torch.device]:
    if devices is None:
        kind = getattr(torch, home.type, None)
        count = kind.device_count() if kind is not None and hasattr(kind, "device_count") else 1
        own = home.index or 0
        order = [own, *(k for k in range(count) if k != own)]
        devices = [torch.device(home.type, k) if count > 1 else home for k in order]
    if isinstance(devices, (str, torch.device)) or not 0 < len(devices) <= 256:
        raise _core.InvalidError(f"devices: {devices!r}: a list is needed, as ['cuda:0', 'cuda:1']")
    try:
        found = [torch.device(device) for device in devices]
    except (RuntimeError, TypeError) as error:
        raise _core.DeviceError(f"devices: {devices!r}: {describe(error)}") from error
    if found[0].type != home.type or (found[0].index or 0) != (home.index or 0):
        raise _core.DeviceError(f"devices: the first is {found[0]}, but the pipe is on {home}")
    if any(device.type not in ("cpu", "cuda") for device in found):
        raise _core.UnsupportedError("devices: only CPU and CUDA devices so far")
    if any(device.type != home.type for device in found):
        raise _core.DeviceError(f"devices: {devices!r}: all CPU, or all CUDA devices, are needed")
    return [device if device.type == "cpu" else _numbered(device) for device in found]


def _numbered(device: torch.device) -> torch.device:
    """With its index: that of the current one where none was given."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def _home_of(pipe: Any) -> torch.device:
    """Where its denoisers' weights are; a module of the user's own need not tell its device."""
    modules = denoisers_of(pipe).values()
    return next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))
