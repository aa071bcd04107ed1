"""Carries the unguided output beside the guided one, for samplers that work with both (CFG++).

They learn of it by a function of their own that the host calls after guidance. With d the guided
output and d + q the unguided one, the core's vectors have two parts along the batch: latents (x, x)
and outputs (d, d + q). Rows of a sampling program are numbers and cannot mix the parts, so what q
adds to coming latents is handed over like noise, from the q of calls so far. Used by `sampling` and
`lanes`.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..threads import finish_work
from ..tracing.kdiffusion import AFTER_GUIDANCE, UNGUIDED_TOO, Function

Array = npt.NDArray[np.float64]
_DAMPING = 0.5  # of the slope along which q goes on, as the core's guesses of d


class Unguided:
    """A function to be called after guidance: keeps the unguided output, changes nothing."""

    def __init__(self) -> None:
        self.seen: torch.Tensor | None = None

    def __call__(self, given: dict[str, Any]) -> torch.Tensor:
        self.seen = given["uncond_denoised"]
        guided: torch.Tensor = given["denoised"]
        return guided


def with_function(arguments: dict[str, Any], function: Function) -> dict[str, Any]:
    """A model call's arguments with one more function after guidance."""
    options = dict(arguments.get("model_options") or {})
    options[AFTER_GUIDANCE] = [*options.get(AFTER_GUIDANCE, ()), function]
    options[UNGUIDED_TOO] = True
    return {**arguments, "model_options": options}


@contextlib.contextmanager
def telling(options: dict[str, Any], function: Function) -> Iterator[None]:
    """The same in the sampler's own options, for one call: functions may keep things in there."""
    before = {name: options[name] for name in (AFTER_GUIDANCE, UNGUIDED_TOO) if name in options}
    options[AFTER_GUIDANCE] = [*before.get(AFTER_GUIDANCE, ()), function]
    options[UNGUIDED_TOO] = True
    try:
        yield
    finally:
        for name in (AFTER_GUIDANCE, UNGUIDED_TOO):
            del options[name]
        options.update(before)


class Guidance:
    """q in one run: what of it the rows use, by what has been evaluated so far."""

    def __init__(self, b: Array, e: Array, home: torch.device) -> None:
        """b and e (N, H): the rows' weights of d_{j-k} and q_{j-k}. `home`: the leader's device."""
        self._home = home
        self._rows = e, e - b  # of the two parts; the core has b (d + q) in the second already
        self._kept = e.shape[1] + 1  # calls that rows and slopes look back on
        self._q: dict[int, torch.Tensor] = {}

    def take(self, step: int, output: torch.Tensor) -> None:
        """An output (d, d + q) of this call; or of a guess of it, until the call comes."""
        guided, unguided = output.chunk(2)
        q = unguided - guided
        finish_work(q.device)  # the leader's thread reads it, on another stream
        self._q[step] = q

    def ahead(self, first: int, end: int) -> list[torch.Tensor]:
        """What q adds to the latents (x, x) in rows first .. end - 1."""
        held = sorted(self._q)  # at once: a follower that is late may add to it meanwhile
        steps = [step for step in held if step >= first - self._kept]
        for step in held[: len(held) - len(steps)]:
            del self._q[step]
        if not steps or first >= end:
            return []
        rows = [
            [self._weights(part[j], j, steps) for part in self._rows] for j in range(first, end)
        ]
        known = torch.stack([self._q[step].to(self._home) for step in steps])
        matrix = torch.tensor(rows, dtype=known.dtype, device=known.device)
        made = torch.tensordot(matrix, known, 1).flatten(1, 2)
        return list(torch.nan_to_num(made, posinf=0.0, neginf=0.0))  # by one that was refused

    @staticmethod
    def _weights(row: Array, j: int, steps: list[int]) -> list[float]:
        """Row j in terms of the q on hand: one between them is on the line through its neighbours,
        one beyond them on that through the newest two.
        """
        weights = [0.0] * len(steps)
        for back, weight in enumerate(row[: j + 1].tolist()):
            after = min(bisect_left(steps, j - back), len(steps) - 1)
            before = max(after - 1, 0)
            part = (j - back - steps[before]) / (steps[after] - steps[before] or 1)
            if part > 1.0:
                part = 1.0 + _DAMPING * (part - 1.0)
            weights[before] += weight * (1.0 - part)
            weights[after] += weight * part
        return weights
