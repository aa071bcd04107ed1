"""The rules that parastep is held against, each as one plain function on a `parastep.Program`.

`f(x, step)` is the guided denoiser on torch tensors; all return (x_N, rounds). They are written for
clarity, evaluate nothing in parallel and count rounds as if they did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Denoiser = Callable[[torch.Tensor, int], torch.Tensor]


class Rows:
    """Applies rows of a program to lists of latents and outputs."""

    def __init__(self, program: Any) -> None:
        self.a, self.b, self.s = program.a, program.b, program.s
        self.steps, self.memory = self.a.shape

    def step(self, j: int, x: dict[int, torch.Tensor], m: dict[int, torch.Tensor]) -> torch.Tensor:
        total = torch.zeros_like(x[j])
        for k in range(min(self.memory, j + 1)):
            if self.a[j, k]:
                total = total + self.a[j, k] * x[j - k]
            if self.b[j, k]:
                total = total + self.b[j, k] * m[j - k]
        return total


def sequential(program: Any, f: Denoiser, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    rows, xs, ms = Rows(program), {0: x}, {}
    for j in range(rows.steps):
        ms[j] = f(xs[j], j)
        xs[j + 1] = rows.step(j, xs, ms)
    return xs[rows.steps], rows.steps


def published(
    program: Any, f: Denoiser, x: torch.Tensor, ranks: int, warmup: int
) -> tuple[torch.Tensor, int]:
    """ParaStep, arXiv 2505.14741: in a window rank r reuses its own last output up to its step.

    Everything is accepted; rank 0 steps with the others' outputs on the true latents. Written
    without the core, so that `policy="paper"` has something to be checked against.
    """
    rows, xs, ms, rounds = Rows(program), {0: x}, {}, 0
    own: dict[int, torch.Tensor] = {}
    j = 0
    while j < min(warmup, rows.steps):
        ms[j] = f(xs[j], j)
        xs[j + 1] = rows.step(j, xs, ms)
        own = dict.fromkeys(range(ranks), ms[j])
        j, rounds = j + 1, rounds + 1
    while j < rows.steps:
        window = range(min(ranks, rows.steps - j))
        outputs = {}
        for rank in window:
            guess, outs = dict(xs), dict(ms)
            for step in range(j, j + rank):
                outs[step] = own[rank]
                guess[step + 1] = rows.step(step, guess, outs)
            outputs[rank] = f(guess[j + rank], j + rank)
        for rank in window:
            own[rank] = ms[j] = outputs[rank]
            xs[j + 1] = rows.step(j, xs, ms)
            j += 1
        rounds += 1
    return xs[rows.steps], rounds


def paradigms(
    program: Any, f: Denoiser, x: torch.Tensor, ranks: int, tau: float
) -> tuple[torch.Tensor, int]:
    """ParaDiGMS, arXiv 2305.16317: a sliding window of Picard iterations with a tolerance.

    Its error is measured per step against tau^2 times the noise variance after it; the last
    position of all never passes, as in the published program.
    """
    rows, rounds = Rows(program), 0
    steps = rows.steps
    xs = {j: x.clone() for j in range(steps + 1)}
    ms: dict[int, torch.Tensor] = {}
    begin, end = 0, min(ranks, steps)
    variance = [*(rows.s[1:] ** 2), 0.0]
    while begin < steps:
        ms.update({j: f(xs[j], j) for j in range(begin, end)})
        change = {j: rows.step(j, xs, ms) - xs[j] for j in range(begin, end)}
        new, total, failed = {}, xs[begin], None
        for j in range(begin, end):
            total = total + change[j]
            new[j + 1] = total
            off = float((total - xs[j + 1]).flatten(1).pow(2).mean(1).max())
            if failed is None and off > tau * tau * variance[j]:
                failed = j - begin
        rounds += 1
        xs.update(new)
        done = min(1 + (failed if failed is not None else end - begin), end - begin)
        begin, before = begin + done, end
        end = min(begin + ranks, steps)
        for j in range(before, end):
            xs[j + 1] = xs[before].clone()
    return xs[steps], rounds


def best_warmup(steps: int, ranks: int, rounds: int) -> list[int]:
    """Warm-ups whose number of rounds is the smallest that is not below `rounds`."""
    count = {w: w + int(np.ceil((steps - w) / ranks)) for w in range(1, steps + 1)}
    least = min((n for n in count.values() if n >= rounds), default=steps)
    return [w for w, n in count.items() if n == least]
