"""What code that was hung into a model can reach, as values to compare later.

A hook, a patched method or a processor may keep what it likes in closures, in objects, in globals
of its module. `Reach` walks all of that and writes it down: numbers and names by value, tensors by
address and a few of their elements, everything else by identity. Code of the host's libraries is
gone through to what it wraps, and trusted for the rest.
"""

from __future__ import annotations

import collections
import contextvars
import functools
import itertools
import operator
import sys
import types
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..marks import mark_of
from ..reach import package_of
from .watch import names_used

_LIBRARIES = frozenset(
    "torch diffusers transformers peft accelerate huggingface_hub parastep "
    "torchao bitsandbytes optimum gguf".split()  # quantised weights
)
_TRUSTED = _LIBRARIES | set(sys.stdlib_module_names)
_DEPTH, _ITEMS, _VALUES = 32, 4096, 50_000  # how deep, how much of a container, how much in all
_SAMPLES = 4096  # elements of a tensor or an array
# Of the standard library, whose objects else are an identity: locks, loggers, files.
_ENTERED = {"_thread", "collections", "contextlib", "functools", "queue", "types", "weakref"}
STRUCTURE = frozenset(vars(torch.nn.Module()))  # what every module has: weights, parts, hooks
_PLAIN = (int, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, range)
_CONTAINERS = (list, tuple, collections.deque, set, frozenset)
_DATA = (int, float, torch.Tensor, dict, *_CONTAINERS)
_UNASSIGNED = object()
_OF_CLASSES = ("__dict__", "__weakref__", "__doc__")

Path = tuple[Any, ...]  # (the path of what holds it, its name there)


# ---- whose code it is ----------------------------------------------------------------------------


def is_foreign(thing: Any) -> bool:
    """Whether a function or a class is neither of the host's libraries nor ours nor Python's.

    A function by its globals: `functools.wraps` gives it the name of another's module.
    """
    return package_of(thing) not in _TRUSTED


@functools.cache
def _is_installed(package: str) -> bool:
    where = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in where or "dist-packages" in where


def foreign_code(value: Any, depth: int = 6) -> Any:
    """The foreign function, method, partial or object that a value is or wraps, or None."""
    if depth == 0 or isinstance(value, (torch.Tensor, torch.nn.Module, *_PLAIN, float)):
        return None
    if isinstance(value, types.FunctionType):
        if is_foreign(value):
            return value
        if value.__closure__ is None and not value.__dict__:  # as nearly all are: it wraps nothing
            return None
        inner = [cell for _, cell in _cells(value)]
        inner = [held for held in inner if callable(held) and not isinstance(held, type)]
        inner.append(getattr(value, "__wrapped__", None))
    elif isinstance(value, types.MethodType):
        if is_foreign(value.__func__):
            return value
        inner = [value.__func__, value.__self__]
    elif isinstance(value, functools.partial):
        return value if is_foreign(code_of(value)) else None
    elif not isinstance(value, type) and is_foreign(type(value)):
        return value
    else:
        inner = list(getattr(value, "__dict__", {}).values()) if callable(value) else []
    found = (foreign_code(held, depth - 1) for held in inner)
    return next((code for code in found if code is not None), None)


def code_of(value: Any) -> Any:
    """The function, or else the class, that says whose code a value is."""
    if isinstance(value, functools.partial):
        inner = [code_of(held) for held in (value.func, *value.args, *value.keywords.values())]
        return next(filter(is_foreign, inner), inner[0])
    if isinstance(value, types.MethodType):
        own = code_of(value.__func__)
        return own if is_foreign(own) else type(value.__self__)
    if isinstance(value, types.FunctionType):
        wrapped = foreign_code(value) if not is_foreign(value) else None
        return value if wrapped is None else code_of(wrapped)
    return value if isinstance(value, type) else type(value)


