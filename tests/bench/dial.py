"""The quality dial as a curve: how near the sequential result, at how many rounds, by tolerance.

The trained models of the demo on seeds that nothing was tuned on. Beside the table a picture: PSNR
over the tolerance on the left; on the right over rounds, with the same number of steps instead.

    python tests/bench/dial.py --ranks 4 --seeds 8 --picture out/dial.png
"""

from __future__ import annotations

from typing import Any

import matplotlib
import torch
from _table import arguments, show, write
from fidelity import FIRST_SEED, MEAN_DB, Line, Seed, Task

from parastep import demo
from parastep.tolerance import NAMES

matplotlib.use("Agg")
from matplotlib import pyplot


def curves(name: str, options: Any) -> tuple[list[Line], list[Line]]:
    """A line a tolerance, and one for each number of steps instead."""
    task = Task(name, None)
    numbers = range(FIRST_SEED, FIRST_SEED + options.seeds)
    seeds = [Seed(task, number, options.steps) for number in numbers]
    ours, fewer = [], []
    for tolerance in options.tolerance:
        ours.append(Line(f"tolerance {tolerance:g}"))
        for seed in seeds:
            ours[-1].add(*seed.ours(options.ranks, tolerance=tolerance), seed)
    for steps in options.fewer:
        fewer.append(Line(f"{steps} steps instead"))
        for seed in seeds:
            fewer[-1].add(*seed.fewer(steps), seed)
    return ours, fewer


def draw(found: dict[str, tuple[list[Line], list[Line]]], options: Any) -> Any:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for k, (name, (ours, fewer)) in enumerate(found.items()):
        quality = [line.psnr for line in ours]
        left.plot(options.tolerance, quality, "o-", color=f"C{k}", label=name)
        right.plot([line.mean_rounds for line in ours], quality, "o-", color=f"C{k}", label=name)
        right.plot(options.fewer, [line.psnr for line in fewer], "x:", color=f"C{k}")
    right.plot([], [], "x:", color="grey", label="fewer steps instead")
    for word, tolerance in NAMES.items():
        if tolerance > 0:
            left.axvline(tolerance, color="grey", linewidth=0.5)
            left.annotate(word, (tolerance, 0.02), xycoords=("data", "axes fraction"), rotation=90,
                          ha="right", color="grey")  # fmt: skip
    for axes in (left, right):
        axes.axhline(MEAN_DB, color="grey", linewidth=0.5)
        axes.set_ylabel("PSNR to the sequential result, dB")
        axes.legend()
    left.set_xscale("log")
    left.set_xlabel("tolerance")
    right.set_xlabel(f"rounds for {options.steps} steps")
    figure.suptitle(f"{options.steps} steps on {options.ranks} ranks, {options.seeds} seeds")
    return figure


def main() -> None:
    options = arguments(
        "dial", models=list(demo.NAMES), steps=50, ranks=4, seeds=8, picture="out/dial.png",
        tolerance=[0.005, 0.01, 0.02, 0.05, 0.1], fewer=[10, 15, 20, 25],
    )  # fmt: skip
    torch.set_num_threads(1)
    found = {name: curves(name, options) for name in options.models}
    for name, lines in found.items():
        rows = [line.row() for group in lines for line in group]
        columns = ["rule", "rounds", "most", "distance", "PSNR dB", "worst seed"]
        show(f"{name}, {options.steps} steps, {options.ranks} ranks", columns, rows)
    draw(found, options).savefig(options.picture, dpi=110)
    write(options.json, {name: [line.figures() for group in lines for line in group]
                         for name, lines in found.items()})  # fmt: skip


if __name__ == "__main__":
    main()
