"""Samples side by side, since people look: sequential, this method, and other rules on one device
at its forwards.

Starts that nothing was tuned on, of a model that draws pictures. Beside each sample stands its
difference from the sequential one, so many times as large; beside each rule its forwards and PSNR,
the means over these seeds, nearest first.

    python tests/bench/samples.py --seeds 4 --times 8 --picture tests/bench/samples.png
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import matplotlib
import torch
from _table import arguments, show, write
from fidelity import FIRST_SEED, GRID, Line, Seed, Task

import parastep

matplotlib.use("Agg")
from matplotlib import pyplot

Samples = dict[str, list[torch.Tensor]]  # of a rule, pictures of one seed after another


def samples(name: str, options: Any) -> tuple[list[Line], Samples]:
    """The rules, nearest first, and their pictures behind the sequential ones."""
    task = Task(name, None)
    numbers = range(FIRST_SEED, FIRST_SEED + options.seeds)
    seeds = [Seed(task, number, options.steps) for number in numbers]
    tolerance = parastep.tolerance.number_of(options.tolerance)
    ours = [seed.ours(1, tolerance=tolerance) for seed in seeds]
    forwards = math.ceil(statistics.mean(rounds for _, rounds in ours))
    lines: dict[str, Line] = {}
    found = {"sequential": [task.model.decode(seed.exact)[0] for seed in seeds]}
    for seed, own in zip(seeds, ours):
        runs = {f"parastep, {options.tolerance}": own, **seed.others(1, forwards)}
        for rule, run in runs.items():
            if rule.startswith(f"{GRID}: "):
                continue  # the best of them is there
            lines.setdefault(rule, Line(rule)).add(*run, seed)
            found.setdefault(rule, []).append(task.model.decode(run[0])[0])
    return sorted(lines.values(), key=lambda line: -line.psnr), found


def draw(lines: list[Line], found: Samples, options: Any) -> Any:
    labels = {"sequential": f"sequential\n{options.steps} forwards"}
    for line in lines:
        labels[line.rule] = f"{line.rule}\n{line.mean_rounds:.1f} forwards, {line.psnr:.1f} dB"
    exact = found["sequential"]
    shape = {"figsize": (3.2 + 1.6 * len(exact), 0.82 * len(labels)), "layout": "constrained"}
    figure, panels = pyplot.subplots(len(labels), 2 * len(exact), squeeze=False, **shape)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes in panels[0, 1::2]:
        axes.text(0.5, 0.1, f"difference,\n{options.times} times", ha="center", size=8)
    for row, (rule, label) in zip(panels, labels.items()):
        row[0].text(-0.15, 0.5, label, transform=row[0].transAxes, ha="right", va="center", size=9)
        for k, (picture, true) in enumerate(zip(found[rule], exact)):
            row[2 * k].imshow(_seen(picture), interpolation="nearest")
            if picture is not true:
                difference = (picture - true) * options.times
                row[2 * k + 1].imshow(_seen(difference), interpolation="nearest")
    return figure


def _seen(picture: torch.Tensor) -> Any:
    """(3, H, W) in -1 to 1 as (H, W, 3) in 0 to 1."""
    return (picture.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy()


def main() -> None:
    options = arguments("samples", model="signs", steps=28, seeds=4, tolerance="balanced", times=8,
                        picture="out/samples.png")  # fmt: skip
    torch.set_num_threads(1)
    lines, found = samples(options.model, options)
    columns = ["rule", "rounds", "most", "distance", "PSNR dB", "worst seed"]
    show(f"{options.model}, {options.steps} steps", columns, [line.row() for line in lines])
    write(options.json, {"samples": [line.figures() for line in lines]})
    draw(lines, found, options).savefig(options.picture, dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
