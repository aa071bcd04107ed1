"""How far from the sequential result, at how many rounds: this method, the published rule, others.

The trained image model of the demo, guidance 3, seeds that nothing was tuned on; each seed is a run
of its own with `--batch` pictures. Distance is the relative L2 distance of the final latents to the
sequential N-step result, PSNR that of the mean squared error over seeds (peak to peak 2).

    python tests/bench/fidelity.py
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from _rules import best_warmup, paradigms, sequential
from _table import arguments, show, verdict, write

import parastep
from parastep.demo import image

SCHEDULERS = ("ddim", "dpmpp2m")
TOLERANCES = (0.001, 0.005, 0.02)
FIRST_SEED = 100  # the demo's and the tests' seeds are below
TARGET = 1 / 20


@dataclass
class Line:
    """One rule over all seeds."""

    rule: str
    rounds: list[int] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    squared: list[float] = field(default_factory=list)

    def add(self, result: torch.Tensor, rounds: int, exact: torch.Tensor) -> None:
        self.rounds.append(rounds)
        self.distance.append(float((result - exact).norm() / exact.norm()))
        self.squared.append(float((result - exact).pow(2).mean()))

    @property
    def mean(self) -> float:
        return statistics.mean(self.distance)

    @property
    def psnr(self) -> float:
        return 10 * math.log10(4 / max(statistics.mean(self.squared), 1e-30))

    def row(self) -> list[Any]:
        rounds = statistics.mean(self.rounds)
        return [self.rule, rounds, self.mean, max(self.distance), f"{self.psnr:.1f}"]

    def figures(self) -> dict[str, Any]:
        return {"rule": self.rule, "rounds": self.rounds, "distance": self.distance,
                "psnr": self.psnr}  # fmt: skip


class Model:
    """The image model with one scheduler: programs and denoisers by number of steps."""

    def __init__(self, scheduler: str, batch: int) -> None:
        self.scheduler, self.batch = scheduler, batch
        self.pipe = image.load(scheduler=scheduler)

    def program(self, steps: int) -> Any:
        return parastep.trace(image.make_scheduler(self.scheduler), steps)

    def denoiser(self, seed: int, steps: int) -> Callable[..., torch.Tensor]:
        classes = [(seed + k) % len(image.CLASSES) for k in range(self.batch)]
        return image.denoiser(classes, steps, 3.0, self.scheduler, self.pipe)

    def start(self, seed: int) -> torch.Tensor:
        return image.noise(self.batch, seed) * self.pipe.scheduler.init_noise_sigma


class Seed:
    """One start of one model: its sequential result, and every rule's distance to it."""

    def __init__(self, model: Model, seed: int, steps: int, lines: dict[str, Line]) -> None:
        self.model, self.seed, self.lines = model, seed, lines
        self.program, self.f = model.program(steps), model.denoiser(seed, steps)
        self.x = model.start(seed)
        self.exact, _ = sequential(self.program, self.f, self.x)

    def add(self, name: str, result: torch.Tensor, rounds: int) -> None:
        self.lines.setdefault(name, Line(name)).add(result, rounds, self.exact)

    def ours(self, ranks: int) -> None:
        for tolerance in TOLERANCES:
            result, report = parastep.sample(
                self.program, self.f, self.x, ranks=ranks, tolerance=tolerance
            )
            self.add(f"parastep, tolerance {tolerance}", result, report.rounds)

    def published(self, ranks: int, warmup: int) -> None:
        result, report = parastep.sample(
            self.program, self.f, self.x, ranks=ranks, policy="paper", warmup=warmup
        )
        self.add(f"published rule, W = {warmup}", result, report.rounds)

    def others(self, ranks: int, rounds: int) -> None:
        """Fewer steps at our number of rounds, and ParaDiGMS at some tolerances."""
        fewer = self.model.program(rounds), self.model.denoiser(self.seed, rounds)
        result, _ = sequential(*fewer, self.x)
        self.add(f"fewer steps instead ({rounds})", result, rounds)
        for tau in (0.03, 0.1):
            self.add(f"ParaDiGMS, tau {tau}", *paradigms(self.program, self.f, self.x, ranks, tau))


def compare(scheduler: str, ranks: int, options: Any) -> tuple[dict[str, Line], Line]:
    """All rules for one scheduler and number of ranks; returns them and ours at the tolerance."""
    model, lines = Model(scheduler, options.batch), {}
    numbers = range(FIRST_SEED, FIRST_SEED + options.seeds)
    seeds = [Seed(model, number, options.steps, lines) for number in numbers]
    for seed in seeds:
        seed.ours(ranks)
        seed.published(ranks, 5)
    ours = lines[f"parastep, tolerance {options.tolerance}"]
    rounds = math.ceil(statistics.mean(ours.rounds))
    for seed in seeds:
        for warmup in best_warmup(options.steps, ranks, rounds):
            if warmup != 5:
                seed.published(ranks, warmup)
        seed.others(ranks, rounds)
    return lines, ours


def judged(lines: dict[str, Line], ours: Line) -> list[list[Any]]:
    """Ours against the published rule with W = 5 and with its best W at our rounds or more."""
    rows = []
    rounds = statistics.mean(ours.rounds)
    rules = [line for line in lines.values() if line.rule.startswith("published")]
    reachable = [line for line in rules if statistics.mean(line.rounds) >= rounds]
    best = min(reachable, key=lambda line: line.mean) if reachable else None
    for against in (lines["published rule, W = 5"], best):
        if against is not None:
            ratio = ours.mean / against.mean
            their = statistics.mean(against.rounds)
            rows.append([against.rule, their, rounds, f"1/{1 / ratio:.1f}", verdict(ratio, TARGET)])
    return rows


def main() -> None:
    options = arguments("fidelity", seeds=16, batch=1, steps=50, ranks="2,4,8", tolerance=0.001)
    torch.set_num_threads(1)
    found = []
    for scheduler in SCHEDULERS:
        for ranks in map(int, options.ranks.split(",")):
            lines, ours = compare(scheduler, ranks, options)
            title = f"{scheduler}, {options.steps} steps, {ranks} ranks, {options.seeds} seeds"
            columns = ["rule", "rounds", "distance", "worst seed", "PSNR dB"]
            show(title, columns, [line.row() for line in lines.values()])
            verdicts = judged(lines, ours)
            if ranks == 8:
                columns = ["against", "its rounds", "ours", "distance", "target 1/20"]
                show(f"{ours.rule}, worst seed {max(ours.distance):.2g}", columns, verdicts)
            found.append({"scheduler": scheduler, "ranks": ranks, "steps": options.steps,
                          "tolerance": options.tolerance, "verdicts": verdicts,
                          "lines": [line.figures() for line in lines.values()]})  # fmt: skip
    write(options.json, {"fidelity": found})


if __name__ == "__main__":
    main()
