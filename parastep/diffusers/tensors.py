"""Tensors wherever a pipeline's code keeps them: mapped within containers, copied, compared."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ..threads import finish_work
from ..tracing.draws import cloned_generator


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


def is_rounded(x: torch.Tensor, rounded: torch.Tensor) -> bool:
    """Whether `rounded` is x in another dtype, or x itself."""
    return x.shape == rounded.shape and torch.equal(x.to(rounded.dtype), rounded)


def own_copy(value: Any) -> Any:
    """A call's argument as nobody else has it: pipelines draw from generators and edit arguments in
    place, and images are read from their files when first used.
    """
    if isinstance(value, torch.Generator):
        return cloned_generator(value)
    if isinstance(value, torch.Tensor):
        return private(value)
    if type(value) in (list, tuple):
        return type(value)(own_copy(item) for item in value)
    if type(value) is dict:
        return {key: own_copy(item) for key, item in value.items()}
    if type(value).__module__.partition(".")[0] in ("PIL", "numpy") and hasattr(value, "copy"):
        return value.copy()
    return value


def generators_in(args: Any, kwargs: Any) -> list[torch.Generator]:
    """Those among a call's arguments, in their order."""
    values = [*args, *kwargs.values()]
    lists = (value if isinstance(value, list) else [value] for value in values)
    return [one for some in lists for one in some if isinstance(one, torch.Generator)]


def private(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def finished(tensor: torch.Tensor) -> torch.Tensor:
    finish_work(tensor.device)
    return tensor
