"""What a pipeline's loop hands to its denoisers and to its scheduler's step, by name and shape.

Nothing here knows of rounds, or of hooks.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch

_SCALE = re.compile(r"(guidance|cfg)_scale")


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


def guidance_of(pipe: Any, bound: inspect.BoundArguments) -> tuple[Any, ...] | None:
    """The settings of a call's guidance, or None where it evaluates one branch alone, as far as its
    arguments and the denoisers' configurations tell.
    """
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            arguments.setdefault(name, parameter.default)
    if getattr(pipe, "guider", None) is not None:
        return ("guider", type(pipe.guider))
    scales = {k: v for k, v in arguments.items() if _SCALE.search(k) and _is_above_one(v)}
    negative = any(v is not None for k, v in arguments.items() if k.startswith("negative_prompt"))
    if "true_cfg_scale" in arguments:
        scales = {k: v for k, v in scales.items() if k == "true_cfg_scale" and negative}
    elif any(map(_is_distilled, vars(pipe).values())):
        return None
    return tuple(sorted((k, str(v)) for k, v in scales.items())) or None


def _is_above_one(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_above_one, value))
    return isinstance(value, (int, float)) and value > 1


def _is_distilled(component: Any) -> bool:
    """Whether it is given its guidance as a number, and evaluates one branch."""
    config = getattr(component, "config", None)
    own = getattr(config, "guidance_embeds", False) or getattr(config, "time_cond_proj_dim", None)
    return isinstance(component, torch.nn.Module) and bool(own)


def first_times(scheduler: Any, timestep: Any) -> torch.Tensor:
    """The scheduler's timesteps from this one on, which a loop handed to its first step."""
    timesteps = torch.as_tensor(scheduler.timesteps)
    begin = getattr(scheduler, "_begin_index", None)
    if begin is None:
        matches = (timesteps == torch.as_tensor(timestep, device=timesteps.device)).nonzero()
        begin = int(matches[0]) if len(matches) else 0
    return timesteps[begin:]


def iterations_of(pipe: Any) -> int | None:
    """How many a pipeline's loop has, where it says so."""
    count = getattr(pipe, "_num_timesteps", None)
    return count if isinstance(count, int) and count > 0 else None


def loop_times(pipe: Any, scheduler: Any, first: Any) -> torch.Tensor:
    """What the loop will hand to step, by the scheduler's list from the first one on."""
    left, count = first_times(scheduler, first), iterations_of(pipe)
    return left[:count] if count is not None and count < len(left) else left


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
