"""Where ranks are to be, by what the user wrote: devices, mode, group and slots, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from .. import _core
from ..messages import describe
from .context import context_of
from .offload import home_of
from .parts import denoisers_of
from .ranks import Ranks, Shares, ranks_at, shares_of
from .remote.meeting import group_of

Place: TypeAlias = str | torch.device  # as a user names one


def ranks_of(
    pipe: Any,
    devices: Sequence[Place | tuple[Place, ...]] | None,
    split: str | int | None,
    mode: str,
    group: Any,
    slots: str,
) -> Ranks:
    """Ranks by `parallelize`'s arguments; raises what that raises."""
    if split not in (None, "auto", "none") and not (type(split) is int and split > 0):
        raise _core.InvalidError(f"split: {split!r}: must be 'auto', 'none' or a team's size")
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
        context = context_of(pipe)
        if context is not None and isinstance(split, int):
            raise _core.InvalidError(
                f"split={split}: {context.names[0]} is split over processes already "
                "(enable_parallelism), which are a rank each time: leave out split"
            )
        found = group_of(group, home, split, context)
        if found is not None:
            return Ranks([home] * found.size, found, shares=found.shares)
    places, shares = _shared_out(home, devices, split)
    batch = slots == "batch"
    if batch and len(set(places)) > 1:
        named = ", ".join(dict.fromkeys(map(str, places)))
        raise _core.UnsupportedError(
            f"slots='batch': {named}: a batch is of one device, repeated; without slots each rank "
            "evaluates a step of its own"
        )
    helped = any(len(share) > 1 for share in shares or ((0, 1),) * (len(places) > 1))
    if helped and batch:
        raise _core.UnsupportedError(
            "slots='batch': ranks that share a batch are of one device and have no helpers: leave "
            "out split, and tuples in devices"
        )
    return ranks_at(places, by_workers(mode, places), batch, mode == "auto", shares)


def by_workers(mode: str, places: list[torch.device]) -> bool:
    """Whether followers are processes; "auto" has them where each rank has a device of its own."""
    if mode != "auto":
        return mode == "processes"
    return places[0].type == "cuda" and 1 < len(places) == len(set(places))


def _shared_out(
    home: torch.device,
    devices: Sequence[Place | tuple[Place, ...]] | None,
    split: str | int | None,
) -> tuple[list[torch.device], Shares | None]:
    """All devices, and which of them each rank has; None where that is chosen call by call."""
    teams = [d for d in devices or () if isinstance(d, (tuple, list))]
    if devices is None or isinstance(devices, (str, torch.device)) or not teams:
        places = _devices_of(home, devices)
        if split == "auto" or (split is None and devices is None):
            return places, None
        size = split if isinstance(split, int) else 1
        if len(places) % size:
            raise _core.InvalidError(
                f"split={size}: {len(places)} devices are no whole number of teams of {size}"
            )
        return places, shares_of(len(places), size)
    if split not in (None, "none", "auto"):
        raise _core.InvalidError(f"split={split!r}: devices are teams already: leave out split")
    grouped = [d if isinstance(d, (tuple, list)) else (d,) for d in devices]
    if not all(grouped):
        raise _core.InvalidError(f"devices: {devices!r}: a rank without a device")
    places = _devices_of(home, [device for team in grouped for device in team])
    numbers = iter(range(len(places)))
    return places, [tuple(next(numbers) for _ in team) for team in grouped]


def _devices_of(home: torch.device, devices: Sequence[Place] | None) -> list[torch.device]:
    if devices is None:
        kind = getattr(torch, home.type, None)
        count = kind.device_count() if kind is not None and hasattr(kind, "device_count") else 1
        own = home.index or 0
        order = [own, *(k for k in range(count) if k != own)]
        if home.type == "cuda":  # like with like: teams are made of neighbours
            names = {k: torch.cuda.get_device_name(k) for k in order}
            order.sort(key=lambda k: (names[k] != names[own], names[k] if k != own else ""))
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
    """Where its denoisers run; a module of the user's own need not tell its device."""
    homes = map(home_of, denoisers_of(pipe).values())
    return next((home for home in homes if home is not None), torch.device("cpu"))
