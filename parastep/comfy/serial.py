"""ComfyUI: what other devices cannot evaluate ahead, found before a run by reading.

A follower evaluates a later step while the leader is at an earlier one. That is the same function
only if nothing is kept from call to call. Whatever keeps something, as far as it can be read in the
code that was hung into the model, is named here, and the run is the host's own, one step after
another. What cannot be read is looked at in the first evaluation, see `state`.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

from ..reach import functions, is_known, is_method, last_loaded, package_of

_CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}
# Called in the model's own calls; the others enclose the sampler's loop or come before it.
_INNER = ("predict_noise", "calc_cond_batch", "apply_model", "diffusion_model")
_DEPTH = 6  # of containers in model options


def reason_against(guider: Any, options: dict[str, Any]) -> str | None:
    """Why a run with these model options has to be serial, or None."""
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    keys = {key for kind in _INNER for key in wrappers.get(kind, {})}
    for key, name in _CACHES.items():
        if key in keys:
            return f"{name} keeps outputs from step to step; remove one of the two nodes"
    if options.get("context_handler") is not None:
        return "context windows count their steps"
    conds = [cond for each in guider.conds.values() for cond in each]
    if any(cond.get("hooks") is not None for cond in conds):
        return "conditioning hooks change the weights from step to step"
    second = _second_model(guider)
    if second is not None:
        return f"the guider {type(guider).__name__} has a second model ({second})"
    return None


def _second_model(guider: Any) -> str | None:
    """The attribute in which a guider has a model beside its own."""
    for name, value in vars(guider).items():
        if name in ("model_patcher", "inner_model"):
            continue
        if hasattr(value, "load_device") and hasattr(value, "model"):
            return name
    return None


# ---- functions in model options ------------------------------------------------------------------


def functions_in(options: dict[str, Any]) -> dict[str, Any]:
    """The functions and callable objects in model options, by their names; patches of weights are
    not among them, nor wrappers around the loop itself, which may keep what they like.
    """
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    inner = [wrappers.get(kind) for kind in _INNER]
    found: dict[str, Any] = {}
    for each in _callables({**options, "wrappers": inner}):
        name = name_of(each)
        found[f"{name} ({len(found)})" if name in found else name] = each
    return found


def _callables(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    if isinstance(value, dict):
        items = [item for name, item in value.items() if name != "wrappers" or depth == _DEPTH]
    elif isinstance(value, (list, tuple)):
        items = list(value)
    else:
        if callable(value) and not isinstance(value, type) and not hasattr(value, "load_device"):
            yield value
        return
    for item in items if depth else ():
        yield from _callables(item, depth - 1)


def is_hosts(value: Any) -> bool:
    """Whether it is of the host's core, whose models are looked at on their own, or ours. What it
    makes for each call, conditionings, is told by what it holds.
    """
    if isinstance(value, types.MethodType):
        value = value.__self__
    made = getattr(type(value), "__module__", None) == "comfy.conds"
    return package_of(value) in ("comfy", "parastep") and not made


def kept(roots: Mapping[str, Any]) -> str | None:
    """What some function that can be reached from these writes and outlives its call, or None."""
    for function in functions(roots, is_hosts):
        if not is_known(function) and not is_hosts(function):
            name = _written(function.__code__, is_method(function))
            if name is not None:
                return f"{name_of(function)} keeps {name!r} from call to call"
    return None


@functools.lru_cache(maxsize=4096)
def _written(code: types.CodeType, method: bool) -> str | None:
    """What is assigned: an outer function's variable, a global, an attribute of what a method is
    bound to.
    """
    first = code.co_varnames[0] if code.co_argcount and method else None
    before = None
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation == "STORE_DEREF" and name in code.co_freevars:
            return str(name)
        if operation == "STORE_GLOBAL":
            return str(name)
        if operation == "STORE_ATTR" and first is not None and before == first:
            return f"{first}.{name}"
        before = last_loaded(instruction)
    return None


def name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__qualname__)
