"""The rules that parastep is held against, each as one plain function on a `parastep.Program`.

`f(x, step)` is the guided denoiser on torch tensors; all return (x_N, rounds). They are written for
clarity, evaluate nothing in parallel and count rounds as if they did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from parastep.demo.runs import published_rounds

Denoiser = Callable[[torch.Tensor, int], torch.Tensor]

# Where the cores of CHORDS start, of 50 steps: its own list for 8, every second or fourth of those
# for fewer.
CHORDS_STARTS = {8: (0, 2, 4, 8, 16, 24, 32, 40), 4: (0, 4, 16, 32), 2: (0, 16)}


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


class Jumps:
    """One step of DDIM or flow Euler from any level to any later one.

    Clean sample and noise that the model's output implies are held, so over one step of such a
    solver it is the solver. `levels` are those of `parastep.tracing.schedulers.levels_of`.
    """

    def __init__(self, levels: Any) -> None:
        self.levels = levels
        self.alpha, self.s = [*levels.alpha, 1.0], [*levels.s, 0.0]

    def __call__(self, x: torch.Tensor, m: torch.Tensor, a: int, c: int) -> torch.Tensor:
        clean = self.levels.p[a] * x + self.levels.q[a] * m
        noise = (x - self.alpha[a] * clean) / self.s[a]
        return self.alpha[c] * clean + self.s[c] * noise


def chords_starts(steps: int, ranks: int) -> list[int]:
    """The published list of starts for the cores, stretched from 50 steps to `steps`."""
    starts = CHORDS_STARTS[ranks]
    return [round(start * steps / 50) for start in starts]


def chords(
    levels: Any, f: Denoiser, x: torch.Tensor, starts: list[int], hit: int
) -> tuple[torch.Tensor, int]:
    """CHORDS, arXiv 2507.15260: cores that start further and further along, each one rectified by
    the core before it; `hit` 1 is the fastest core's result, 2 the next one's, 0 the last start's.

    Core 0 is the plain solver. Each core keeps an anchor, the last point that was put right; when
    the core before it evaluates at that very step, both jump from there to the present, and the
    difference is added.
    """
    jump, steps, cores = Jumps(levels), len(levels.s), len(starts)
    at, point = {0: 0}, {0: x}
    anchor: dict[int, tuple[int, torch.Tensor, torch.Tensor | None]] = {0: (0, x, None)}
    wanted, rounds = cores - hit, 0
    while at.get(wanted, 0) < steps:
        live = [k for k in at if at[k] < steps]
        step, before = dict(at), dict(point)
        output = {k: f(point[k], at[k]) for k in live}
        rounds += 1
        newest = max(at)
        for k in live:
            t, m = step[k], output[k]
            point[k], at[k] = jump(before[k], m, t, t + 1), t + 1
            begin, old, old_m = anchor[k]
            if begin == t:
                old_m = m
                anchor[k] = begin, old, m
            if k and k - 1 in output and step[k - 1] == begin and old_m is not None:
                new = jump(before[k - 1], output[k - 1], begin, t + 1)
                point[k] = point[k] + new - jump(old, old_m, begin, t + 1)
                anchor[k] = t + 1, point[k], None
        if rounds == newest + 1:  # its first evaluation: the next core starts from there
            begin = starts[newest]
            if newest + 1 < cores:
                after = starts[newest + 1]
                start = jump(before[newest], output[newest], begin, after)
                at[newest + 1], point[newest + 1] = after, start
                anchor[newest + 1] = after, start, None
            elif hit == 0:
                return jump(before[newest], output[newest], begin, steps), rounds
    return point[wanted], rounds


def skipping(
    program: Any, f: Denoiser, x: torch.Tensor, forwards: int, warmup: int = 2, order: int = 1
) -> tuple[torch.Tensor, int]:
    """Evaluates the first `warmup` steps and others that are evenly spread, so many in all, and
    extrapolates the rest, without a check.

    As tools that cache outputs from step to step do: the outputs of the last evaluated steps, one
    more than the order, are continued along a polynomial.
    """
    rows, xs, ms = Rows(program), {0: x}, {}
    warmup = min(warmup, forwards - 1, rows.steps)
    spread = np.linspace(warmup, rows.steps - 1, forwards - warmup)
    evaluated = {*range(warmup), *(int(round(step)) for step in spread)}
    known: list[int] = []
    for j in range(rows.steps):
        if j in evaluated:
            ms[j] = f(xs[j], j)
            known = [*known, j][-1 - order :]
        else:
            ms[j] = sum(w * ms[k] for w, k in zip(_lagrange(known, j), known))
        xs[j + 1] = rows.step(j, xs, ms)
    return xs[rows.steps], len(evaluated)


def _lagrange(known: list[int], at: int) -> list[float]:
    """The weights of values there in the polynomial through them."""
    return [math.prod((at - k) / (j - k) for k in known if k != j) for j in known]


def skipping_settings(forwards: int) -> list[tuple[int, int]]:
    """The warm-ups and orders that `skipping` is tried with at so many forwards."""
    warmups = sorted({min(warmup, forwards - 1) for warmup in (1, 2, 3, 5, 8)})
    return [(warmup, order) for warmup in warmups for order in (0, 1, 2)]


def nearest(runs: Iterable[tuple[torch.Tensor, Any]], exact: torch.Tensor) -> Any:
    """The run that comes nearest to the exact result, which nobody could choose who does not have
    that already.
    """
    return min(runs, key=lambda run: float((run[0] - exact).norm()))


def best_warmup(steps: int, ranks: int, rounds: int) -> list[int]:
    """Warm-ups whose number of rounds is the smallest that is not below `rounds`."""
    count = {w: published_rounds(w, steps, ranks) for w in range(1, steps + 1)}
    least = min((n for n in count.values() if n >= rounds), default=steps)
    return [w for w, n in count.items() if n == least]
