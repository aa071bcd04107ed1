"""Replicas of a pipeline, one a follower, and what they were made from.

A replica has denoisers and schedulers of its own; parameters are shared where the device is the
same and copied where it is not. Its encoders are twins: module objects of their own, for hooks,
around the leader's very tensors, since a follower takes their outputs from the leader. All are made
before any hook is placed: a copy of a hooked module would keep the original's closure.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..marks import elements_of
from ..reach import graphed_part
from .changes import plain
from .compiling import compile_parts, compiled_parts
from .hooks import attributes_of
from .offload import (
    forget_hooks,
    forward_of,
    is_offloaded,
    moves_within,
    set_by_hooks,
    unhook,
    unhook_denoisers,
)
from .parts import denoisers_of, encoders_of, is_scheduler
from .quantised import is_written, move_scales, own_copy

Memo = dict[int, Any]  # of a deep copy

_OF_MODULES = ("_parameters", "_buffers", "_modules")


def unfit(pipe: Any, split: Sequence[str] = ()) -> str | None:
    """Why replicas of the pipeline would not compute what it does itself, or None. `split`: names
    of denoisers that replicas have no copies of.
    """
    reason = moves_within(pipe)
    if reason is not None:
        return reason
    for name, module in denoisers_of(pipe).items():
        graphed = graphed_part(module, attributes_of)
        if graphed is not None:
            return (
                f"{f'{name}.{graphed}'.rstrip('.')} replays a CUDA graph (make_graphed_callables), "
                "whose memory its copies would share"
            )
        for part in module.modules() if name not in split else ():
            hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", None)
            if hooks:  # their closures hold the module that they were made for
                return f"{name} has hooks of diffusers that cannot be copied: {', '.join(hooks)}"
    guider = getattr(pipe, "guider", None)
    if any("momentum" in name and value for name, value in getattr(guider, "__dict__", {}).items()):
        return "its guider averages over the outputs of earlier steps"
    return None


def _share(
    module: torch.nn.Module, device: torch.device, own_weights: bool, lane: bool, memo: Memo
) -> None:
    """Parameters of a denoiser's copy: the same ones on the same device, else moved ones. Buffers
    are its own, for modules that write to them.

    Offloaded ones are moved under who else holds them when the leader calls its module. They stay
    on a GPU by the time that a lane runs, which has the same ones.
    """
    offloaded = is_offloaded(module)
    for weight in module.parameters():
        shared = lane and device.type != "cpu" if offloaded else weight.device == device
        if is_written(weight):
            memo[id(weight)] = own_copy(weight, device)
        else:
            memo[id(weight)] = weight if shared and not own_weights else _moved(weight, device)
    for tensor in module.buffers():
        memo[id(tensor)] = _moved(tensor, device)


def going_along(pipe: Any) -> list[torch.Tensor]:
    """Tensors that parts of denoisers keep as plain attributes, or in containers and objects among
    them (what quantised weights are scaled by): those that are where the weights are, which a deep
    copy would leave there, and those computed anew in each forward, which it would refuse.
    """
    found: dict[int, torch.Tensor] = {}
    for module in denoisers_of(pipe).values():
        home = next((weight.device for weight in module.parameters()), None)
        for part in module.modules():
            own = (value for name, value in vars(part).items() if name not in _OF_MODULES)
            for tensor in (tensor for value in own for tensor in _tensors_in(value)):
                if tensor.device == home or not tensor.is_leaf:
                    found[id(tensor)] = tensor
    return list(found.values())


def _tensors_in(value: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, (torch.nn.Module, type, types.ModuleType)):
        if not isinstance(value, (list, tuple, set, dict)):
            try:
                value = vars(value)
            except Exception:  # there is none, or an object of the user's own does not tell
                return
        for item in list(value.values() if isinstance(value, dict) else value):
            yield from _tensors_in(item, depth - 1)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy. Weights of a class of their own that torch's operations do not keep (bitsandbytes')
    are copied whole first: they know by themselves what else they have to move.
    """
    if type(tensor.detach()) is not type(tensor) and type(tensor) is not torch.nn.Parameter:
        moved = copy.deepcopy(tensor).to(device)
        if type(moved) is not type(tensor) or moved.device.type != device.type:
            name = type(tensor).__name__
            raise RuntimeError(f"weights of class {name} do not move to {device} as they are")
        return moved
    copied = tensor.detach().to(device, copy=True)
    if isinstance(tensor, torch.nn.Parameter) and not isinstance(copied, torch.nn.Parameter):
        return torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return copied


def twin_of(module: Any, memo: dict[int, Any], old: Any = None) -> Any:
    """Module objects of their own around the same tensors; memo finds each by the original's id.

    `old`, a twin from before, becomes the new one, for who else holds it.
    """
    if not isinstance(module, torch.nn.Module):  # None, where a part was taken out
        return module
    if id(module) not in memo:
        cls: Any = type(module)
        memo[id(module)] = twin = old if type(old) is cls else cls.__new__(cls)
        parts = vars(twin).get("_modules", {})
        own = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        vars(twin).clear()
        vars(twin).update(own)
        unhook(twin)
        for name, part in own["_modules"].items():
            own["_modules"][name] = twin_of(part, memo, parts.get(name))
    return memo[id(module)]


