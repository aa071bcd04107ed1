"""Steps that move each token of a latent by a timestep of its own.

Conditioning tokens of a video have less noise than the rest, and a step moves them by less, often
by nothing. A program has one row for all tokens, so its outputs are taken in the row's measure: as
what moves each token just so by the step that all others make.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from .arguments import sample_in

NAME = "per_token_timesteps"  # as schedulers call them


def are_given(arguments: dict[str, Any]) -> bool:
    value = arguments.get(NAME)
    return isinstance(value, torch.Tensor) and value.numel() > 1


def shares(scheduler: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """How far a step moves each token by its output, over how far it would without timesteps of
    their own: read off copies of the scheduler, of a kind that keeps nothing but its place.
    """
    x = arguments["sample"]
    one = torch.ones(x.shape, dtype=torch.float32, device=x.device)
    each = _moved(scheduler, arguments["timestep"], one, **{NAME: arguments[NAME]})
    all_alike = _moved(scheduler, arguments["timestep"], one.reshape(-1)[:1].reshape([1] * x.dim()))
    return torch.nan_to_num(each / all_alike, nan=0.0, posinf=0.0, neginf=0.0)


def _moved(scheduler: Any, timestep: Any, output: torch.Tensor, **given: Any) -> torch.Tensor:
    step = type(scheduler).step
    result = step(copy.copy(scheduler), output, timestep, torch.zeros_like(output), **given)
    moved = sample_in(result)
    assert moved is not None
    return moved


def in_rows_measure(m: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The output that the row would need to move each token as its own step does by m."""
    return (m * shares).to(m.dtype)


def in_own_measure(m: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The other way; of tokens that do not move the output does not matter."""
    return torch.where(shares == 0, m, m / torch.where(shares == 0, 1.0, shares)).to(m.dtype)
