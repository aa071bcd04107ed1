"""The quality dial as a curve, beside everybody else's: how near the sequential result, at how many
rounds.

The trained models of the demo and the judge, on seeds that nothing was tuned on. Beside the tables
a picture: PSNR over rounds, a panel for each model, the dial's words marked.

    python tests/bench/dial.py --steps 28 --seeds 8 --picture tests/bench/dial.png
    python tests/bench/dial.py --ranks 8 --steps 50 --rounds 9 11 14
"""

from __future__ import annotations

from typing import Any

import _models
import matplotlib
import torch
from _table import arguments, show, write
from fidelity import FIRST_SEED, Line, Seed, Task

from parastep.tolerance import NAMES

matplotlib.use("Agg")
from matplotlib import pyplot

BFLOAT16 = "all steps, the model in bfloat16"
WORDS = {tolerance: word for word, tolerance in NAMES.items() if tolerance > 0}
Curves = dict[str, list[Line]]  # of a rule, at one setting after another


def curves(name: str, options: Any) -> Curves:
    """Ours at one tolerance after another, the others at so many rounds."""
    task = Task(name, None)
    numbers = range(FIRST_SEED, FIRST_SEED + options.seeds)
    seeds = [Seed(task, number, options.steps) for number in numbers]
    found: Curves = {"parastep": []}
    for tolerance in options.tolerance:
        line = Line(f"parastep, tolerance {tolerance:g} {WORDS.get(tolerance, '')}".rstrip())
        for seed in seeds:
            line.add(*seed.ours(options.ranks, tolerance=tolerance), seed)
        found["parastep"].append(line)
    for rounds in options.rounds:
        lines: dict[str, Line] = {}
        for seed in seeds:
            for rule, run in seed.others(options.ranks, rounds).items():
                lines.setdefault(rule, Line(rule)).add(*run, seed)
        for rule, line in lines.items():
            found.setdefault(rule, []).append(line)
    return found


def draw(found: dict[str, Curves], options: Any) -> Any:
    shape = {"figsize": (3.6 * len(found), 3.8), "layout": "constrained", "sharey": True}
    figure, panels = pyplot.subplots(1, len(found), squeeze=False, **shape)
    rules = list(dict.fromkeys(rule for lines in found.values() for rule in lines))
    for axes, (name, lines) in zip(panels[0], found.items()):
        for rule in rules:
            points = [(line.mean_rounds, line.psnr) for line in lines.get(rule, [])]
            if rule == BFLOAT16 and points:
                axes.axhline(points[0][1], color="grey", linewidth=0.7, label=rule)
            elif rule != BFLOAT16:
                own = {"color": "black", "linewidth": 2} if rule == "parastep" else {}
                axes.plot(*zip(*points) if points else ([], []), "o-", ms=3, label=rule, **own)
        for tolerance, line in zip(options.tolerance, lines["parastep"]):
            where = line.mean_rounds, line.psnr
            axes.annotate(WORDS.get(tolerance, ""), where, (-4, 4), ha="right", size=8,
                          textcoords="offset points")  # fmt: skip
        axes.set_title(name)
        axes.set_xlabel("forwards" if options.ranks == 1 else "rounds")
    panels[0][0].set_ylabel("PSNR to the sequential result, dB")
    handles, labels = panels[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    devices = "one device" if options.ranks == 1 else f"{options.ranks} ranks"
    figure.suptitle(f"{options.steps} steps on {devices}, mean of {options.seeds} seeds")
    return figure


def main() -> None:
    options = arguments(
        "dial", models=list(_models.NAMES), steps=28, ranks=1, seeds=8, picture="out/dial.png",
        tolerance=[0.004, 0.01, 0.02, 0.04, 0.12, 0.3], rounds=[10, 12, 14, 17, 20, 24],
    )  # fmt: skip
    torch.set_num_threads(1)
    found = {name: curves(name, options) for name in options.models}
    for name, lines in found.items():
        rows = [line.row() for group in lines.values() for line in group]
        columns = ["rule", "rounds", "most", "distance", "PSNR dB", "worst seed"]
        show(f"{name}, {options.steps} steps, {options.ranks} ranks", columns, rows)
    draw(found, options).savefig(options.picture, dpi=110)
    write(options.json, {name: [line.figures() for group in lines.values() for line in group]
                         for name, lines in found.items()})  # fmt: skip


if __name__ == "__main__":
    main()
