"""What leader and followers share at the seam with a pipeline: hooks, containers, latents in
inputs.

Hooks are attributes set on instances for the length of a call: on the denoisers' calls, the
scheduler's `step`, the encoders' methods. Nothing here knows of rounds.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .replicas import encoders_of

_ENCODER_METHODS = ("encode", "get_text_features", "get_image_features")


class Hooks:
    """Attributes replaced on instances, put back in reverse order."""

    def __init__(self) -> None:
        self._placed: list[tuple[Any, str, Any, bool, Any]] = []
        self._classes: list[tuple[Any, type, type]] = []

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

        self.place(obj, name, replaced)

    def wrap_call(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        """`hook(run, *args, **kwargs)` in place of a call of the module, forward hooks and all.

        `forward` has it too, for who calls that directly; not where the module is compiled in
        place, since the compiled code would trace into it.
        """
        running = False

        def outermost(original: Any, *args: Any, **kwargs: Any) -> Any:
            if running:
                return original(*args, **kwargs)

            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal running
                running = True
                try:
                    return original(*args, **kwargs)
                finally:
                    running = False

            return hook(run, *args, **kwargs)

        if is_compiled_in_place(module):
            self.wrap(module, "_compiled_call_impl", outermost)
        else:
            self.wrap(module, "_call_impl", outermost)
            self.wrap(module, "forward", outermost)

    def wrap_encoders(self, pipe: Any, hook_of: Callable[[tuple[str, str]], Any]) -> None:
        """`hook_of((name, method))` in place of all that the pipeline calls of its encoders."""
        for name, module in encoders_of(pipe).items():
            self.wrap_call(module, hook_of((name, "forward")))
            for method in _ENCODER_METHODS:
                if hasattr(module, method):
                    self.wrap(module, method, hook_of((name, method)))

    def wrap_method(self, obj: Any, name: str, hook: Callable[..., Any]) -> None:
        """`hook(instance, original, *args, **kwargs)` as a bound method, as pipelines inspect it.

        A deep copy of obj takes the hook along, bound to the copy; `original` is then the copy's.
        """
        method = getattr(obj, name)
        if getattr(method, "__self__", None) is not obj:  # a function of the user's own, set on obj
            self.wrap(obj, name, functools.partial(hook, obj))
            return
        function = method.__func__

        @functools.wraps(function)
        def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
            return hook(self, types.MethodType(function, self), *args, **kwargs)

        self.place(obj, name, types.MethodType(replaced, obj))

    def wrap_property(self, obj: Any, name: str, hook: Callable[..., Any]) -> None:
        """`hook(read)` in place of a property of this instance, whose class is a twin meanwhile."""
        cls = type(obj)
        read = getattr(cls, name).__get__
        value = property(lambda self: hook(functools.partial(read, self)))
        obj.__class__ = twin = type(cls.__name__, (cls,), {name: value})
        self._classes.append((obj, twin, cls))

    def restore(self) -> None:
        """A value that is no longer ours (another library wrapped it meanwhile) is left alone."""
        while self._classes:
            obj, twin, cls = self._classes.pop()
            if type(obj) is twin:
                obj.__class__ = cls
        while self._placed:
            obj, name, value, had, old = self._placed.pop()
            own = vars(obj)
            if own.get(name) is value:
                if had:
                    own[name] = old
                else:
                    del own[name]


def is_compiled_in_place(module: torch.nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """New containers of the same kinds with every tensor mapped; the rest is passed on as it is."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):  # diffusers' and transformers' outputs are dicts too
        mapped = {key: map_tensors(function, item) for key, item in value.items()}
        return type(value)(**mapped) if dataclasses.is_dataclass(value) else type(value)(mapped)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **map_tensors(function, fields))
    own = getattr(value, "__dict__", {})
    if any(isinstance(item, torch.Tensor) for item in own.values()):
        value = copy.copy(value)  # a distribution of latents, an output class of the user's own
        vars(value).update(map_tensors(function, dict(own)))
    return value


