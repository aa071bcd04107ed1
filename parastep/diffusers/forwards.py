"""One call of a denoiser, taken apart: what it was given and what it gave, by name; several joined
to one, one cut to several, and two compared.

Batched lanes (`batching`) join the calls of several steps, teams (`teams`) cut one call.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .arguments import inputs_in
from .tensors import map_tensors

RULES = ("items", "multiples", "top")  # by which a call is cut, see `Inputs.cut`
_VALUES = (
    *(torch.Tensor, type(None), bool, int, float, complex, str, bytes),
    *(torch.dtype, torch.device, torch.Size, enum.Enum),
)

# How far the same item may differ, alone and in a batch, relative to its rms: other kernels and
# other orders of sums do. The core allows ranks as much.
_ROUNDING = {
    torch.float64: 2.0**-20,
    torch.float32: 2.0**-12,
    torch.float16: 2.0**-7,
    torch.bfloat16: 2.0**-5,
}

# And in shares of one forward, by which all that reaches the host may differ from it whole.
_ROUNDING_OF_SHARES = {
    torch.float64: 2.0**-40,
    torch.float32: 2.0**-16,
    torch.float16: 2.0**-9,
    torch.bfloat16: 2.0**-7,
}
_TF32 = 2.0**-10

# ---- inputs --------------------------------------------------------------------------------------


class Apart(Exception):
    """Calls that cannot be one call; the text says why."""


class Inputs:
    """The arguments of one call of a denoiser, taken apart: what they hold, by name and in order.

    `items` is the size of its batch, by the first input that looks like latents.
    """

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        named = {f"argument {k}": value for k, value in enumerate(args, 1)} | kwargs
        self.values = dict(_leaves(named, ""))
        latents = inputs_in(args, kwargs)
        self.items = latents[0].shape[0] if latents else 1
        self.shape = latents[0].shape if latents else torch.Size()
        self.device = latents[0].device if latents else torch.device("cpu")

    def own_copy(self) -> Inputs:
        return Inputs(map_tensors(torch.clone, self.args), map_tensors(torch.clone, self.kwargs))

    def altered(self) -> Inputs:
        """With another latent and another timestep."""
        return self.with_values([self._altered(value) for value in self.values.values()])

    def _altered(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype == torch.bool:
            return value
        times = value.dim() < 2 and value.numel() in (1, self.items)
        if not times and value.shape != self.shape:
            return value
        return value * 0.5 if value.is_floating_point() else value // 2

    def unlike(self, other: Inputs) -> str | None:
        """The first value whose kind, shape or (but for tensors) contents differ, or None."""
        if self.values.keys() != other.values.keys():
            return "the arguments"
        pairs = zip(self.values.items(), other.values.values())
        return next((name for (name, ours), theirs in pairs if not _alike(ours, theirs)), None)

    def equals(self, other: Inputs) -> bool:
        if self.unlike(other) is not None:
            return False
        pairs = zip(self.values.values(), other.values.values())
        return all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))

    def joined(self, others: Sequence[Inputs]) -> Inputs:
        """One call of all, self first; they are alike. Raises Apart."""
        every = [self, *others]
        columns = zip(*(inputs.values.values() for inputs in every))
        names = self.values.keys()
        return self.with_values([self._join(name, column) for name, column in zip(names, columns)])

    def _join(self, name: str, column: Sequence[Any]) -> Any:
        first, items = column[0], self.items
        if not isinstance(first, torch.Tensor):
            return first
        if first.dim() == 0 or tuple(first.shape) == (1,):  # a timestep: one an item
            return torch.cat([value.reshape(1).expand(items) for value in column]).to(self.device)
        if first.shape[0] == items:
            return torch.cat(tuple(column))
        if all(torch.equal(first, value) for value in column[1:]):
            return first
        if first.shape[0] == 1:
            return torch.cat([value.expand(items, *first.shape[1:]) for value in column])
        shape = tuple(first.shape)
        raise Apart(f"{name} {shape} differs from step to step and has no axis of {items} items")

    def cut(self, count: int, rule: str) -> list[Inputs]:
        """Calls that evaluate this one's items in shares, the first of them the smallest.

        By the rule "items", every tensor with as many entries as there are items is cut, and every
        list with a tensor an item; by "multiples" those with a multiple of that too (frames of
        every video, folded into the batch); by "top" nothing that lies within containers.
        """
        bounds = [share * self.items // count for share in range(count + 1)]
        pairs = zip(bounds, bounds[1:])
        return [
            Inputs(
                tuple(self._share(value, begin, end, rule) for value in self.args),
                {name: self._share(v, begin, end, rule) for name, v in self.kwargs.items()},
            )
            for begin, end in pairs
        ]

    def _share(self, value: Any, begin: int, end: int, rule: str, top: bool = True) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            each, rest = divmod(value.shape[0], self.items)
            if each == 1 and rest == 0 or (each > 1 and rest == 0 and rule == "multiples"):
                return value[begin * each : end * each]
            return value
        if rule == "top" or type(value) not in (list, tuple, dict):
            return value
        if top and self.is_list(value):
            return value[begin:end]
        if type(value) is dict:
            return {k: self._share(v, begin, end, rule, False) for k, v in value.items()}
        return type(value)(self._share(v, begin, end, rule, False) for v in value)

    def is_list(self, value: Any) -> bool:
        """Whether it is a list with a tensor for each item."""
        tensors = type(value) is list and all(isinstance(item, torch.Tensor) for item in value)
        return tensors and len(value) == self.items

    @property
    def of_lists(self) -> bool:
        return any(map(self.is_list, (*self.args, *self.kwargs.values())))

    @property
    def versions(self) -> list[int]:
        """Of its tensors: another one after somebody has written to them."""
        tensors = (v for v in self.values.values() if isinstance(v, torch.Tensor))
        return [tensor._version for tensor in tensors if not tensor.is_inference()]

    @property
    def state(self) -> tuple[list[str], list[int]]:
        """Another one after a denoiser has written to what it was given: tensors, or containers."""
        return list(Inputs(self.args, self.kwargs).values), self.versions

    @property
    def opaque(self) -> str | None:
        """An argument that is neither tensor nor plain value, in containers of Python's own: nobody
        can tell whether it is what it was, or what a denoiser does to it.
        """
        found = (name for name, value in self.values.items() if not isinstance(value, _VALUES))
        return next(found, None)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Of its kind: the same denoiser can be expected to take both in the same way."""
        return tuple(
            (name, tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else (name, type(v))
            for name, v in self.values.items()
        )

    def is_same(self, other: Inputs) -> bool:
        """Bit for bit; what is the very same object costs no comparison."""
        if self.values.keys() != other.values.keys():
            return False
        return all(map(is_same, self.values.values(), other.values.values()))

    def with_values(self, values: Sequence[Any]) -> Inputs:
        """The same containers around other values, in the order of `values`."""
        left = iter(values)
        args = tuple(_rebuilt(value, left) for value in self.args)
        return Inputs(args, {name: _rebuilt(value, left) for name, value in self.kwargs.items()})


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What containers hold, with names like those that would reach it."""
    if type(value) is dict:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif type(value) in (list, tuple):
        for k, item in enumerate(value):
            yield from _leaves(item, f"{name}[{k}]")
    else:
        yield name, value


def _rebuilt(value: Any, left: Iterator[Any]) -> Any:
    """The same containers with what is left, in the order of `_leaves`."""
    if type(value) is dict:
        return {key: _rebuilt(item, left) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rebuilt(item, left) for item in value)
    return next(left)


def _alike(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    try:
        return ours is theirs or (type(ours) is type(theirs) and bool(ours == theirs))
    except Exception:  # whatever compares in another way
        return False


def is_same(ours: Any, theirs: Any) -> bool:
    """Whether two values are one, or have the same bits."""
    if ours is theirs:
        return True
    if not _alike(ours, theirs):
        return False
    if isinstance(ours, torch.Tensor):
        return ours.stride() == theirs.stride() and have_same_bits(ours, theirs)
    return not isinstance(ours, float) or ours.hex() == theirs.hex()


def have_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """0 and -0 are equal and not the same, NaN is not equal and may be the same."""
    if ours.is_floating_point() and ours.element_size() in _BITS:
        ours, theirs = (t.view(_BITS[t.element_size()]) for t in (ours, theirs))
    return torch.equal(ours, theirs)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---- outputs -------------------------------------------------------------------------------------


def parts_of(output: Any, count: int) -> list[Any]:
    """The output of each of the calls that were joined. Raises Apart."""

    def part_of(k: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def part(tensor: torch.Tensor) -> torch.Tensor:
            items, rest = divmod(tensor.shape[0] if tensor.dim() else 0, count)
            if rest or not items:
                raise Apart(f"its output {tuple(tensor.shape)} is no batch of {count} steps")
            return tensor[k * items : (k + 1) * items]

        return part

    return [map_tensors(part_of(k), output) for k in range(count)]


def joined(outputs: Sequence[Any], lists: bool) -> Any:
    """The output of the call whose shares gave these; `lists`: with an entry for each item.

    Raises Apart where they have not one form.
    """
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        forms = {(output.shape[1:], output.dtype) for output in outputs}
        if len(forms) > 1:
            raise Apart(f"its output has another form: {sorted(map(str, forms))}")
        if first.dim() == 0:
            raise Apart("its output holds a number for all items")
        return torch.cat(tuple(outputs))
    if type(first) is list and lists and all(isinstance(value, torch.Tensor) for value in first):
        return [value for output in outputs for value in output]
    if isinstance(first, dict):
        own = {key: joined([output[key] for output in outputs], lists) for key in first}
        return type(first)(**own) if dataclasses.is_dataclass(first) else type(first)(own)
    if isinstance(first, (list, tuple)):
        columns = [joined(column, lists) for column in zip(*outputs, strict=True)]
        return type(first)(*columns) if hasattr(first, "_fields") else type(first)(columns)
    if any(output is not None for output in outputs):
        raise Apart(f"its output holds more than tensors: {type(first).__name__}")
    return None


def tensors_in(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)  # type: ignore[func-returns-value]
    return found


def is_finite(output: Any) -> bool:
    """Whether no NaN or Inf is in it."""
    return all(map(_is_finite, tensors_in(output)))


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.is_cpu and tensor.dtype in _ROUNDING:  # a tenth of the time, and NaN is passed on
        return all(math.isfinite(edge.item()) for edge in tensor.aminmax())
    return bool(torch.isfinite(tensor).all())


def shares_memory(output: Any, inputs: Inputs) -> bool:
    """Whether an output shares memory with what the denoiser was given, or with another one: who
    edits one then edits both, which a copy from a helper's device would not do.
    """
    given = [value for value in inputs.values.values() if isinstance(value, torch.Tensor)]
    owned = [tensor.untyped_storage().data_ptr() for tensor in tensors_in(output)]
    return len(set(owned)) < len(owned) or any(
        tensor.untyped_storage().data_ptr() in owned for tensor in given
    )


def form_of(output: Any) -> Any:
    """Its containers, shapes and dtypes, to be compared."""
    if isinstance(output, torch.Tensor):
        return output.shape, output.dtype
    if isinstance(output, dict):
        return type(output), tuple((key, form_of(value)) for key, value in output.items())
    if isinstance(output, (list, tuple)):
        return type(output), tuple(map(form_of, output))
    return type(output)


def check_shares(found: Any, wanted: Any) -> None:
    """Raises Apart where an output, joined of shares, is not that of the whole, up to rounding."""
    if form_of(found) != form_of(wanted):
        raise Apart(f"its output in shares has another form: {form_of(found)}")
    check_output(found, wanted, _rounding_of_shares)


def _rounding_of_shares(tensor: torch.Tensor) -> float:
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if tensor.is_cuda and tensor.dtype == torch.float32 and tf32:
        return _TF32
    return _ROUNDING_OF_SHARES.get(tensor.dtype, 0.0)


def _rounding_of_batches(tensor: torch.Tensor) -> float:
    return _ROUNDING.get(tensor.dtype, 0.0)


def check_output(
    found: Any, wanted: Any, rounding: Callable[[torch.Tensor], float] = _rounding_of_batches
) -> None:
    """Raises Apart where the output of a batch is not that alone, up to rounding."""
    pairs = list(zip(tensors_in(found), tensors_in(wanted), strict=True))
    for ours, theirs in pairs:
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise Apart(f"its output in a batch is {tuple(ours.shape)}, not {tuple(theirs.shape)}")
        if not theirs.is_floating_point():
            continue
        apart, size = (ours.double() - theirs.double()).norm(), theirs.double().norm()
        if not apart <= rounding(theirs) * size:
            relative = float(apart / size)
            raise Apart(f"its output in a batch differs from that alone by {relative:.3g} of it")
