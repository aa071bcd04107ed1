"""What `parastep.plan` predicts beside what is measured: rounds, and wall time over a link.

Rounds: one run of the demo's image model on 8 ranks is the profile, other ranks, tolerances, steps
and seeds are predicted; the same of strided runs of the image and the video model, from one run on
4 ranks and from three runs.  Wall time: a denoiser that only waits, on ranks that share one link,
which waits too, once for each latent in either direction; the profile is such a run without a link.
What to do with so many devices: what `plan` gives, from all strided runs in 50 steps at the default
tolerance.

    python tests/bench/plan.py
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from typing import Any

import numpy as np
import torch
from _table import arguments, show, verdict, write

import parastep
from parastep.demo import image, video
from parastep.planning.rounds import Pace, Profile, rounds_of

GOAL = 0.10
SEEDS = (100, 101, 102)
WAIT, SIZE = 0.05, 2.2e6  # seconds of a forward, bytes of a latent
TOLERANCES, STRIDED = (0.002, 0.01, 0.04), (0.04, 0.12)
LINKS = {"2.5GB/s": 2.5e9, "25GbE": 3.125e9, "500MB/s": 0.5e9}


def image_runs(scheduler: str, steps: int) -> dict[tuple[int, float, int], Any]:
    """Reports by ranks, tolerance and seed."""
    pipe = image.MODEL.load(scheduler=scheduler)
    program = parastep.trace(image.MODEL.make_scheduler(scheduler), steps)
    found = {}
    for seed in SEEDS:
        f = image.MODEL.denoiser([seed % 10], steps, scheduler=scheduler, pipe=pipe)
        x = image.MODEL.noise(1, seed) * pipe.scheduler.init_noise_sigma
        for ranks in (2, 4, 8):
            for tolerance in TOLERANCES:
                found[ranks, tolerance, seed] = parastep.sample(
                    program, f, x, ranks=ranks, tolerance=tolerance, max_stride=1
                )[1]
    return found


def rounds(scheduler: str) -> tuple[list[list[Any]], list[float]]:
    """A row for each number of steps and ranks, and by how much each prediction is off."""
    runs = {steps: image_runs(scheduler, steps) for steps in (28, 50)}
    profile = Profile.of(runs[50][8, 0.04, SEEDS[0]])
    rows, off = [], []
    for steps, reports in runs.items():
        for ranks in (2, 4, 8):
            cells = []
            for tolerance in TOLERANCES:
                own = [reports[ranks, tolerance, seed].rounds for seed in SEEDS]
                told = len(rounds_of(profile.at(steps), ranks, tolerance))
                measured = statistics.mean(own)
                off.append(abs(told - measured) / measured)
                cells.append(f"{told} / {measured:.1f}")
            rows.append([scheduler, steps, ranks, *cells])
    return rows, off


def strided_runs(name: str) -> dict[tuple[int, float, int], list[Any]]:
    """Reports of all seeds, by ranks, tolerance and steps."""
    model = {"image": image, "video": video}[name].MODEL
    pipe, found = model.load(), {}
    for steps in (28, 50):
        program = parastep.trace(model.make_scheduler(), steps)
        for ranks in (1, 2, 4, 8):
            for tolerance in STRIDED:
                reports = found[ranks, tolerance, steps] = []
                for seed in SEEDS:
                    f = model.denoiser([seed % 4], steps, pipe=pipe)
                    x = model.noise(1, seed) * getattr(pipe.scheduler, "init_noise_sigma", 1.0)
                    run = parastep.sample(program, f, x, ranks=ranks, tolerance=tolerance)
                    reports.append(run[1])
    return found


TOLD = ((4, 0.04, 50), (1, 0.04, 50), (4, 0.12, 28))  # what strided runs are predicted from


def strided_rounds(name: str, count: int, runs: Any) -> tuple[list[list[Any]], list[float]]:
    """As `rounds`, from so many of TOLD, of each seed in turn; the other seeds are judged."""
    rows, off = [], []
    paces = [Pace.of(*(runs[key][k] for key in TOLD[:count])) for k in range(len(SEEDS))]
    for steps in (28, 50):
        for tolerance in STRIDED:
            cells = []
            for ranks in (1, 2, 4, 8):
                own = [report.rounds for report in runs[ranks, tolerance, steps]]
                told = [len(pace.windows(steps, ranks, tolerance)) for pace in paces]
                for k, predicted in enumerate(told):
                    measured = statistics.mean(own[:k] + own[k + 1 :])
                    off.append(abs(predicted - measured) / measured)
                cells.append(f"{statistics.mean(told):.1f} / {statistics.mean(own):.1f}")
            rows.append([name, steps, tolerance, *cells])
    return rows, off


DEVICES = (1, 2, 4, 8, 16)


def uses(runs: Any) -> list[list[Any]]:
    """Speed-ups of ranks and of pairs on so many devices, with the rounds that they take, from the
    runs of a model: a forward of a second, latents of 1 MB, PCIe.
    """
    profile = [r for key, found in runs.items() if key[1:] == (0.04, 50) for r in found]
    given = {"profile": profile, "forward": 1, "latents": 1e6, "overhead": 0}
    ranks = parastep.plan(50, ranks=DEVICES, **given)
    exact = parastep.plan(50, ranks=1, split=2, tolerance="exact", **given)[0].speedup
    rows = [[1, _told(ranks[0]), "", ""]]
    for devices, single in list(zip(DEVICES, ranks))[1:]:
        (pairs,) = parastep.plan(50, ranks=devices // 2, split=2, **given)
        rows.append([devices, _told(single), _told(pairs), f"{exact:.1f}x"])
    return rows


def _told(plan: Any) -> str:
    return f"{plan.speedup:.1f}x ({plan.rounds})"


class Way:
    """One direction of a link, which carries one latent at a time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.free, self.lock = seconds, 0.0, threading.Lock()

    def carry(self) -> None:
        with self.lock:  # its time is the link's own: threads that wake late delay nobody else
            self.free = max(self.free, time.perf_counter()) + self.seconds
            until = self.free
        time.sleep(max(until - time.perf_counter(), 0.0))


