"""ComfyUI: the rows of a sampler on a model's noise levels, kept for the next run with the same."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable
from typing import Any

import torch

from ..tracing.kdiffusion import Traced, trace

_traced: weakref.WeakKeyDictionary[Any, dict[Hashable, Traced]] = weakref.WeakKeyDictionary()
_TRACES = 16  # kept for each noise schedule


def _alpha(schedule: Any, levels: torch.Tensor) -> Any:
    """Scales of the clean latent at each noise level, by how the host adds noise to one: 1, or
    1 - sigma in flow models. None where it does not say.
    """
    clean = torch.ones(len(levels), 1)
    try:
        noisy = schedule.noise_scaling(levels.clone(), torch.zeros_like(clean), clean)
    except Exception:  # a class of another pack's own
        return None
    return noisy.flatten().double().cpu().numpy()


def rows_of(
    stock: Any,
    model: Any,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    options: dict[str, Any],
) -> Traced:
    """The rows of a sampler function, kept for the next run with the same noise levels."""
    schedule = model.inner_model.inner_model.model_sampling

    def made() -> Traced:
        found = trace(stock, model, sigmas, extra_args, options)
        return dataclasses.replace(found, alpha=_alpha(schedule, found.levels))

    kept = _traced.setdefault(schedule, {})
    key = (stock, tuple(sigmas.tolist()), tuple(sorted(options.items(), key=lambda item: item[0])))
    try:
        if key in kept:
            return kept[key]
    except TypeError:  # an option that cannot be hashed
        return made()
    found = kept[key] = made()
    while len(kept) > _TRACES:
        del kept[next(iter(kept))]
    return found
