"""ComfyUI: what other devices cannot evaluate ahead, found before a run.

A follower evaluates a later step while the leader is at an earlier one. That is the same function
only if nothing is kept from call to call. Whatever keeps something, as far as it can be seen, is
named here, and the run is the host's own, one step after another.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

_CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}
# Called in the model's own calls; the others enclose the sampler's loop or come before it.
_INNER = ("predict_noise", "calc_cond_batch", "apply_model", "diffusion_model")
_DEPTH = 6  # of containers in model options


def reason_against(guider: Any, extra_args: dict[str, Any]) -> str | None:
    """Why this run has to be serial, or None."""
    options = extra_args.get("model_options", {})
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
    for function in _callables({**options, "wrappers": [wrappers.get(kind) for kind in _INNER]}):
        kept = _kept(function)
        if kept is not None:
            return f"{_name(function)} keeps {kept!r} from call to call"
    return None


def _second_model(guider: Any) -> str | None:
    """The attribute in which a guider has a model beside its own."""
    for name, value in vars(guider).items():
        if name in ("model_patcher", "inner_model"):
            continue
        if hasattr(value, "load_device") and hasattr(value, "model"):
            return name
    return None


def _callables(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """All functions and callable objects in model options; patches of weights are not among them.

    The wrappers around the loop itself, ours among them, may keep what they like.
    """
    if isinstance(value, dict):
        items = [item for name, item in value.items() if name != "wrappers" or depth == _DEPTH]
    elif isinstance(value, (list, tuple)):
        items = list(value)
    else:
        if callable(value) and not isinstance(value, type):
            yield value
        return
    for item in items if depth else ():
        yield from _callables(item, depth - 1)


def _kept(function: Any) -> str | None:
    """A variable that outlives the call of a function, or an attribute, that it writes."""
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function):
        function = type(function).__call__
    code = getattr(function, "__code__", None)
    return None if code is None else _written(code)


def _written(code: types.CodeType) -> str | None:
    """What an outer function's variable, or an attribute of `self`, is called that is assigned."""
    first = code.co_varnames[0] if code.co_argcount else None
    before = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars:
            return instruction.argval
        if instruction.opname == "STORE_ATTR" and first == "self" and before == "self":
            return f"self.{instruction.argval}"
        loaded = instruction.opname.startswith("LOAD_FAST")
        before = instruction.argval if loaded else None
        if isinstance(before, tuple):  # newer Pythons load two at once
            before = before[-1]
    return None


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__qualname__)
