"""ComfyUI: whether a model, with all that was hung into it, is a function, found by looking.

The first evaluation of a run is the leader's alone where there is something that has not been found
clean before: functions in model options, forwards and hooks that were put into the model, code that
was replaced in the host, classes that are not the host's. What these can reach, and the attributes
of the model's modules, are compared before it, from within it and after it; then followers may run.
Later, what the functions reach is compared at each call of the sampler. A stock model pays a walk
over its modules a run. Used by `node`.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from ..reach import Snapshot, difference, graphed_part, is_known, package_of, snapshot
from ..tracing.kdiffusion import AFTER_GUIDANCE
from .serial import functions_in, is_hosts, kept, name_of

Result = TypeVar("Result")

KEY = "parastep look"  # of the wrapper in a first evaluation
_HOSTS = {"comfy", "torch", "parastep"}  # whose classes of modules are functions of their inputs
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_STRUCTURE = frozenset(vars(torch.nn.Module()))  # what every module has
# Of a guider, what the host itself keeps there.
_OF_THE_GUIDER = {"conds", "original_conds", "inner_model", "model_patcher", "loaded_models"}
# Where packs put functions of their own in the place of the host's.
_REPLACED = ("comfy.samplers", "comfy.model_base", "comfy.ops", "comfy.ldm.modules.attention")
_AT_PARTS = (1, 8, 64, 512)  # calls of the model's parts in which its modules are looked at
_INSIDE = 50_000  # things compared from within an evaluation, in all
_KEPT = 16  # findings for each model

# {the model: {its foreign parts: why they are no function, or None}}
_known: weakref.WeakKeyDictionary[Any, dict[Any, str | None]] = weakref.WeakKeyDictionary()


class Look:
    """At a model in one run of it.

    Attributes:
        reason: why the run is to be serial, as far as known.
        needed: whether the first evaluation is to be looked at, before others run.
    """

    def __init__(self, model: Any, guider: Any, options: dict[str, Any], shared: bool) -> None:
        """`options` are the run's model options; `shared`, whether others evaluate meanwhile."""
        self.model, self.shared = model, shared
        functions = {**functions_in(options), **dict(_hung_in(model)), **dict(_replaced(model))}
        self._modules = {id(module) for module in model.modules()}
        self._options = options
        self._roots = {**functions}
        foreign = [*functions.values(), *_foreign_classes(model)]
        if package_of(guider) not in _HOSTS:
            own = {k: v for k, v in vars(guider).items() if k not in _OF_THE_GUIDER}
            self._roots |= {"the guider": own, name_of(type(guider)): guider.predict_noise}
            foreign.append(type(guider))
        self._key = tuple(map(_identity, foreign))
        self._findings = _known.setdefault(model, {})
        graphed = graphed_part(model) if shared else None
        self.reason = kept(self._roots) or self._findings.get(self._key)
        if graphed is not None:
            name = graphed or "the model"
            self.reason = f"{name} replays a CUDA graph, whose memory its copies would share"
        self.needed = bool(foreign) and self.reason is None and self._key not in self._findings
        self.base: Snapshot | None = None

    def first(self, evaluate: Callable[[], Result]) -> Result:
        """The result of an evaluation with the options of `begin`; sets `reason`."""
        attributes, weights = self.attributes(), self._weights()
        inside = _Inside(self, attributes, self._options)
        self.base = self.reached()
        try:
            result = evaluate()
        except BaseException:
            self.base = None  # nothing has been shown
            raise
        finally:
            inside.remove()
        changed = difference(attributes, self.attributes()) or difference(weights, self._weights())
        if changed is not None:
            self.reason = f"{changed} changes in an evaluation"
        elif (reason := self.changed()) is not None:
            self.reason = reason
        elif inside.changed is not None:
            self.reason = f"{inside.changed} changes in an evaluation and is put back"
        return result

    def begin(self, options: dict[str, Any]) -> None:
        """The options with which the sampler calls its model, for functions may keep things there:
        they are never copied on the way.
        """
        self._options = options
        if not self.needed:
            self.base = self.reached()

    def changed(self) -> str | None:
        """What some function keeps, as far as this run has shown."""
        if self.base is None or not self._roots:
            return None
        name = difference(self.base, self.reached())
        return None if name is None else f"{name} changes from call to call"

    def end(self) -> str | None:
        """The run is over; what it has shown is kept for later ones.

        What changed in a first evaluation may have been made once and for all, and so may what an
        earlier run was serial for: it is looked at again.
        """
        known = self._findings.get(self._key)
        if self.base is None or (self.reason is not None and self.reason != known):
            return None
        reason = self.changed()
        if known is None:
            self._findings[self._key] = reason
            while len(self._findings) > _KEPT:
                del self._findings[next(iter(self._findings))]
        elif reason is None:
            del self._findings[self._key]
        return reason

    # ---- what is compared ------------------------------------------------------------------------

    def reached(self) -> Snapshot:
        """By the functions."""
        if not self._roots:
            return Snapshot()
        own = {k: v for k, v in self._options.items() if k != AFTER_GUIDANCE}  # the sampler's too
        inner = {k: v for k, v in own.get("transformer_options", {}).items() if k != "wrappers"}
        return self._taken({**self._roots, "the options": own | {"transformer_options": inner}})

    def attributes(self) -> Snapshot:
        """Of the model's modules: their parts, hooks, and all that somebody keeps there; weights
        by where they are.
        """
        return self._taken({path or "the model": _attributes(m) for path, m in self._named()})

    def _weights(self) -> Snapshot:
        """By their values; not where the host streams them from a file, which reads pages of it."""
        patcher = getattr(self.model, "current_patcher", None)
        if getattr(patcher, "is_dynamic", bool)():
            return Snapshot()
        return self._taken(dict(self.model.named_parameters()), sample=64)

    def _named(self) -> Iterator[tuple[str, Any]]:
        return self.model.named_modules()

    def _taken(self, roots: Mapping[str, Any], **given: int) -> Snapshot:
        try:
            return snapshot(roots, self._stops, **given)
        except Exception:  # objects of others may do anything when they are read
            return Snapshot({f"{next(iter(roots))}, which cannot be read,": object()})

    def _stops(self, value: Any) -> bool:
        return id(value) in self._modules or is_hosts(value) or _is_compiled(value)

    def compiles(self) -> bool:
        """Whether code is compiled in an evaluation, which hooks of ours would be compiled into."""
        parts = list(self.model.modules())
        in_place = (part for part in parts if getattr(part, "_compiled_call_impl", None))
        return any(in_place) or any(map(_is_compiled, (*parts, *self.reached().held)))


