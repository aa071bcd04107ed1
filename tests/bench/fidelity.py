"""How far from the sequential result, at how many rounds: this method, the published rule, others.

The trained models of the demo, image, video and sound, and one that nothing was ever tuned on,
signs, with their own scheduler and guidance, on seeds that nothing was tuned on; each seed is a run
of its own with one sample. PSNR is that of the mean squared error over seeds, of what people see
(peak to peak 2), with the worst seed beside it; distance is the relative L2 distance of the
latents.

    python tests/bench/fidelity.py --models image video --ranks 8 --seeds 4
    python tests/bench/fidelity.py --steps 200 --tolerance calibrated default --others 0

"calibrated" is what `parastep.calibrate` finds on seeds of its own for 45 dB. The other rules run
at the rounds of the first tolerance, those for one device with the best of several settings, which
are chosen for each seed by its distance; `--max-stride 0` is the library's own default.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import _models
import torch
from _caches import Caches
from _rules import (
    best_warmup,
    chords,
    chords_starts,
    nearest,
    paradigms,
    sequential,
    skipping,
    skipping_settings,
)
from _table import arguments, show, verdict, write

import parastep
from parastep.tracing import schedulers

FIRST_SEED = 400  # those of the demo, of the tests and of tuning are below
CALIBRATION_SEEDS = range(300, 316)
NEAR = 1 / 20  # of the published rule's distance, every step evaluated, 8 ranks, 50 steps
GRID = "a fixed grid, extrapolated"
MEAN_DB, WORST_DB = 45.0, 38.0
ROUNDS = {50: {1: 20, 2: 15, 4: 12, 8: 11}, 200: {1: 24, 2: 18, 4: 13, 8: 12}}  # at these dB
UNCALIBRATED = 1.5  # times as many rounds


@dataclass
class Line:
    """One rule over all seeds."""

    rule: str
    rounds: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    squared: list[float] = field(default_factory=list)

    def add(self, result: torch.Tensor, rounds: float, seed: Seed) -> None:
        decode = seed.task.model.decode
        self.rounds.append(rounds)
        self.distance.append(float((result - seed.exact).norm() / seed.exact.norm()))
        self.squared.append(float((decode(result) - decode(seed.exact)).pow(2).mean()))

    @property
    def mean_rounds(self) -> float:
        return statistics.mean(self.rounds)

    @property
    def mean(self) -> float:
        return statistics.mean(self.distance)

    @property
    def psnr(self) -> float:
        return psnr(statistics.mean(self.squared))

    @property
    def worst(self) -> float:
        return psnr(max(self.squared))

    @property
    def factor(self) -> float:
        return UNCALIBRATED if "default" in self.rule else 1.0

    def row(self) -> list[Any]:
        decibels = [f"{self.psnr:.1f}", f"{self.worst:.1f}"]
        return [self.rule, self.mean_rounds, max(self.rounds), self.mean, *decibels]

    def figures(self) -> dict[str, Any]:
        return {"rule": self.rule, "rounds": self.rounds, "distance": self.distance,
                "psnr": self.psnr, "worst": self.worst}  # fmt: skip


def psnr(squared: float) -> float:
    return 10 * math.log10(4 / max(squared, 1e-30))


class Task:
    """One model with one scheduler: programs, levels and denoisers by number of steps."""

    def __init__(self, name: str, scheduler: str | None) -> None:
        self.name, self.model, self.scheduler = name, _models.load(name), scheduler
        self.pipe = self.model.load(scheduler=scheduler)
        self.ratios: dict[int, list[float]] = {}  # for MagCache, by number of steps
        self.coarse = self.model.load(scheduler=scheduler, dtype=torch.bfloat16)

    def program(self, steps: int) -> Any:
        return parastep.trace(self.model.make_scheduler(self.scheduler), steps)

    def levels(self, steps: int) -> schedulers.Levels:
        grid = self.model.make_scheduler(self.scheduler)
        grid.set_timesteps(steps)
        return schedulers.levels_of(grid, grid.timesteps)

    def denoiser(self, seed: int, steps: int, pipe: Any = None) -> Callable[..., torch.Tensor]:
        classes, pipe = [seed % len(self.model.classes)], pipe or self.pipe
        return self.model.denoiser(classes, steps, scheduler=self.scheduler, pipe=pipe)


class Seed:
    """One start of one model: its sequential result, and what every rule makes of it."""

    def __init__(self, task: Task, number: int, steps: int) -> None:
        self.task, self.number, self.steps = task, number, steps
        self.program, self.f = task.program(steps), task.denoiser(number, steps)
        scale = getattr(task.pipe.scheduler, "init_noise_sigma", 1.0)  # flow schedulers have none
        self.x = task.model.noise(1, number) * scale
        self.exact, _ = sequential(self.program, self.f, self.x)

    def ours(self, ranks: int, **options: Any) -> tuple[torch.Tensor, int]:
        result, report = parastep.sample(self.program, self.f, self.x, ranks=ranks, **options)
        return result, report.rounds

    def fewer(self, steps: int, scheduler: str | None = None) -> tuple[torch.Tensor, int]:
        model, classes = self.task.model, [self.number % len(self.task.model.classes)]
        name = scheduler or self.task.scheduler
        program = parastep.trace(model.make_scheduler(name), steps)
        f = model.denoiser(classes, steps, scheduler=name, pipe=self.task.pipe)
        return sequential(program, f, self.x)

    def grids(self, forwards: int) -> dict[str, tuple[torch.Tensor, int]]:
        """A fixed grid with each of its settings, and with the one nearest for this seed."""
        found = {
            f"{GRID}: {warmup} first, order {order}":
                skipping(self.program, self.f, self.x, forwards, warmup, order)
            for warmup, order in skipping_settings(forwards)
        }  # fmt: skip
        return found | {GRID: nearest(found.values(), self.exact)}

    @functools.cached_property
    def caches(self) -> Caches:
        """What there is for transformers like this one."""
        network = self.task.pipe.transformer
        if hasattr(network, "enable_cache") and self.steps not in self.task.ratios:
            other = Seed(self.task, CALIBRATION_SEEDS[0], self.steps)
            cache = Caches(network, other.program, other.f, other.x)
            self.task.ratios[self.steps] = cache.ratios()
        ratios = self.task.ratios.get(self.steps)
        return Caches(network, self.program, self.f, self.x, ratios)

    def others(self, ranks: int, rounds: int) -> dict[str, tuple[torch.Tensor, float]]:
        """Every other rule, at our rounds or the nearest that it can do."""
        given = self.program, self.f, self.x
        found: dict[str, Any] = {"fewer steps instead": self.fewer(rounds)}
        if ranks == 1:
            found["fewer steps, DPM++ 2M"] = self.fewer(rounds, "dpmpp2m")
            found |= self.grids(rounds)
            if hasattr(self.task.pipe, "transformer"):
                found |= self.caches.nearest(rounds, self.exact)
            coarse = self.task.denoiser(self.number, self.steps, self.task.coarse)
            found["all steps, the model in bfloat16"] = sequential(self.program, coarse, self.x)
            return found
        for warmup in sorted({5, *best_warmup(self.steps, ranks, rounds)}):
            name = f"published rule, W = {warmup}"
            found[name] = self.ours(ranks, policy="paper", warmup=warmup)
        for tau in (0.03, 0.1):
            found[f"ParaDiGMS, tau {tau}"] = paradigms(*given, ranks, tau)
        if self.program.a.shape[1] == 1:  # it jumps over steps, which only one-step solvers can
            levels, starts = self.task.levels(self.steps), chords_starts(self.steps, ranks)
            for hit in (0, 1):
                found[f"CHORDS, hit {hit}"] = chords(levels, self.f, self.x, starts, hit)
        return found


def calibrated(task: Task, steps: int, ranks: int) -> float:
    """The tolerance that `calibrate` finds for the model, on seeds of its own."""
    seeds = [Seed(task, number, steps) for number in CALIBRATION_SEEDS]
    at: Seed = seeds[0]

    def call(k: int) -> torch.Tensor:
        nonlocal at
        at = seeds[k]
        return at.x

    def denoiser(x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
        return at.f(x, step)

    found = parastep.calibrate(seeds[0].program, call, denoiser, target=MEAN_DB, runs=len(seeds),
                               decode=task.model.decode, ranks=ranks)  # fmt: skip
    print(f"\n{task.name}, {steps} steps, {ranks} ranks: calibrated\n{found}", flush=True)
    return found.tolerance


def one_grid(lines: dict[str, Line]) -> dict[str, Line]:
    """Without all grids but the best for each seed, and the one that is best for all of them."""
    settings = [rule for rule in lines if rule.startswith(f"{GRID}: ")]
    best = max(settings, key=lambda rule: lines[rule].psnr, default=None)
    return {rule: line for rule, line in lines.items() if rule not in settings or rule == best}


def compare(seeds: list[Seed], ranks: int, options: Any) -> tuple[list[Line], list[Line]]:
    """Our lines, one a tolerance, and those of the other rules at the first one's rounds."""
    ours = []
    for tolerance in options.tolerance:
        given: dict[str, Any] = {"max_stride": options.max_stride or None}
        name = tolerance
        if tolerance == "calibrated":
            given["tolerance"] = calibrated(seeds[0].task, seeds[0].steps, ranks)
            name = f"{given['tolerance']:g} ({tolerance})"
        elif tolerance != "default":
            given["tolerance"] = parastep.tolerance.number_of(_number(tolerance))
        line = Line(f"parastep, tolerance {name}")
        for seed in seeds:
            line.add(*seed.ours(ranks, **given), seed)
        ours.append(line)
    rounds = math.ceil(ours[0].mean_rounds)
    lines: dict[str, Line] = {}
    for seed in seeds if options.others else []:
        for name, found in seed.others(ranks, rounds).items():
            lines.setdefault(name, Line(name)).add(*found, seed)
    return ours, list(one_grid(lines).values())


