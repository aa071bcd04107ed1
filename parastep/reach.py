"""What functions can reach, as something to compare.

A denoiser that keeps something from call to call keeps it where its code can get at it: in the
variables of outer functions, in the objects that methods are bound to, in containers, globals and
tensors. `snapshot` writes all of that down by name, before a call and after it, and `difference`
names what changed. `functions` are those that such a walk meets, to be read without being called.

    before = snapshot({"the wrapper": wrapper})
    wrapper(...)
    changed = difference(before, snapshot({"the wrapper": wrapper}))  # "the wrapper: seen", or None

Numbers and text are compared by value, containers and objects by what they hold, tensors by where
they are, their version, and a sample of their values: tensors made in inference mode have no
version, and writing to `.data` leaves it as it is. Functions, classes, what holds nothing that can
be seen, and whatever the walk is told to stop at are an identity. Used by hosts; knows none.
"""

from __future__ import annotations

import collections
import dis
import enum
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .marks import mark_of

Stop = Callable[[Any], bool]

_MOST = 200_000  # items of a walk, and how deep it goes
_DEPTH = 16
_PLAIN = (int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)
_SEQUENCES = (list, tuple, collections.deque)
_CODE = (types.FunctionType, type, types.ModuleType)
# Of the standard library, whose objects else are identities: loggers, locks, files.
_ENTERED = {"builtins", "collections", "contextlib", "functools", "types", "unittest", "_thread"}
_KNOWN = {"torch", "numpy"}  # and the standard library: their globals and classes keep nothing


@dataclass
class Snapshot:
    """Names and what was found there; the objects are held, so that no other takes their place."""

    found: dict[str, Any] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)


def snapshot(
    roots: Mapping[str, Any], stop: Stop = lambda value: False, sample: int = 4096
) -> Snapshot:
    """All that can be reached from the roots, whose names begin the names of what is; `sample`, how
    many of a tensor's values are compared.
    """
    made = Snapshot()
    for name, value in _walk(roots, stop):
        made.found[name] = _mark(value, stop, sample)
        made.held.append(value)
    return made


def difference(before: Snapshot, after: Snapshot) -> str | None:
    """The first name that is not the same in both, or None; rather what is in a container than the
    container.
    """
    names = dict.fromkeys((*before.found, *after.found))
    found = [n for n in names if before.found.get(n, before) != after.found.get(n, after)]
    inner = [name for name in found[1:] if name.startswith(found[0])]
    return next(iter(inner or found), None)


def functions(roots: Mapping[str, Any], stop: Stop = lambda value: False) -> Iterator[Any]:
    """The functions of Python's that can be reached."""
    return (value for _, value in _walk(roots, stop) if isinstance(value, types.FunctionType))


def is_method(function: Any) -> bool:
    """Whether a function was written in the body of a class, so that its first argument is what it
    is bound to, whatever its name.
    """
    *outer, _ = function.__qualname__.split(".")
    return bool(outer) and outer[-1] != "<locals>"


def graphed_part(module: torch.nn.Module, own: Callable[[Any], dict[str, Any]] = vars) -> Any:
    """The path of a part whose forward torch.cuda.make_graphed_callables has put in place of its
    own, or None. That replays a CUDA graph in memory of its own, which copies of the part would
    share: it is a function of torch's, of which nothing can be copied. `own` gives the attributes
    of a part.
    """
    for path, part in module.named_modules():
        forward = own(part).get("forward")
        if isinstance(forward, types.FunctionType):
            if forward.__globals__.get("__name__") == "torch.cuda.graphs":
                return path
    return None


# ---- the walk ------------------------------------------------------------------------------------


def _walk(roots: Mapping[str, Any], stop: Stop) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything once, those of a root together."""
    seen: set[int] = set()
    held = []  # what was made for the walk alone: its address is not to be another's
    for root, value in roots.items():
        waiting = [(root, value, None, 0)]
        while waiting and len(seen) < _MOST:
            name, value, owner, depth = waiting.pop()
            if not isinstance(value, _PLAIN):
                if id(value) in seen:
                    continue
                seen.add(id(value))
                held.append(value)
            yield name, value
            if depth < _DEPTH and not isinstance(value, _PLAIN) and not stop(value):
                parts = [(_joined(name, part), *rest) for part, *rest in _parts(value, owner)]
                waiting += [(*part, depth + 1) for part in reversed(parts)]


def _joined(name: str, part: str) -> str:
    return name + part if part.startswith(("[", ".")) or not part else f"{name}: {part}"


def _parts(value: Any, owner: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, the object that a method is bound to) of what is directly behind a value."""
    if isinstance(value, types.FunctionType):
        yield from _of_function(value, owner)
    elif isinstance(value, types.MethodType):
        yield "", value.__func__, value.__self__
        yield "self", value.__self__, None
    elif isinstance(value, (types.BuiltinMethodType, types.MethodWrapperType)):
        yield "", value.__self__, None
    elif isinstance(value, functools.partial):
        for name, part in (("", value.func), ("args", value.args), ("args", value.keywords)):
            yield name, part, None
    elif isinstance(value, Mapping):
        for key, part in list(value.items()):
            yield f"[{key!r}]", part, None
    elif isinstance(value, _SEQUENCES):
        for k, part in enumerate(list(value)):
            yield f"[{k}]", part, None
    elif isinstance(value, type):
        if not is_known(value):
            for name, part in list(vars(value).items()):
                if not name.startswith("__") and not _is_code(part):
                    yield f".{name}", part, None
    elif not isinstance(value, (torch.Tensor, np.ndarray, types.ModuleType)):
        yield from _of_object(value)


