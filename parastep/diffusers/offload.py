"""Hooks of accelerate on a pipeline's modules, which bring weights to where they are needed.

Model offload moves whole modules between calls of theirs, and a device map that has a module on one
device moves its inputs alone: while the loop runs the denoisers stay where they are. The leader
keeps such hooks; its replicas hold their weights and have none. What moves parts within a forward
cannot be carried.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch

from .parts import denoisers_of

_OWN = ("_hf_hook", "_old_forward")
_REFUSING = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")  # methods that a map warns in


def _hooks_of(part: torch.nn.Module) -> Iterator[Any]:
    found = getattr(part, "_hf_hook", None)
    yield from getattr(found, "hooks", [found] if found is not None else [])


def _is_offloaded(hook: Any) -> bool:
    """Whether it is model offload's."""
    return type(hook).__name__ == "CpuOffload"


def moves_within(pipe: Any) -> str | None:
    """Why its denoisers' weights do not stay in one place while the loop runs, or None."""
    for name, module in denoisers_of(pipe).items():
        places = set()
        for part in module.modules():
            for hook in _hooks_of(part):
                if _is_offloaded(hook) and part is module:
                    continue
                if type(hook).__name__ != "AlignDevicesHook":
                    return f"{name} has hooks of accelerate: {type(hook).__name__}"
                if hook.offload:
                    return (
                        f"{name} has hooks of accelerate that move weights within its forward: "
                        "sequential offload, or a device map with parts on the CPU or on disk"
                    )
                places.add(str(hook.execution_device))
        if len(places) > 1:
            return f"{name} is spread over {', '.join(sorted(places))} by its device map"
    return None


def home_of(module: torch.nn.Module) -> torch.device | None:
    """Where it runs: its weights may be elsewhere between calls. None where it has none."""
    hooks = (hook for part in module.modules() for hook in _hooks_of(part))
    told = (getattr(hook, "execution_device", None) for hook in hooks)
    for device in told:
        if device is not None:
            return torch.device(device)
    return next((weight.device for weight in module.parameters()), None)


def is_offloaded(module: torch.nn.Module) -> bool:
    """Whether its weights are on their device in a call alone, each time at another address."""
    return any(map(_is_offloaded, _hooks_of(module)))


def take_turns(pipe: Any) -> bool:
    """Whether a denoiser leaves its device where another one is called, so that nobody beside the
    loop could use the weights there.
    """
    modules = list(denoisers_of(pipe).values())
    hooks = [hook for module in modules for hook in _hooks_of(module)]
    before = [getattr(hook, "prev_module_hook", None) for hook in hooks]
    return any(getattr(hook, "model", None) is module for hook in before for module in modules)


def set_by_hooks(part: torch.nn.Module) -> set[str]:
    """Attributes of a part that are a hook's, put on anew with every call."""
    own = vars(part)
    if "_hf_hook" not in own:
        return set()
    refusing = (name for name in _REFUSING if isinstance(own.get(name), types.FunctionType))
    return {"forward", *_OWN, *refusing}


def forward_of(part: torch.nn.Module) -> Any:
    """A forward of the user's own beneath the hooks, or None."""
    old = vars(part).get("_old_forward")
    return None if getattr(old, "__func__", None) is getattr(type(part), "forward", None) else old


def unhook(part: torch.nn.Module) -> None:
    """Takes the hooks off a copy, which began with the original's attributes."""
    own, forward = vars(part), forward_of(part)
    for name in set_by_hooks(part):
        own.pop(name, None)
    if isinstance(forward, types.MethodType):
        own["forward"] = types.MethodType(forward.__func__, part)
    elif forward is not None:
        own["forward"] = forward


def forget_hooks(pipe: Any, memo: dict[int, Any]) -> None:
    """Has a deep copy leave the hooks out, which hold other modules."""
    if getattr(pipe, "_all_hooks", None) is not None:
        memo[id(pipe._all_hooks)] = []
    for module in denoisers_of(pipe).values():
        for part in module.modules():
            if "_hf_hook" in vars(part):
                memo[id(part._hf_hook)] = None


def unhook_denoisers(replica: Any) -> None:
    for module in denoisers_of(replica).values():
        for part in module.modules():
            unhook(part)
