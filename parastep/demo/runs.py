"""The runs that the demo compares: one generation made in several ways, and a table of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import Report, parallelize
from ..tolerance import REHEARSE
from .common import Model

RANKS = (2, 4, 8)
SEQUENTIAL, OURS, PUBLISHED, FEWER = "sequential", "parastep", "published rule", "fewer steps"


@dataclass
class Run:
    """One way to make the samples: what people see of them, and what it took.

    `pixels` is the decoded latents, in -1 to 1; `report` is None for a sequential run.
    """

    rule: str
    ranks: int
    latents: torch.Tensor
    pixels: torch.Tensor
    rounds: int
    seconds: float
    report: Report | None = None

    @property
    def name(self) -> str:
        if self.rule == FEWER:
            return f"{self.rounds} steps instead"
        return self.rule if self.report is None else f"{self.rule}, {self.ranks} ranks"

    def psnr(self, exact: Run) -> float:
        """In dB, peak to peak 2, infinite where all is equal."""
        squared = float((self.pixels - exact.pixels).pow(2).mean())
        return 10 * math.log10(4 / squared) if squared > 0 else math.inf

    def distance(self, exact: Run) -> float:
        """Relative L2 distance of the latents."""
        return float((self.latents - exact.latents).norm() / exact.latents.norm())


@dataclass(frozen=True)
class Job:
    """What is generated: samples of these classes from this seed."""

    model: Model
    classes: Sequence[int]
    seed: int = 7
    steps: int = 50

    def run(self, pipe: Any, steps: int, rule: str, ranks: int = 1) -> Run:
        began = time.perf_counter()
        latents = pipe(**self.model.arguments(self.classes, self.seed, steps))[0]
        seconds = time.perf_counter() - began
        pixels, report = self.model.decode(latents), getattr(pipe, "report", None)
        rounds = steps if report is None else report.rounds
        return Run(rule, ranks, latents, pixels, rounds, seconds, report)

    def parallel(self, pipe: Any, rule: str, ranks: int, **options: Any) -> Run:
        with parallelize(pipe, devices=["cpu"] * ranks, **options) as wrapped:
            return self.run(wrapped, self.steps, rule, ranks)


def published_rounds(warmup: int, steps: int, ranks: int) -> int:
    """Of the published rule: the warm-up one by one, then windows of all ranks."""
    return warmup + math.ceil((steps - warmup) / ranks)


def warmup_within(rounds: int, steps: int, ranks: int) -> int:
    """The published rule's longest warm-up that takes no more rounds than these."""
    fitting = [w for w in range(1, steps) if published_rounds(w, steps, ranks) <= rounds]
    return max(fitting, default=1)


def compare(job: Job, bar: tqdm[Any], **options: Any) -> list[Run]:
    """The sequential run, ours on several ranks, and at equal rounds the published rule and fewer
    steps instead.

    `options` are `parallelize`'s, for our own runs. Every rank has one thread of torch, so that the
    wall times of up to 2 ranks count on a machine with 2 cores; beside them stands a sequential run
    with 2 threads.
    """
    torch.set_num_threads(1)
    pipe = job.model.load()
    job.run(pipe, 2, SEQUENTIAL)  # the first call of all is slow
    runs = []

    def add(run: Run) -> Run:
        bar.set_postfix_str(f"{run.name}: {run.rounds} rounds")
        bar.update()
        runs.append(run)
        return run

    add(job.run(pipe, job.steps, SEQUENTIAL))
    torch.set_num_threads(2)
    add(job.run(pipe, job.steps, f"{SEQUENTIAL}, 2 threads"))
    torch.set_num_threads(1)
    add(job.parallel(pipe, f"{OURS}, rehearsed", 2, **{**options, "tolerance": REHEARSE}))
    ours = [add(job.parallel(pipe, OURS, ranks, **options)) for ranks in RANKS]
    for run in ours[1:]:
        warmup = warmup_within(run.rounds, job.steps, run.ranks)
        add(job.parallel(pipe, PUBLISHED, run.ranks, policy="paper", warmup=warmup))
    add(job.run(pipe, max(1, ours[-1].rounds), FEWER))
    return runs


def shown(runs: list[Run]) -> list[Run]:
    """The sequential run, and at the most ranks ours, the published rule and fewer steps."""
    most = RANKS[-1]
    return [run for run in runs if run.rule in (SEQUENTIAL, FEWER) or run.ranks == most]


def table(runs: list[Run]) -> str:
    """A line a run: rounds, wall time where every rank had a core, distance and PSNR."""
    exact, best = runs[0], min(run.seconds for run in runs[:2])
    lines = [f"{'':24}  rounds  seconds  of best sequential  distance     PSNR"]
    for run in runs:
        time_of = f"{run.seconds:7.1f}  {run.seconds / best:18.2f}"
        psnr = run.psnr(exact)
        lines.append(
            f"{run.name:24}  {run.rounds:6d}  {time_of if run.ranks <= 2 else '':27}"
            f"  {run.distance(exact):8.4f}  {'  exact' if psnr == math.inf else f'{psnr:4.0f} dB'}"
        )
    return "\n".join(lines)
