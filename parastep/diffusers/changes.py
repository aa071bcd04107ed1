"""Two looks at what an object consists of: which part of it is no longer what it was.

They are taken around each callback of a user's and each forward of a team's, so they are quick:
what parts hold is compared by identity, weights by version and address besides, and names are made
for what differs alone. Writes past torch's book-keeping (`weight.data.mul_`) go unseen.
"""

from __future__ import annotations

import itertools
import operator
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from .. import _core

# What torch keeps in each module beside what its forward reads.
_IGNORED = ("state_dict", "backward", "non_persistent", "with_kwargs", "always_called")
_DEPTH = 2  # containers and plain objects within a part: a processor, and a list in that

_NOT_LOOKED_INTO = (int, float, str, type, types.ModuleType, torch.Tensor, torch.nn.Module)


class Seen(NamedTuple):
    """A look: all items of all holders, how many each holds, and their tensors' book-keeping."""

    items: list[Any]
    counts: list[int]
    versions: list[int]
    addresses: list[int]


class Changes:
    """`holders`: the dicts, lists and sets to look at, with names."""

    def __init__(self, holders: Iterable[tuple[str, Any]]) -> None:
        found = {id(holder): (name, holder) for name, holder in holders}.values()
        dicts = [(name, holder) for name, holder in found if isinstance(holder, dict)]
        others = [(name, holder) for name, holder in found if not isinstance(holder, dict)]
        self._names = [name for name, _ in dicts + others]
        self._dicts, self._others = [d for _, d in dicts], [o for _, o in others]
        self._holders = [*self._dicts, *self._others]
        items = {id(item): item for item in self._items()}.values()
        tensors = [item for item in items if isinstance(item, torch.Tensor)]
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]
        self._placed = [tensor for tensor in tensors if _has_address(tensor)]

    def _items(self) -> Iterator[Any]:
        held = itertools.chain(map(dict.values, self._dicts), self._others)
        return itertools.chain.from_iterable(held)

    def look(self) -> Seen:
        return Seen(
            list(self._items()),
            list(map(len, self._holders)),
            *self._books(),
        )

    def _books(self) -> tuple[list[int], list[int]]:
        versions = [tensor._version for tensor in self._counted]
        return versions, [tensor.data_ptr() for tensor in self._placed]

    def changed(self, before: Seen) -> str | None:
        """The name of a part that is not what it was in a look before, or None."""
        same = _core.holds(self._holders, before.items, before.counts)
        if same and self._books() == before[2:]:
            return None
        now = self.look()
        if before.counts != now.counts:
            pairs = zip(self._names, before.counts, now.counts)
            return next(name for name, old, new in pairs if old != new)
        if not all(map(operator.is_, before.items, now.items)):
            for k, (old, new) in enumerate(zip(before.items, now.items)):
                # A number that was set again is another object of the same value.
                if old is not new and plain(old) != plain(new):
                    return self._name_of(k)
        if before[2:] == now[2:]:
            return None
        versions = zip(self._counted, before.versions, now.versions)
        addresses = zip(self._placed, before.addresses, now.addresses)
        both = itertools.chain(versions, addresses)
        written = next(tensor for tensor, old, new in both if old != new)
        return self._name_of(next(k for k, item in enumerate(now.items) if item is written))

    def _name_of(self, k: int) -> str:
        """Of the k-th item of all."""
        for name, holder in zip(self._names, self._holders):
            if k < len(holder):
                return _joined(name, list(holder)[k] if isinstance(holder, dict) else None)
            k -= len(holder)
        raise IndexError(k)


def holders_in(roots: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those in which the parts of some modules, or other objects, keep what they are made of."""
    for root, value in roots.items():
        if not isinstance(value, torch.nn.Module):
            yield from _within(root, vars(value), _DEPTH)
            continue
        for path, part in value.named_modules():
            yield from _within(f"{root}.{path}".rstrip("."), vars(part), _DEPTH)


def _within(name: str, holder: Any, depth: int) -> Iterator[tuple[str, Any]]:
    yield name, holder
    if depth == 0:
        return
    items = holder.items() if isinstance(holder, dict) else ((None, item) for item in holder)
    for key, item in list(items):
        inner = item if isinstance(item, (dict, list, set)) else _attributes(item)
        if inner is not None and not any(word in str(key) for word in _IGNORED):
            yield from _within(_joined(name, key), inner, depth - 1)


def _attributes(value: Any) -> dict[str, Any] | None:
    """Of a plain object of some class: modules are walked, and tensors looked at, by themselves."""
    if value is None or isinstance(value, _NOT_LOOKED_INTO):
        return None
    return getattr(value, "__dict__", None)


def _has_address(tensor: torch.Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:  # a subclass without storage of its own
        return False


def _joined(name: str, key: Any) -> str:
    """As one would write it in Python; where torch keeps a module's parts is not part of it."""
    internal = key in ("_parameters", "_buffers", "_modules") or not isinstance(key, str)
    return name if internal else f"{name}.{key}"


def plain(value: Any, depth: int = 2) -> Any:
    """A value as something to compare later: numbers and names by value, the rest by id."""
    if isinstance(value, (int, float, str, bool, torch.dtype, torch.device, type(None))):
        return value
    if isinstance(value, torch.Tensor):
        version = 0 if value.is_inference() else value._version
        return id(value), version, value.dtype, value.device, _address(value)
    if depth and isinstance(value, (list, tuple)):
        return tuple(plain(item, depth - 1) for item in value)
    if depth and isinstance(value, dict):
        return tuple((str(k), plain(v, depth - 1)) for k, v in value.items())
    return id(value)


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without storage of its own
        return 0
