"""How far from the sequential result, at how many rounds: this method, the published rule, others.

The trained image model of the demo, guidance 3, seeds that nothing was tuned on; each seed is a run of
its own with `--batch` pictures. Distance is the relative L2 distance of the final latents to the
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
from _rules import best_warmup, paradigms, published, sequential
from _table import arguments, show, verdict, write

import parastep
from parastep.demo import image

SCHEDULERS = ("ddim", "dpmpp2m")
TOLERANCES = (0.002, 0.005, 0.01, 0.02, 0.05)
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


def run_seed(model: Model, seed: int, steps: int, ranks: int, lines: dict[str, Line]) -> None:
    """All rules on one seed; the rules at equal rounds come after, when ours are known."""
    program, f, x = model.program(steps), model.denoiser(seed, steps), model.start(seed)
    exact, _ = sequential(program, f, x)
    for tolerance in TOLERANCES:
        result, report = parastep.sample(program, f, x, ranks=ranks, tolerance=tolerance)
        name = f"parastep, tolerance {tolerance}"
        lines.setdefault(name, Line(name)).add(result, report.rounds, exact)
    result, report = parastep.sample(program, f, x, ranks=ranks, policy="paper", warmup=5)
    name = "published rule, W = 5"
    lines.setdefault(name, Line(name)).add(result, report.rounds, exact)


def run_equal(
    model: Model, seed: int, steps: int, ranks: int, rounds: int, lines: dict[str, Line]
) -> None:
    """The other rules at our number of rounds."""
    program, f, x = model.program(steps), model.denoiser(seed, steps), model.start(seed)
    exact, _ = sequential(program, f, x)
    for warmup in best_warmup(steps, ranks, rounds):
        name = f"published rule, W = {warmup}"
        if warmup != 5:
            line = lines.setdefault(name, Line(name))
            line.add(*published(program, f, x, ranks, warmup), exact)
    fewer, _ = sequential(model.program(rounds), model.denoiser(seed, rounds), x)
    name = f"fewer steps instead ({rounds})"
    lines.setdefault(name, Line(name)).add(fewer, rounds, exact)
    for tau in (0.03, 0.1, 0.3):
        name = f"ParaDiGMS, tau {tau}"
        line = lines.setdefault(name, Line(name))
        line.add(*paradigms(program, f, x, ranks, tau), exact)


def compare(scheduler: str, ranks: int, options: Any) -> tuple[dict[str, Line], Line]:
    """All rules for one scheduler and number of ranks; returns them and ours at the tolerance."""
    model, lines = Model(scheduler, options.batch), {}
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    for seed in seeds:
        run_seed(model, seed, options.steps, ranks, lines)
    ours = lines[f"parastep, tolerance {options.tolerance}"]
    rounds = math.ceil(statistics.mean(ours.rounds))
    for seed in seeds:
        run_equal(model, seed, options.steps, ranks, rounds, lines)
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
    options = arguments("fidelity", seeds=16, batch=2, steps=50, ranks="2,4,8", tolerance=0.01)
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