def replicate(
    pipe: Any,
    device: torch.device,
    own_weights: bool = False,
    lane: bool = False,
    along: Sequence[torch.Tensor] | None = None,
    instead: Mapping[str, torch.nn.Module] | None = None,
) -> Any:
    """A pipeline of the same class with its own modules and schedulers, for a follower; `as_made`
    brings its denoisers back to what they are now. With its own weights on the pipe's device too,
    for code that may write to them. A `lane` is on the leader's device. `along`: as `going_along`
    has it, where the pipe itself can no longer tell. `instead`: what it has in place of a copy of
    these denoisers.
    """
    memo: Memo = {}
    forget_hooks(pipe, memo)
    for module in encoders_of(pipe).values():
        twin_of(module, memo)
    for name, module in denoisers_of(pipe).items():
        if instead and name in instead:
            memo[id(module)] = instead[name]
        else:
            _share(module, device, own_weights, lane, memo)
    for tensor in going_along(pipe) if along is None else along:
        if id(tensor) not in memo:
            memo[id(tensor)] = _moved(tensor, device)
    replica = copy.deepcopy(pipe, memo)
    unhook_denoisers(replica)
    for module in denoisers_of(replica).values():
        move_scales(module, device)
    compiled = compiled_parts(pipe)
    compile_parts(replica, {k: how for k, how in compiled.items() if k[0] not in (instead or ())})
    _without_bars(replica)
    cls = type(pipe)
    # Its encoders stay where the leader's are, so it cannot tell its own device from them, which
    # takes long besides.
    names = ("_execution_device", "device")
    told = [name for name in names if isinstance(getattr(cls, name, None), property)]
    here: dict[str, Any] = dict.fromkeys(told, property(lambda self: device))
    here["as_made"] = AsMade(replica)
    replica.__class__ = type(cls.__name__, (cls,), here)
    return replica


def _without_bars(replica: Any) -> None:
    """The leader shows the progress. Blocks of a modular pipeline have bars at any depth."""
    blocks = [replica, getattr(replica, "_blocks", None)]
    for block in blocks:
        blocks += dict(getattr(block, "sub_blocks", None) or {}).values()
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)


def refresh(replica: Any, pipe: Any) -> None:
    """Brings over what may differ from call to call: schedulers, settings of the pipeline, and what
    its encoders are made of.
    """
    memo: dict[int, Any] = {}
    for name, module in encoders_of(pipe).items():
        vars(replica)[name] = twin_of(module, memo, vars(replica).get(name))
    for name, value in vars(pipe).items():
        if is_scheduler(value):
            _become(getattr(replica, name), value)
        elif name == "_internal_dict" or isinstance(value, (int, float, str, type(None))):
            vars(replica)[name] = value


def _become(own: Any, scheduler: Any) -> None:
    """In place, as a pipeline within the pipeline may hold the same scheduler."""
    state = copy.deepcopy(vars(scheduler), {id(scheduler): own})
    own.__class__ = type(scheduler)
    vars(own).clear()
    vars(own).update(state)


class AsMade:
    """The denoisers of a replica as they are now: their parts' attributes, hooks and parameters.

    A pipeline that alters its modules for the time of a call (PAG puts its own processors in) puts
    them back at its end, which a follower never reaches.
    """

    def __init__(self, pipe: Any) -> None:
        parts = (part for module in denoisers_of(pipe).values() for part in module.modules())
        self._own: list[Any] = []
        for own in map(vars, parts):
            self._own += [own, *(v for v in own.values() if type(v) in (dict, OrderedDict))]
        self._content = list(map(dict, self._own))

    def restore(self) -> None:
        """Dicts compare by identity first, which is all that it takes where nothing has changed."""
        try:
            if self._own == self._content:
                return
        except Exception:  # other tensors compare to no truth
            pass
        for own, content in zip(self._own, self._content):
            own.clear()
            own.update(content)


def fingerprint(pipe: Any) -> int:
    """Changes when what a replica was made from changes: a component, or anything in a denoiser,
    weights, processors, adapters.
    """
    seen: list[Any] = [type(pipe)]
    for name, value in vars(pipe).items():
        if not name.startswith("_") and not is_scheduler(value):
            seen.append((name, id(value), type(value)))
    return hash((*seen, denoisers_print(pipe)))


def denoisers_print(pipe: Any) -> int:
    """The denoisers' share in it, the same with and without hooks of ours."""
    seen: list[Any] = []
    for module in denoisers_of(pipe).values():
        away = is_offloaded(module)
        for part in module.modules():
            ignored = {"_modules", "_diffusers_hook", *made_by_hooks(part), *set_by_hooks(part)}
            seen.append(id(forward_of(part)))
            for key, value in attributes_of(part).items():
                if key == "processor":  # attention processors hold scales and sometimes weights
                    own = getattr(value, "__dict__", None)
                    seen.append((id(value), type(value), plain(own)))
                elif away and key in ("_parameters", "_buffers"):
                    seen.append((key, _wherever(value)))
                elif key not in ignored:
                    seen.append((key, plain(value)))
            seen.append((id(part), type(part)))
    return hash(tuple(seen))


def _wherever(tensors: dict[str, torch.Tensor | None]) -> tuple[Any, ...]:
    """As something to compare, of tensors that are moved from one call to the next: a moved buffer
    is another object, and a parameter the same one.
    """
    given = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    return tuple(
        (name, id(t), t._version, t.dtype)
        if isinstance(t, torch.nn.Parameter) and not t.is_inference()
        else (name, t.dtype, t.shape, elements_of(t))
        for name, t in given
    )


def made_by_hooks(part: torch.nn.Module) -> set[str]:
    """Attributes that torch's own hooks (weight_norm) compute anew before each forward."""
    hooks = part._forward_pre_hooks.values()
    own = (hook for hook in hooks if type(hook).__module__.startswith("torch.nn.utils."))
    return {hook.name for hook in own if hasattr(hook, "name")}