def waiting(ranks: int, rate: float) -> Any:
    """The report of a run whose followers are reached over a link of that rate."""
    out, back = (Way(SIZE / rate if rate < math.inf else 0.0) for _ in range(2))
    program = parastep.Program.flow_euler(np.linspace(1, 0, 31))

    def denoiser(x: np.ndarray, step: int, rank: int) -> np.ndarray:
        if rank > 0:
            out.carry()
        time.sleep(WAIT)
        if rank > 0:
            back.carry()
        return 0.5 * x

    x = np.ones((1, 1024), np.float32)
    return parastep.sample(program, denoiser, x, ranks=ranks, tolerance=math.inf, max_stride=1)[1]


def quickest(repeats: int, ranks: int, rate: float) -> Any:
    """Other work on the machine only ever lengthens a run."""
    reports = [waiting(ranks, rate) for _ in range(repeats)]
    return min(reports, key=lambda report: report.seconds)


def wall(repeats: int) -> tuple[list[list[Any]], list[float]]:
    rows, off = [], []
    for ranks in (2, 4, 8):
        profile = quickest(repeats, ranks, math.inf)
        for link, rate in {"none": math.inf, **LINKS}.items():
            report = quickest(repeats, ranks, rate)
            known = {"profile": profile, "latents": SIZE, "latency": 0, "tolerance": math.inf}
            (told,) = parastep.plan(30, ranks=ranks, link=min(rate, 1e15), **known)
            off.append(abs(told.seconds - report.seconds) / report.seconds)
            rows.append([ranks, link, f"{told.seconds:.3f}", f"{report.seconds:.3f}",
                         f"{off[-1]:.1%}"])  # fmt: skip
    return rows, off


def main() -> None:
    options = arguments("plan", repeats=7)
    torch.set_num_threads(1)
    figures = {}
    for scheduler in ("ddim", "dpmpp2m"):
        rows, off = rounds(scheduler)
        columns = ["model", "steps", "ranks", *(f"tolerance {t}" for t in TOLERANCES)]
        title = f"rounds: predicted from one run / measured, mean of {len(SEEDS)} seeds"
        show(title, columns, rows)
        figures[scheduler] = off
        mean = statistics.mean(off)
        print(f"off by {mean:.1%} on average, {max(off):.0%} at worst: {verdict(mean, GOAL)}")
    for name in ("image", "video"):
        runs = strided_runs(name)
        columns = ["devices", "ranks of one", "pairs, .9", "exact, a pair"]
        show(f"what to do with devices, {name}: told (rounds)", columns, uses(runs))
        for count in (1, len(TOLD)):
            rows, off = strided_rounds(name, count, runs)
            columns = ["model", "steps", "tolerance", *(f"{p} ranks" for p in (1, 2, 4, 8))]
            show(f"strided rounds: predicted from {count} / measured, means", columns, rows)
            figures[f"{name} {count}"] = off
            mean = statistics.mean(off)
            print(f"off by {mean:.1%} on average, {max(off):.0%} at worst: {verdict(mean, GOAL)}")
    rows, off = wall(options.repeats)
    title = f"wall time: {WAIT * 1e3:.0f} ms a forward, 30 steps, latents of {SIZE / 1e6} MB"
    show(title, ["ranks", "link", "predicted s", "measured s", "off"], rows)
    print(f"off by {max(off):.1%} at worst: {verdict(max(off), GOAL)}")
    write(options.json, {"plan": {"rounds": figures, "wall": off}})


if __name__ == "__main__":
    main()
