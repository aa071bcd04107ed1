"""What leader and followers share at the seam with a pipeline: hooks, containers, latents in
inputs.

Hooks are attributes set on instances for the length of a call: the denoisers' `forward`, the
scheduler's `step`, the encoders' methods. Nothing here knows of rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Hooks:
    """Attributes replaced on instances, put back in reverse order."""

    def __init__(self) -> None:
        self._placed: list[tuple[Any, str, Any, bool, Any]] = []

    def place(self, obj: Any, name: str, value: Any) -> None:
        own = vars(obj)
        self._placed.append((obj, name, value, name in own, own.get(name)))
        own[name] = value

    def wrap(self, obj: Any, name: str, hook: Callable[..., Any]) -> None:
        """`hook(original, *args, **kwargs)` in place of the method; its signature stays."""
        original = getattr(obj, name)

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return hook(original, *args, **kwargs)

        if getattr(obj, "_compiled_call_impl", None) is not None:
            # A module compiled in place would trace into the hook; what the hook calls stays
            # compiled.
            replaced = torch.compiler.disable(replaced, recursive=False)
        self.place(obj, name, replaced)

    def wrap_method(self, obj: Any, name: str, hook: Callable[..., Any]) -> None:
        """`hook(instance, original, *args, **kwargs)` as a bound method, as pipelines inspect it.

        A deep copy of obj takes the hook along, bound to the copy; `original` is then the copy's.
        """
        function = getattr(getattr(obj, name), "__func__", None) or getattr(type(obj), name)

        @functools.wraps(function)
        def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
            return hook(self, types.MethodType(function, self), *args, **kwargs)

        self.place(obj, name, types.MethodType(replaced, obj))

    def restore(self) -> None:
        """A value that is no longer ours (another library wrapped it meanwhile) is left alone."""
        while self._placed:
            obj, name, value, had, old = self._placed.pop()
            own = vars(obj)
            if own.get(name) is value:
                if had:
                    own[name] = old
                else:
                    del own[name]


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The same containers with every tensor mapped; what holds no tensor is passed on as it is."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):  # diffusers' and transformers' outputs are dicts too
        mapped = {key: map_tensors(function, item) for key, item in value.items()}
        return mapped if type(value) is dict else type(value)(**mapped)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **map_tensors(function, fields))
    return value


def main_input(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that a denoiser's forward denoises: its first one of more than one dimension."""
    named = [kwargs[k] for k in ("hidden_states", "sample") if k in kwargs]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            return value
        if isinstance(value, list) and value and all(isinstance(v, torch.Tensor) for v in value):
            if all(v.shape == value[0].shape for v in value):  # one tensor an item of the batch
                return torch.stack(value)
    return None


def latent_in(given: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor | None:
    """The latent of this shape inside a model input: the input itself, one of its equal copies
    along the batch (guidance), or what comes before further channels (masks, image latents).
    """
    if given is not None and given.dim() != len(shape):
        rest = [n for n in given.shape[1:] if n != 1]  # dimensions of size 1 come and go
        if rest == [n for n in shape[1:] if n != 1]:
            given = given.reshape(given.shape[0], *shape[1:])
    if given is None or given.dim() != len(shape):
        return None
    if tuple(given.shape) == tuple(shape):
        return given
    for d in range(1, len(shape)):
        if given.shape[d] > shape[d]:
            return latent_in(given.narrow(d, 0, shape[d]), shape)
    copies, rest = divmod(given.shape[0], shape[0])
    if rest == 0 and tuple(given.shape[1:]) == tuple(shape[1:]):
        parts = given.split(shape[0])
        if all(torch.equal(parts[0], part) for part in parts[1:copies]):
            return parts[0]
    return None


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))


class Outputs:
    """The denoisers' outputs of the first iteration, which skipped calls return again.

    Only their shapes and containers matter: what the pipeline makes of them never reaches the
    solver, so it may even work on them in place. They are values that were really computed, since
    zeros would divide by zero in some pipelines.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[torch.Size | None, Any]] = {}

    def keep(self, module: Any, ordinal: int, given: torch.Tensor | None, output: Any) -> None:
        shape = None if given is None else given.shape
        self._kept[id(module), ordinal] = (shape, map_tensors(torch.Tensor.detach, output))

    def fake(self, module: Any, ordinal: int, given: torch.Tensor | None) -> Any:
        """An output for this call; None where none can be made and the caller must evaluate."""
        shape = None if given is None else given.shape
        exact = self._kept.get((id(module), ordinal))
        if exact is not None and exact[0] == shape:
            return exact[1]
        own = [kept for (key, _), kept in self._kept.items() if key == id(module)]
        for seen, output in own or self._kept.values():
            if seen == shape:
                return output
        for seen, output in own:
            if seen is not None and shape is not None and seen[1:] == shape[1:]:
                return _with_batch(output, seen[0], shape[0])
        return None


def _with_batch(output: Any, before: int, after: int) -> Any:
    """The output with another batch size: calls that are not there in the first iteration."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != before:
            return tensor
        picks = torch.arange(after, device=tensor.device) % before
        return tensor.index_select(0, picks)

    return map_tensors(change, output)