def _number(text: str) -> Any:
    return text if text.isalpha() else float(text)


def judged(ours: Line, others: list[Line], ranks: int, steps: int) -> list[list[Any]]:
    """The targets: near the sequential result beside the published rule, and rounds at these dB."""
    rows = []
    rules = [line for line in others if line.rule.startswith("published")]
    reachable = [line for line in rules if line.mean_rounds >= ours.mean_rounds]
    if ranks == 8 and steps == 50 and reachable:
        best = min(reachable, key=lambda line: line.mean)
        ratio = ours.mean / best.mean
        row = [f"distance, of {best.rule} at {best.mean_rounds:.3g} rounds", f"1/{1 / ratio:.3g}"]
        rows.append([*row, "1/20", verdict(ratio, NEAR)])
    if steps in ROUNDS:
        target = ours.factor * ROUNDS[steps][ranks]
        rows += [
            ["rounds", ours.mean_rounds, target, verdict(ours.mean_rounds, target)],
            ["PSNR dB", ours.psnr, MEAN_DB, verdict(ours.psnr, MEAN_DB, least=True)],
            ["worst seed dB", ours.worst, WORST_DB, verdict(ours.worst, WORST_DB, least=True)],
        ]
    return rows


def main() -> None:
    options = arguments(
        "fidelity", models=list(_models.NAMES), scheduler="", steps=[50], ranks=[1, 2, 4, 8],
        seeds=16, tolerance=["default", "calibrated"], max_stride=0, others=1,
    )  # fmt: skip
    torch.set_num_threads(1)
    found = []
    for name in options.models:
        task = Task(name, options.scheduler or None)
        for steps in options.steps:
            numbers = range(FIRST_SEED, FIRST_SEED + options.seeds)
            seeds = [Seed(task, number, steps) for number in numbers]
            for ranks in options.ranks:
                ours, others = compare(seeds, ranks, options)
                verdicts = {line.rule: judged(line, others, ranks, steps) for line in ours}
                title = f"{name}, {steps} steps, {ranks} ranks, {options.seeds} seeds"
                columns = ["rule", "rounds", "most", "distance", "PSNR dB", "worst seed"]
                show(title, columns, [line.row() for line in [*ours, *others]])
                for rule, rows in verdicts.items():
                    if rows:
                        show(rule, ["", "measured", "target", ""], rows)
                found.append({"model": name, "ranks": ranks, "steps": steps, "verdicts": verdicts,
                              "ours": [line.figures() for line in ours],
                              "others": [line.figures() for line in others]})  # fmt: skip
    write(options.json, {"fidelity": found})


if __name__ == "__main__":
    main()