def _of_object(value: Any) -> Iterator[tuple[str, Any, Any]]:
    kind = type(value)
    package = package_of(kind)
    if package in sys.stdlib_module_names and package not in _ENTERED:
        return
    attributes = getattr(value, "__dict__", {})
    for name, part in list(attributes.items()) if isinstance(attributes, dict) else ():
        yield f".{name}", part, None
    for each in kind.__mro__:
        slots = vars(each).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if (part := getattr(value, name, None)) is not None and name != "__dict__":
                yield f".{name}", part, None
    if not is_known(kind):
        yield f": {kind.__qualname__}", kind, None
        name = "forward" if isinstance(value, torch.nn.Module) else "__call__"
        yield from _of_method(value, name)


def _of_function(function: types.FunctionType, owner: Any) -> Iterator[tuple[str, Any, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        try:
            yield name, cell.cell_contents, owner
        except ValueError:  # not assigned yet
            continue
    for part in (function.__defaults__, function.__kwdefaults__):
        if part:
            yield "defaults", part, None
    for name, part in list(vars(function).items()):
        yield ("", part, owner) if name == "__wrapped__" else (f".{name}", part, None)
    if not is_known(function):
        yield from _of_globals(function)
    if owner is not None and is_method(function):
        for name in _called_on_first(code):
            yield from _of_method(owner, name)


def _of_globals(function: types.FunctionType) -> Iterator[tuple[str, Any, Any]]:
    """What a function names of its own package's globals, by way of the package's modules too."""
    package, known = package_of(function), function.__globals__
    for name in function.__code__.co_names:
        part = known.get(name)
        if isinstance(part, types.ModuleType):
            if _root(part.__name__) == package:
                for inner in function.__code__.co_names:
                    yield f"{name}.{inner}", vars(part).get(inner), None
        elif isinstance(part, types.FunctionType):
            if package_of(part) == package:
                yield name, part, None
        elif not isinstance(part, type) and not inspect.isroutine(part):
            yield name, part, None


def _of_method(owner: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    kind = owner if isinstance(owner, type) else type(owner)
    found = inspect.getattr_static(kind, name, None)
    if isinstance(found, types.FunctionType):
        yield "", types.MethodType(found, owner), None
    elif isinstance(found, classmethod):
        yield "", types.MethodType(found.__func__, kind), None
    elif isinstance(found, property) and found.fget is not None:
        yield "", types.MethodType(found.fget, owner), None


@functools.lru_cache(maxsize=4096)
def _called_on_first(code: types.CodeType) -> tuple[str, ...]:
    """What a method looks up on its first argument."""
    names: list[str] = []
    first, before = code.co_varnames[:1] if code.co_argcount else (), None
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and before in first:
            names.append(instruction.argval)
        before = last_loaded(instruction)
    return tuple(dict.fromkeys(names))


def last_loaded(instruction: dis.Instruction) -> str | None:
    """The local variable that an instruction leaves on top of the stack."""
    if not instruction.opname.startswith("LOAD_FAST"):
        return None
    found = instruction.argval
    return found[-1] if isinstance(found, tuple) else found  # newer Pythons load two at once


def _is_code(value: Any) -> bool:
    return inspect.isroutine(value) or hasattr(type(value), "__get__")


def package_of(thing: Any) -> str:
    """Whose code a function, a class or an object's class is; a function's by its globals, since
    `functools.wraps` gives it the name of another's module.
    """
    if isinstance(thing, types.FunctionType):
        return _root(thing.__globals__.get("__name__"))
    if isinstance(thing, types.ModuleType):
        return _root(thing.__name__)
    return _root((thing if isinstance(thing, type) else type(thing)).__module__)


def is_known(thing: Any) -> bool:
    """Whether it is of a library whose globals and classes keep nothing of a denoiser's."""
    package = package_of(thing)
    return package in _KNOWN or (package in sys.stdlib_module_names and package != "__main__")


@functools.lru_cache(maxsize=4096)
def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


# ---- what is compared ----------------------------------------------------------------------------


def _mark(value: Any, stop: Stop, samples: int) -> Any:
    if isinstance(value, _PLAIN):
        return type(value), repr(value)
    known = mark_of(value, samples)
    if known is not None:
        return known
    if isinstance(value, types.MethodType):  # made anew wherever it is looked up
        return id(value.__func__), id(value.__self__)
    if isinstance(value, (Mapping, *_SEQUENCES)):
        return type(value), len(value)
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(repr, value))
    if getattr(value, "__dict__", None) and not stop(value) and not isinstance(value, _CODE):
        return type(value)
    return id(value)
