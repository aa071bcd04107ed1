"""ComfyUI: the devices that a user wrote on the node, as torch devices, the model's own first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from .. import _core

Place: TypeAlias = str | torch.device  # as a user names one
Team: TypeAlias = tuple[torch.device, ...]  # the devices of one rank, its head first


class Places(NamedTuple):
    """`teams`: of each rank its devices, as they were written; `auto`: each device of all that
    there are, of which pairs are to be made where they have something to share.
    """

    teams: list[Team]
    auto: bool = False

    @property
    def devices(self) -> list[torch.device]:
        """All, the model's own first."""
        return [device for team in self.teams for device in team]

    @property
    def ranks(self) -> int:
        return len(self.teams)

    @property
    def may_share(self) -> bool:
        """Whether ranks may be of several devices."""
        return any(len(team) > 1 for team in self.teams) or (self.auto and len(self.teams) > 1)

    def with_devices(self, found: Sequence[torch.device]) -> Places:
        """With these alone."""
        teams = [tuple(device for device in team if device in found) for team in self.teams]
        return self._replace(teams=[team for team in teams if team])

    def shared_out(self, room: Sequence[torch.device], share: bool) -> tuple[list[Team], list[str]]:
        """The devices of each rank in a run, and what is said of those that have no part in it.

        `room`: those with room, one for each evaluation at a time; `share`: whether devices have
        something to share; otherwise each is a rank of its own.
        """
        if not (share and self.may_share):
            return [(device,) for device in room], []
        if self.auto:
            pairs = [tuple(room[k : k + 2]) for k in range(0, max(len(room) - 1, 1), 2)]
            idle = room[2 * len(pairs) :]
            return pairs, [f"{device} is idle: it has no partner" for device in idle]
        teams = self.with_devices(room).teams
        size = max(map(len, self.teams))  # some have lost a device that cannot have a replica
        whole = len(teams[0]) == size
        kept = [team for team in teams if len(team) == size or not whole]
        short = [device for team in teams if team not in kept for device in team]
        return kept, [f"{device} is left out: its partner is missing" for device in short]


def places_of(model: Any, devices: str | Sequence[Place | Sequence[Place]]) -> Places:
    """Of what the user wrote: devices, each a rank, or teams of them, as "cuda:0+cuda:1"."""
    home = model.load_device
    if isinstance(devices, str):
        if devices.strip().lower() == "auto":
            return Places([(device,) for device in _all_devices(home)], auto=True)
        devices = re.sub(r"\s*\+\s*", "+", devices).replace(",", " ").split()
    if not 0 < len(devices) <= 256:
        raise _core.InvalidError(
            f"devices: {devices!r}: write 'auto', or as 'cuda:0, cuda:1', or pairs as "
            "'cuda:0+cuda:1, cuda:2+cuda:3'"
        )
    teams = [tuple(_device(name, home) for name in _names(written)) for written in devices]
    _check(teams, home)
    return Places([tuple(_as_kept(device, home) for device in team) for team in teams])


def _names(written: Place | Sequence[Place]) -> Sequence[Place]:
    """Of one rank's devices."""
    names = written.split("+") if isinstance(written, str) else written
    names = names if isinstance(names, (list, tuple)) else [names]
    if not names or "" in names:
        raise _core.InvalidError(
            f"devices: {written!r}: there is no device on one side of +: write pairs as "
            "cuda:0+cuda:1, cuda:2+cuda:3"
        )
    return names


def _check(teams: Sequence[Team], home: torch.device) -> None:
    first = teams[0][0]
    if _indexed(first) != _indexed(home):
        raise _core.DeviceError(
            f"devices: the first is {first}, but the model is on {home}: begin with that one"
        )
    for device in (device for team in teams for device in team):
        if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
            there = ", ".join(f"cuda:{k}" for k in range(count)) or "no CUDA device"
            raise _core.DeviceError(f"devices: there is no {device}: PyTorch sees {there}")
    if all(len(team) == 1 for team in teams):
        return
    text = ", ".join("+".join(map(str, team)) for team in teams)
    if len({len(team) for team in teams}) > 1:
        raise _core.InvalidError(
            f"devices: {text}: ranks of different numbers of devices: write as many for each, as "
            "cuda:0+cuda:1, cuda:2+cuda:3, or all without +"
        )
    seen: set[tuple[str, int]] = set()
    for device in (device for team in teams for device in team):
        if _indexed(device) in seen:
            raise _core.DeviceError(
                f"devices: {text}: {device} is there twice: a device shares in one rank's work, "
                "so write each once"
            )
        seen.add(_indexed(device))
    mixed = next((team for team in teams if len({device.type for device in team}) > 1), None)
    if mixed is not None:
        raise _core.DeviceError(
            f"devices: {'+'.join(map(str, mixed))}: the slower one would be waited for in each "
            "step: write devices of one kind on both sides of +"
        )


def _all_devices(home: torch.device) -> list[torch.device]:
    """That the host sees, like ones beside each other."""
    from comfy import model_management

    others: list[Any] = [model_management.get_torch_device()]
    if hasattr(model_management, "get_all_torch_devices"):
        others = model_management.get_all_torch_devices()
    elif home.type == "cuda":
        others = [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
    found = [_numbered(other) for other in others if _indexed(other) != _indexed(home)]
    if home.type == "cuda" and len(found) > 1:
        names = {d: torch.cuda.get_device_name(d) for d in (home, *found) if d.type == "cuda"}
        own = names[home]
        found.sort(key=lambda device: (names.get(device) != own, names.get(device, "")))
    return [home, *found]


def _as_kept(device: torch.device, home: torch.device) -> torch.device:
    return home if _indexed(device) == _indexed(home) else _numbered(device)


def _device(name: Place, home: torch.device) -> torch.device:
    """Raises DeviceError where it is none, with what to write instead."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        word = str(name).lower()
    if word == "auto":
        instead = "write auto alone, for all devices that ComfyUI sees"
    elif word.isdecimal():
        kind = "cuda" if home.type == "cpu" else home.type
        instead = f"write {kind}:{word}"
    elif _is_device(word):
        instead = f"write {word}"
    else:
        instead = "write auto, or a list as cuda:0, cuda:1"
    raise _core.DeviceError(f"devices: {str(name)!r} is no device: {instead}")


def _is_device(name: str) -> bool:
    try:
        return torch.device(name) is not None
    except RuntimeError:
        return False


def _numbered(device: torch.device) -> torch.device:
    """With its index, which tensors there will have: the first, where none was given."""
    return torch.device(device.type, device.index or 0) if device.type == "cuda" else device


def _indexed(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0