class _Inside:
    """Looks from within one evaluation in this thread, where others would evaluate meanwhile."""

    def __init__(self, look: Look, attributes: Snapshot, options: dict[str, Any]) -> None:
        self.changed: str | None = None
        self._look, self._attributes, self._thread = look, attributes, threading.get_ident()
        self._handles: list[Any] = []
        self._parts = self._compared = 0
        self._weights: dict[int, tuple[str, Any]] = {}
        wrappers = options.setdefault("transformer_options", {}).setdefault("wrappers", {})
        self._innermost = wrappers.setdefault("apply_model", {})
        if look.shared:
            self._innermost[KEY] = [self._at_model]
            if not look.compiles():
                named = look.model.named_modules()
                self._weights = {id(module): (path, _places(module)) for path, module in named}
                hooks = torch.nn.modules.module
                self._handles.append(hooks.register_module_forward_pre_hook(self._at_part))
                self._handles.append(hooks.register_module_forward_hook(self._after_part))

    def remove(self) -> None:
        self._innermost.pop(KEY, None)
        for handle in self._handles:
            handle.remove()

    def _at_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self._compare(self._attributes, self._look.attributes)
        return executor(*args, **kwargs)

    def _at_part(self, module: torch.nn.Module, args: Any) -> None:
        if threading.get_ident() != self._thread or self.changed is not None:
            return
        self._parts += 1
        if self._parts in _AT_PARTS:
            self._compare(self._attributes, self._look.attributes)
        if self._compared < _INSIDE and self._look.base is not None:
            self._compared += len(self._look.base.found) or _INSIDE
            self._compare(self._look.base, self._look.reached)

    def _after_part(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Before its own hooks, which may put weights back that others before its call put in."""
        path, weights = self._weights.get(id(module), ("", None))
        if threading.get_ident() == self._thread and weights not in (None, _places(module)):
            self.changed = self.changed or f"{path}: weights"

    def _compare(self, before: Snapshot, take: Callable[[], Snapshot]) -> None:
        if self.changed is None:
            self.changed = difference(before, take())


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    own = package_of(module) in _HOSTS
    for name, value in list(vars(module).items()):
        if name in ("_parameters", "_buffers", "_modules"):
            found.update(_places(module) if name == "_parameters" else value)
        elif name in _STRUCTURE:
            if isinstance(value, dict) and value:
                found[name] = value
        elif not (own and name.startswith("_")):  # where the host keeps what it streams
            found[name] = value
    return found


def _places(module: torch.nn.Module) -> dict[str, Any]:
    """Where a module's own weights are."""
    found: dict[str, Any] = {}
    for name, weight in module._parameters.items():
        if weight is not None:
            version = None if weight.is_inference() else weight._version
            found[name] = id(weight), _address(weight), weight.dtype, version
    return found


def _address(weight: torch.Tensor) -> int:
    try:
        return weight.data_ptr()
    except RuntimeError:  # of a class that wraps others
        return 0


# ---- what was hung into a model ------------------------------------------------------------------


def _hung_in(model: Any) -> Iterator[tuple[str, Any]]:
    """Functions that are attributes of modules, and hooks."""
    for path, module in model.named_modules():
        for name in vars(module).keys() - _STRUCTURE:
            value = vars(module)[name]
            if callable(value) and not _is_own(value) and not _is_compiled(module):
                yield f"{path}.{name}", value
        for kind in _HOOKS:
            for key, hook in vars(module).get(kind, {}).items():
                yield f"{path}.{kind}[{key}]", hook


def _replaced(model: Any) -> Iterator[tuple[str, Any]]:
    """Functions of others in the host's classes and modules."""
    classes = dict.fromkeys(base for part in model.modules() for base in type(part).__mro__)
    owners: list[Any] = [each for each in classes if package_of(each) in _HOSTS]
    for owner in (*owners, *filter(None, map(sys.modules.get, _REPLACED))):
        for name, value in list(vars(owner).items()):
            if isinstance(value, types.FunctionType) and not _is_own(value):
                if "-packages" not in (value.__globals__.get("__file__") or ""):
                    yield f"{owner.__name__}.{name}", value


def _foreign_classes(model: Any) -> list[type]:
    classes = dict.fromkeys(type(part) for part in model.modules())
    return [each for each in classes if package_of(each) not in _HOSTS]


def _is_own(value: Any) -> bool:
    """Whether what can be called is a part, a class, or the host's or a library's."""
    while isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, types.MethodType):
        value = value.__func__
    kinds = (torch.nn.Module, type, types.BuiltinFunctionType)
    return isinstance(value, kinds) or is_known(value) or package_of(value) in _HOSTS


def _is_compiled(value: Any) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(value, dynamo.OptimizedModule)


def _identity(thing: Any) -> Any:
    """As a part of a key, equal for the same thing as long as it lives, and for no other."""
    if isinstance(thing, types.MethodType):
        return _identity(thing.__func__), _identity(thing.__self__)
    try:
        found = weakref.ref(thing)
        hash(found)
    except TypeError:
        return type(thing), id(thing)
    return found
