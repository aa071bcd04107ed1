"""Quantised weights that are more than a tensor: copies for a replica, and as bytes.

torchao's and quanto's are tensors that copy, move and pickle like any other. bitsandbytes keeps
scales beside the integers, in the weight first and from the first forward on in the module; GGUF's
weights know their kind of blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch


def is_written(weight: torch.nn.Parameter) -> bool:
    """Whether a forward writes to the weight, so that no two modules may share it."""
    return _is_of_bitsandbytes(weight)


def _is_of_bitsandbytes(value: Any) -> bool:
    return type(value).__module__.startswith("bitsandbytes.")


def own_copy(weight: torch.nn.Parameter, device: torch.device) -> Any:
    """Of one that a forward writes to."""
    copied = copy.deepcopy(weight)
    if copied.device != device:
        copied = copied.to(device)
        for name, value in vars(weight).items():
            if value is None:  # it is with the module already: `to` would bring one half back
                setattr(copied, name, None)
    return copied


def move_scales(module: torch.nn.Module, device: torch.device) -> None:
    """Those that the parts of a replica keep, to where its weights are."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if not _is_of_bitsandbytes(value):
                continue
            if name == "quant_state" and getattr(part.weight, name, None) is not None:
                setattr(part, name, part.weight.quant_state)
            for key, held in vars(value).items():
                if isinstance(held, torch.Tensor):
                    setattr(value, key, held.to(device))


class Sent:
    """Stands for a weight where a module is pickled, and comes back as the weight itself."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self._weight = weight
        self.device = weight.device  # which a module's first weight is asked for

    def __reduce__(self) -> Any:
        weight = self._weight
        plain = torch.Tensor._make_subclass(torch.Tensor, weight, False)
        return _weight_of, (type(weight), plain, dict(vars(weight)), weight.requires_grad)


def _weight_of(cls: Any, data: torch.Tensor, own: dict[str, Any], requires_grad: bool) -> Any:
    weight = torch.Tensor._make_subclass(cls, data, requires_grad)
    vars(weight).update(own)
    return weight


def sendable(weights: Iterator[torch.nn.Parameter]) -> Iterator[tuple[int, Any]]:
    """(id, what to pickle in its place) of each: a subclass whose `data` is one as well would be
    pickled by way of that, for ever.
    """
    for weight in weights:
        cls = type(weight)
        endless = issubclass(cls, torch.nn.Parameter) and type(weight.data) is cls
        yield id(weight), Sent(weight) if endless else weight
