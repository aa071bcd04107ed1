"""`python -m parastep.demo`: one generation sequentially and with parastep, in figures and a
picture.

A small trained model in a real diffusers pipeline makes coloured digits. The table gives rounds
(model forwards of wall time), wall time and distance to the sequential result; out/demo.png shows
the samples side by side and who evaluated which step when.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import Report, parallelize
from .. import plot as plots
from . import image

CLASSES = list(range(10))
SEED = 7


@dataclass
class Run:
    """One way to make the pictures: its latents, seconds, rounds, and the report if it has one."""

    name: str
    latents: torch.Tensor
    seconds: float
    rounds: int
    report: Report | None = None
    threads: int = 1

    def distance(self, exact: torch.Tensor) -> float:
        return float((self.latents - exact).norm() / exact.norm())

    def psnr(self, exact: torch.Tensor) -> float:
        """In dB, of pixels from -1 to 1."""
        squared = float((self.latents - exact).pow(2).mean())
        return 10 * math.log10(4 / squared) if squared > 0 else math.inf


def timed(pipe: Any, steps: int) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    latents = pipe(**image.arguments(CLASSES, SEED, steps)).images
    return latents, time.perf_counter() - began


def sequential(pipe: Any, name: str, steps: int, threads: int) -> Run:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    latents, seconds = timed(pipe, steps)
    torch.set_num_threads(before)
    return Run(name, latents, seconds, steps, threads=threads)


def parallel(pipe: Any, name: str, steps: int, ranks: int, **options: Any) -> Run:
    with parallelize(pipe, devices=["cpu"] * ranks, **options) as wrapped:
        latents, seconds = timed(wrapped, steps)
        report = wrapped.report
    assert report is not None
    return Run(name, latents, seconds, report.rounds, report)


def measure(steps: int, tolerance: float) -> list[Run]:
    """All runs, the sequential one first; wall time counts only up to 2 ranks on 2 cores."""
    pipe = image.load()
    torch.set_num_threads(1)
    sequential(pipe, "warm-up", 3, 1)
    runs = []
    with tqdm(total=9, desc="demo", unit="run") as bar:

        def add(run: Run) -> Run:
            runs.append(run)
            bar.set_postfix_str(f"{run.name}: {run.rounds} rounds")
            bar.update()
            return run

        add(sequential(pipe, "sequential, 1 thread", steps, 1))
        add(sequential(pipe, "sequential, 2 threads", steps, 2))
        add(parallel(pipe, "parastep, exact, 2 ranks", steps, 2, tolerance=0.0))
        for ranks in (2, 4):
            add(parallel(pipe, f"parastep, {ranks} ranks", steps, ranks, tolerance=tolerance))
        ours = add(parallel(pipe, "parastep, 8 ranks", steps, 8, tolerance=tolerance))
        for ranks in (4, 8):
            add(parallel(pipe, f"published rule, {ranks} ranks", steps, ranks, policy="paper"))
        add(sequential(pipe, f"{ours.rounds} steps in place of {steps}", ours.rounds, 1))
    return runs


def table(runs: list[Run]) -> str:
    exact = runs[0].latents
    best = min(run.seconds for run in runs[:2])
    lines = [f"{'':26}  rounds   seconds   of best sequential   distance   PSNR"]
    for run in runs:
        true_time = run.report is None or run.report.ranks <= 2
        seconds = f"{run.seconds:7.2f}   {run.seconds / best:18.2f}" if true_time else " " * 28
        psnr = run.psnr(exact)
        text = "  exact" if psnr == math.inf else f"{psnr:4.0f} dB"
        lines.append(
            f"{run.name:26}  {run.rounds:6d}   {seconds}   {run.distance(exact):8.4f}  {text}"
        )
    return "\n".join(lines)


def picture(runs: list[Run], path: pathlib.Path) -> None:
    """Samples of the telling runs, one a row, above the timeline of the run on 4 ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_name = {run.name: run for run in runs}
    fewer = runs[-1]
    rows = [runs[0], by_name["published rule, 8 ranks"], by_name["parastep, 8 ranks"], fewer]
    figure = pyplot.figure(figsize=(11, 8), dpi=110, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
    axes = top.subplots(len(rows), 1)
    exact = runs[0].latents
    for run, axis in zip(rows, axes):
        pictures = np.concatenate(list(image.to_image(run.latents)), axis=1)
        axis.imshow(pictures, interpolation="bicubic")
        axis.set_axis_off()
        psnr = run.psnr(exact)
        off = "" if psnr == math.inf else f", {psnr:.0f} dB to sequential"
        axis.set_title(f"{run.name}: {run.rounds} rounds{off}", loc="left", fontsize=10)
    report = by_name["parastep, 4 ranks"].report
    assert report is not None
    plots.timeline(report, bottom.subplots())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m parastep.demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/demo.png"))
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    runs = measure(options.steps, options.tolerance)
    print(table(runs))
    picture(runs, options.out)
    print(f"\npicture: {options.out}")


if __name__ == "__main__":
    main()