@functools.cache
def _step_names(cls: Any) -> tuple[str, ...]:
    """The parameters of a scheduler's step; where a subclass passes on whatever it is given, or has
    names of its own, those of the class that it derives from.
    """
    for base in cls.__mro__:
        if "step" in vars(base):
            parameters = list(inspect.signature(vars(base)["step"]).parameters.values())[1:]
            names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
            if names[:1] == ("model_output",) and {"timestep", "sample"} < set(names):
                return names
    return ()


def named_arguments(scheduler: Any, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """A call of a scheduler's step by its parameters' names; None where it does not fit.

    Made at every step on every rank, so by hand: `Signature.bind` costs as much as an iteration.
    """
    cls: Any = type(scheduler)
    names = _step_names(cls)
    if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
        return None
    named = dict(zip(names, args)) | kwargs
    return named if named.keys() >= {"model_output", "timestep", "sample"} else None


def first_times(scheduler: Any, timestep: Any) -> torch.Tensor:
    """The scheduler's timesteps from this one on, which a loop handed to its first step."""
    timesteps = torch.as_tensor(scheduler.timesteps)
    begin = getattr(scheduler, "_begin_index", None)
    if begin is None:
        matches = (timesteps == torch.as_tensor(timestep, device=timesteps.device)).nonzero()
        begin = int(matches[0]) if len(matches) else 0
    return timesteps[begin:]


def sample_in(result: Any) -> torch.Tensor | None:
    """The new sample in what a scheduler's step returned."""
    if isinstance(result, (tuple, list)) and result:
        result = result[0]
    elif isinstance(result, dict):
        result = result.get("prev_sample")
    elif not isinstance(result, torch.Tensor):
        result = getattr(result, "prev_sample", None)
    return result if isinstance(result, torch.Tensor) else None


def inputs_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of more than one dimension that a denoiser is called with, its likely latent
    first.
    """
    found = []
    named = [kwargs[k] for k in ("hidden_states", "sample") if k in kwargs]
    rest = [v for k, v in kwargs.items() if k not in ("hidden_states", "sample")]
    for value in (*named, *args, *rest):
        if isinstance(value, list) and value and all(isinstance(v, torch.Tensor) for v in value):
            if all(v.shape == value[0].shape for v in value):  # one tensor an item of the batch
                value = torch.stack(value)
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            found.append(value)
    return found


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


def is_rounded(x: torch.Tensor, rounded: torch.Tensor) -> bool:
    """Whether `rounded` is x in another dtype, or x itself."""
    return x.shape == rounded.shape and torch.equal(x.to(rounded.dtype), rounded)


class Outputs:
    """The denoisers' outputs of the first iteration, which skipped calls return again.

    Only their shapes and containers matter: what the pipeline makes of them never reaches the
    solver, so it may even work on them in place. They are values that were really computed, since
    zeros would divide by zero in some pipelines.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[torch.Size | None, Any]] = {}

    def keep(self, module: Any, ordinal: int, inputs: list[torch.Tensor], output: Any) -> None:
        shape = inputs[0].shape if inputs else None
        self._kept[id(module), ordinal] = (shape, map_tensors(torch.Tensor.detach, output))

    def fake(self, module: Any, ordinal: int, inputs: list[torch.Tensor]) -> Any:
        """An output for this call; None where none can be made and the caller must evaluate."""
        shape = inputs[0].shape if inputs else None
        exact = self._kept.get((id(module), ordinal))
        own = [kept for (key, _), kept in self._kept.items() if key == id(module)]
        for seen, output in (*([exact] if exact else []), *(own or self._kept.values())):
            if seen == shape:
                return map_tensors(torch.Tensor.detach, output)  # the container may be edited too
        for seen, output in own:
            if seen is not None and shape is not None and seen[1:] == shape[1:]:
                return _with_batch(output, seen[0], shape[0])
        return None


def _with_batch(output: Any, before: int, after: int) -> Any:
    """The output with another batch size: calls that are not there in the first iteration."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != before:
            return tensor.detach()
        picks = torch.arange(after, device=tensor.device) % before
        return tensor.index_select(0, picks)

    return map_tensors(change, output)
