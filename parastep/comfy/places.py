"""ComfyUI: the devices that a user wrote on the node, as torch devices, the model's own first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _core


def devices_of(model: Any, devices: str | Sequence[str | torch.device]) -> list[torch.device]:
    """Torch devices of what the user wrote, the model's own first."""
    from comfy import model_management

    home = model.load_device
    if isinstance(devices, str) and devices.strip().lower() == "auto":
        others: list[Any] = [model_management.get_torch_device()]
        if hasattr(model_management, "get_all_torch_devices"):
            others = model_management.get_all_torch_devices()
        elif home.type == "cuda":
            others = [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
        return [home, *(_numbered(o) for o in others if _indexed(o) != _indexed(home))]
    names = devices.replace(",", " ").split() if isinstance(devices, str) else list(devices)
    if not 0 < len(names) <= 256:
        raise _core.InvalidError(f"devices: {devices!r}: write 'auto', or as 'cuda:0, cuda:1'")
    found = [_device(name, home) for name in names]
    if _indexed(found[0]) != _indexed(home):
        raise _core.DeviceError(
            f"devices: the first is {found[0]}, but the model is on {home}: begin with that one"
        )
    for device in found:
        if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
            there = ", ".join(f"cuda:{k}" for k in range(count)) or "no CUDA device"
            raise _core.DeviceError(f"devices: there is no {device}: PyTorch sees {there}")
    return [home if _indexed(device) == _indexed(home) else _numbered(device) for device in found]


def _device(name: str | torch.device, home: torch.device) -> torch.device:
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
