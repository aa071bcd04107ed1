"""What the calls of step in one iteration are to each other, and how their latents are one point.

Most loops step once. Some step several latents, each by a scheduler of its own: sound beside video,
every frame of a video. Some step for the clean sample that a scheduler predicts, take that back,
and step again. To the core an iteration has one point and one output: those of all its latents,
laid after one another. Leader and followers do that alike; the leader tells how.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Iteration:
    """Attributes:
    returned: what each call of step returned in the leader's iteration.
    kept: for each call, whether it counts; one that was taken back serves its prediction alone.
    by_token: for each latent, whether its tokens have timesteps of their own.
    shapes: of each latent, of the calls that count.
    """

    returned: list[Any]
    kept: list[bool]
    by_token: list[bool]
    shapes: list[tuple[int, ...]]

    @property
    def calls(self) -> int:
        return len(self.kept)

    def latent_of(self, call: int) -> int:
        """Which latent a call that counts steps."""
        return sum(self.kept[:call])

    def is_last(self, latent: int) -> bool:
        return latent + 1 == len(self.shapes)

    def joined(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """One tensor of the latents, or of their outputs; a single one keeps its shape.

        Smaller ones weigh more, so that each has the same part in the distance of two points:
        a sound's error does not vanish beside a video's. Weights are powers of 2, exact in every
        dtype, and change nothing about a program's rows, which are linear.
        """
        if len(tensors) == 1:
            return tensors[0].detach().to(dtype).contiguous()
        parts = [
            (tensor.detach().to(dtype) * weight).reshape(self._items, -1)
            for tensor, weight in zip(tensors, self._weights)
        ]
        return torch.cat(parts, dim=1)

    def part(self, joined: torch.Tensor, latent: int) -> torch.Tensor:
        """A latent, or its output, in what `joined` gave."""
        if len(self.shapes) == 1:
            return joined
        sizes = [math.prod(shape) // self._items for shape in self.shapes]
        part = joined.narrow(1, sum(sizes[:latent]), sizes[latent])
        return (part / self._weights[latent]).reshape(self.shapes[latent])

    @property
    def _items(self) -> int:
        """Of the batch, where all have one, whose drift is taken item by item."""
        firsts = {shape[0] if len(shape) > 1 else 1 for shape in self.shapes}
        return firsts.pop() if len(firsts) == 1 else 1

    @property
    def _weights(self) -> list[float]:
        sizes = [max(math.prod(shape), 1) for shape in self.shapes]
        return [2.0 ** round(0.5 * math.log2(max(sizes) / size)) for size in sizes]


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """In which values of all these are exact."""
    return functools.reduce(torch.promote_types, dtypes)