def _cells(function: types.FunctionType) -> list[tuple[str, Any]]:
    named = zip(function.__code__.co_freevars, function.__closure__ or ())
    found = ((name, _content(cell)) for name, cell in named)
    return [(name, held) for name, held in found if held is not _UNASSIGNED]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _UNASSIGNED


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> frozenset[str]:
    """Names that code reads or writes, on anything, and those that it has as words (setattr)."""
    inner = [names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    words = (c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return frozenset(code.co_names).union(words, *inner)


_names_used = functools.lru_cache(maxsize=1024)(names_used)


# ---- values --------------------------------------------------------------------------------------


def _leaf(value: Any) -> Any:
    """What tells one state of a thing from another, where nothing in it is walked."""
    known = mark_of(value, _SAMPLES)
    if known is not None:
        return id(value), known
    if isinstance(value, (dict, *_CONTAINERS)):
        return id(value), len(value)
    return id(value)


class Footprint:
    """Where a walk has been: as long as all there is what it was, another one finds the same.

    It is taken in passing, and looked at again in a fraction of the walk's time.
    """

    def __init__(self) -> None:
        self._whole: list[Any] = []  # containers, all of whose items count
        self._named: list[tuple[Mapping[str, Any], tuple[str, ...]]] = []  # or those of these names
        self._cells: list[types.CellType] = []
        self._marked: list[Any] = []  # what is compared by its mark
        self._elsewhere = False  # the walk went where there is nothing to hold on to
        self._before: tuple[list[Any], list[Any]] = [], []

    def add(self, *holders: Any) -> None:
        self._whole += holders

    def add_named(self, holder: Mapping[str, Any], names: Iterable[str]) -> None:
        self._named.append((holder, tuple(names)))

    def add_cells(self, cells: Iterable[types.CellType]) -> None:
        self._cells += cells

    def add_marked(self, value: Any) -> None:
        self._marked.append(value)

    def add_unknown(self) -> None:
        self._elsewhere = True

    def close(self) -> None:
        """The walk is over."""
        self._before = self._look()

    def is_fresh(self) -> bool:
        if self._elsewhere:
            return False
        (items, marks), (old_items, old_marks) = self._look(), self._before
        if len(items) != len(old_items) or not all(map(operator.is_, items, old_items)):
            return False
        return marks == old_marks

    def _look(self) -> tuple[list[Any], list[Any]]:
        items: list[Any] = []
        for holder in self._whole:
            items += holder
            if isinstance(holder, Mapping):
                items += holder.values()
        for holder, names in self._named:
            items += map(holder.get, names)
        items += (_content(cell) for cell in self._cells)
        return items, [_leaf(value) for value in self._marked]


class Reach:
    """`values`: what was found, by its path. `names`: those that the foreign code works with.

    Args:
        parts: the denoisers' modules, the pipe and its guider, by id: of these, only what the
            host's own code does not work with is of interest here.
        apart: what is not gone into at all, by id.
        packages: those of the code that was hung in.
        whole: the code of classes, and parameters of other modules, too.
        footprint: takes down where the walk was.
    """

    def __init__(
        self,
        parts: Mapping[int, Any],
        apart: Mapping[int, Any],
        packages: set[str],
        whole: bool,
        footprint: Footprint | None = None,
    ) -> None:
        self.values: dict[Path, Any] = {}
        self.names: set[str] = set()
        self._parts, self._apart, self._packages, self._whole = parts, apart, packages, whole
        self._footprint = Footprint() if footprint is None else footprint
        self._seen: set[int] = set()

    def walk(self, value: Any, path: Path, depth: int = _DEPTH) -> None:
        if isinstance(value, _PLAIN):
            self.values[path] = value
        elif isinstance(value, float):
            self.values[path] = value if value == value else "nan"
        elif isinstance(value, torch.Tensor):
            self._footprint.add_marked(value)
            self.values[path] = _leaf(value)
        else:
            known = mark_of(value, _SAMPLES)
            if known is not None:
                self._footprint.add_marked(value)
            self.values[path] = _leaf(value)
            if depth and id(value) not in self._seen and len(self.values) < _VALUES:
                self._seen.add(id(value))
                for name, inner in self._inside(value):
                    self.walk(inner, (path, name), depth - 1)

    def _near(self, thing: Any) -> bool:
        """Whether code is to be gone into: the package that hung it in, or the user's scripts."""
        package = package_of(thing)
        if package in _TRUSTED:
            return False
        return package in self._packages or not _is_installed(package)

    def _inside(self, value: Any) -> list[tuple[Any, Any]]:
        if id(value) in self._apart:
            return []
        if isinstance(value, types.FunctionType):
            self._footprint.add_cells(value.__closure__ or ())
            return self._of_function(value)
        if isinstance(value, types.MethodType):
            return [("", value.__func__), ("self", value.__self__)]
        if isinstance(value, functools.partial):
            self._footprint.add(value.keywords)
            return [("", value.func), *enumerate(value.args), *value.keywords.items()]
        if isinstance(value, type):
            return self._of_class(value)
        if not isinstance(value, (types.GeneratorType, weakref.ref, contextvars.ContextVar)):
            if isinstance(value, (dict, *_CONTAINERS)):
                self._footprint.add(value)
            return _items(value) + self._of_object(value)
        self._footprint.add_unknown()
        if isinstance(value, types.GeneratorType):
            frame = value.gi_frame
            return [*frame.f_locals.items(), ("", value.gi_yieldfrom)] if frame else []
        if isinstance(value, weakref.ref):
            return [("", value())]
        if isinstance(value, contextvars.ContextVar):
            return [("", value.get(None))]

    def _of_function(self, function: types.FunctionType) -> list[tuple[Any, Any]]:
        cells = _cells(function)
        if not self._near(function):
            self._footprint.add(vars(function))
            cells.append(("", getattr(function, "__wrapped__", None)))
            return [(name, held) for name, held in cells if foreign_code(held) is not None]
        names = names_in(function.__code__)
        self.names |= names
        self._footprint.add(vars(function))
        self._footprint.add_named(function.__globals__, names)
        found: list[tuple[Any, Any]] = [*cells, *vars(function).items()]
        defaults = function.__kwdefaults__ or {}
        self._footprint.add(defaults)
        found += [*enumerate(function.__defaults__ or ()), *defaults.items()]
        for name in sorted(names & function.__globals__.keys()):
            held = function.__globals__[name]
            if isinstance(held, types.ModuleType):
                own = vars(held) if self._near(held) else {}
                self._footprint.add_named(own, names)
                found += [(key, own[key]) for key in sorted(names & own.keys())]
            elif not isinstance(held, (types.FunctionType, type)) or self._near(held):
                found.append((name, held))
        return found

    def _of_class(self, cls: type) -> list[tuple[Any, Any]]:
        """All of the user's own classes; of the host's, data that the foreign code works with."""
        found: list[tuple[Any, Any]] = []
        for base in cls.__mro__:
            own = vars(base)
            if not self._near(base):
                named = sorted(self.names & own.keys())
                self._footprint.add_named(own, self.names)
                found += [(name, own[name]) for name in named if isinstance(own[name], _DATA)]
                continue
            self._footprint.add(own)
            for name, member in own.items():
                member = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if name not in _OF_CLASSES and (self._whole or not callable(member)):
                    found.append((name, member))
        return found

    def _of_object(self, value: Any) -> list[tuple[Any, Any]]:
        cls: Any = type(value)
        own = getattr(value, "__dict__", None)
        own = own if isinstance(own, dict) else {}
        self._footprint.add(own)
        own = dict(own)
        module = isinstance(value, torch.nn.Module)
        if id(value) in self._parts:
            hidden = STRUCTURE if module and is_foreign(cls) else STRUCTURE | _used_by_host(cls)
            buffers = {"_buffers": value._buffers} if module and is_foreign(cls) else {}
            own = {k: v for k, v in own.items() if k not in hidden} | buffers
        elif module:
            own = {k: v for k, v in own.items() if self._whole or k != "_parameters"}
        elif package_of(cls) in _ENTERED:
            return list(own.items())
        elif not is_foreign(cls):
            if package_of(cls) not in _LIBRARIES:
                return []
            used = _names_used(cls)
            return [(k, v) for k, v in own.items() if k not in used]
        slots = [name for base in cls.__mro__ for name in _slots(base)]
        if slots:
            self._footprint.add_unknown()
        own |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
        return [*own.items(), ("", cls)]


@functools.lru_cache(maxsize=1024)
def _used_by_host(cls: Any) -> frozenset[str]:
    """Names that the host's own code in a class works with."""
    bases = [base for base in cls.__mro__ if not is_foreign(base)]
    return frozenset().union(*(_names_used(base) for base in bases))


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots) if is_foreign(cls) else ()


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        keys = itertools.islice(list(value.items()), _ITEMS)
        return [(k if isinstance(k, (str, int)) else id(k), v) for k, v in keys]
    if isinstance(value, _CONTAINERS):
        held = list(enumerate(list(value)))
        return held if len(held) <= _ITEMS else held[: _ITEMS // 2] + held[-_ITEMS // 2 :]
    return []
