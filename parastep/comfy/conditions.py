"""ComfyUI: how many conditions a model call evaluates, which is what devices can share out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

ONE = "one condition a step (cfg 1, or a guider with one): there is nothing to share"
_OPTIMIZED = "disable_cfg1_optimization"
_REPLACED = "sampler_calc_cond_batch_function"


def active(conds: Sequence[Any], timestep: torch.Tensor) -> int:
    """Of lists of conditions, those that count at a noise level (B,), as the host has it."""
    found = [cond for each in conds if each is not None for cond in each]
    if not any("timestep_start" in cond or "timestep_end" in cond for cond in found):
        return len(found)
    level = float(timestep[0])
    return sum(_is_active(cond, level) for cond in found)


def _is_active(cond: Any, level: float) -> bool:
    start, end = (cond.get(name) for name in ("timestep_start", "timestep_end"))
    return not (start is not None and level > start) and not (end is not None and level < end)


def nothing_to_share(guider: Any, options: dict[str, Any], sigmas: torch.Tensor) -> str | None:
    """Why calls of this guider have nothing to share out in most steps, or None."""
    if _REPLACED in options:
        return "a function of the model evaluates its conditions itself"
    conds = list(guider.conds.values())
    if _is_off(guider) and not options.get(_OPTIMIZED, False):
        conds = [guider.conds.get("positive", ())]
    levels = sigmas[:-1] if len(sigmas) > 1 else sigmas
    counts = [active(conds, level.reshape(1)) for level in levels.cpu()]
    several = sum(count > 1 for count in counts)
    return None if 2 * several > len(counts) else ONE


def _is_off(guider: Any) -> bool:
    """Whether all scales of its guidance are 1, at which the host leaves the others out."""
    scales = [
        value
        for name, value in vars(guider).items()
        if name.startswith("cfg") and isinstance(value, (int, float))
    ]
    return bool(scales) and all(math.isclose(scale, 1.0) for scale in scales)
