"""Replicas of a pipeline, one a follower, and what of a pipeline is denoiser and what encoder.

A replica has a module tree and a scheduler of its own; parameters are shared where the device is
the same and copied where it is not. It is made before any hook is placed, since a deep copy of a
hooked module would keep the original's closure.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

_DENOISER = re.compile(
    r"^(unet|transformer|controlnet|prior|denoiser|dit|unconditional_transformer)"
)
_ENCODER = re.compile(
    r"(encoder|vae|vocoder|safety|language_model|projection|movq|vq|vision|clip|tokenizer|watermark)"
)


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The pipeline's components that are modules, by name."""
    return {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}


def denoisers_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The modules that its loop calls: by their usual names, else all that are not encoders."""
    modules = modules_of(pipe)
    found = {name: module for name, module in modules.items() if _DENOISER.match(name)}
    return found or {name: m for name, m in modules.items() if not _ENCODER.search(name)}


def encoders_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Its other modules: a follower takes their outputs from the leader."""
    denoisers = denoisers_of(pipe)
    return {name: module for name, module in modules_of(pipe).items() if name not in denoisers}


def offloaded(pipe: Any) -> str | None:
    """Why replicas cannot be made: hooks that move weights between devices, or None."""
    for name, module in modules_of(pipe).items():
        if getattr(module, "_hf_hook", None) is not None:
            return f"{name} has an offload hook of accelerate, which moves its weights in mid-run"
    if getattr(pipe, "_all_hooks", None):
        return "the pipeline has CPU offload enabled, which moves its weights in mid-run"
    return None


def _share(pipe: Any, device: torch.device, memo: dict[int, Any]) -> None:
    """Parameters and buffers of the copy: the same ones on the same device, else moved ones."""
    moved = denoisers_of(pipe)
    for name, module in modules_of(pipe).items():
        for tensor in (*module.parameters(), *module.buffers()):
            near = name not in moved or tensor.device == device
            memo[id(tensor)] = tensor if near else _moved(tensor, device)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    copied = tensor.detach().to(device)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return copied


def replicate(pipe: Any, device: torch.device) -> Any:
    """A pipeline of the same class with its own modules and scheduler, for a follower."""
    memo: dict[int, Any] = {}
    _share(pipe, device, memo)
    replica = copy.deepcopy(pipe, memo)
    replica.set_progress_bar_config(disable=True)
    home = pipe._execution_device if hasattr(pipe, "_execution_device") else pipe.device
    if device != home:
        # Its encoders stay where the leader's are, so it cannot tell its own device from them.
        here = {name: property(lambda self: device) for name in ("_execution_device", "device")}
        replica.__class__ = type(type(pipe).__name__, (type(pipe),), here)
    return replica


def _plain(value: Any, depth: int = 2) -> Any:
    """A value as something to compare later: numbers and names by value, the rest by id."""
    if isinstance(value, (int, float, str, bool, torch.dtype, torch.device, type(None))):
        return value
    if isinstance(value, torch.Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if depth and isinstance(value, (list, tuple)):
        return tuple(_plain(item, depth - 1) for item in value)
    if depth and isinstance(value, dict):
        return tuple((str(k), _plain(v, depth - 1)) for k, v in value.items())
    return id(value)


def fingerprint(pipe: Any) -> int:
    """Changes when what a replica was made from changes: modules, weights, processors, adapters."""
    seen: list[Any] = [type(pipe)]
    for name, module in modules_of(pipe).items():
        for part in module.modules():
            seen.append((name, id(part), type(part)))
            for key, value in vars(part).items():
                if key == "processor":  # attention processors hold scales and sometimes weights
                    seen.append((id(value), _plain(getattr(value, "__dict__", None))))
                elif key not in ("forward", "_modules"):
                    seen.append((key, _plain(value)))
    return hash(tuple(seen))
