"""The quality dial as a curve, beside everybody else's: how near the sequential result, at how many
rounds.

The trained models of the demo and the judge, on seeds that nothing was tuned on. Beside the tables
a picture: PSNR over rounds, a panel for each model, the dial's words marked.

    python tests/bench/dial.py --steps 28 --seeds 8 --picture tests/bench/dial.png
    python tests/bench/dial.py --ranks 8 --steps 50 --rounds 9 11 14

Models can be measured one by one: those of an earlier run's JSON are drawn with `--beside`.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from typing import Any

import _models
import matplotlib
import torch
from _table import arguments, show, write
from fidelity import FIRST_SEED, GRID, Line, Seed, Task, one_grid

from parastep.tolerance import NAMES

matplotlib.use("Agg")
from matplotlib import patheffects, pyplot

BFLOAT16 = "all steps, the model in bfloat16"
MARKERS = "osD^vP*X<>"
COLOURS = ("", "blue", "orange", "green", "red", "purple", "brown", "pink", "cyan", "olive")
WORDS = {tolerance: word for word, tolerance in NAMES.items() if tolerance > 0}
Figures = dict[str, list[dict[str, Any]]]  # of a rule, at one setting after another


def curves(name: str, options: Any) -> dict[str, list[Line]]:
    """Ours at one tolerance after another, the others at so many rounds."""
    task = Task(name, None)
    numbers = range(FIRST_SEED, FIRST_SEED + options.seeds)
    seeds = [Seed(task, number, options.steps) for number in numbers]
    found: dict[str, list[Line]] = {"parastep": []}
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
        for rule, line in one_grid(lines).items():
            if rule.startswith(f"{GRID}: "):
                print(f"{name}, {rounds} forwards, {rule}: {line.psnr:.1f}/{line.worst:.1f} dB")
            elif rule != BFLOAT16 or rule not in found:  # which is the same at any rounds
                found.setdefault(rule, []).append(line)
    return found


def draw(found: dict[str, Figures], options: Any) -> Any:
    """A panel for each model; what is near the upper left corner is better."""
    columns = min(len(found), 2)
    rows = -(-len(found) // columns)
    shape: dict[str, Any] = {"figsize": (4.8 * columns, 3.4 * rows + 1), "layout": "constrained"}
    shape |= {"squeeze": False, "sharex": True, "sharey": True}
    figure, panels = pyplot.subplots(rows, columns, **shape)
    rules = list(dict.fromkeys(rule for lines in found.values() for rule in lines))
    rules.sort(key=lambda rule: (rule == BFLOAT16) - (rule == "parastep"))  # first and last
    around = [patheffects.withStroke(linewidth=2, foreground="white")]
    handles: dict[str, Any] = {}
    for axes, (name, lines) in zip(panels.flat, found.items()):
        for k, rule in enumerate(rules):
            if rule not in lines:
                continue
            rounds = [statistics.mean(line["rounds"]) for line in lines[rule]]
            heights = [line["psnr"] for line in lines[rule]]
            if rule == BFLOAT16:
                handles[rule] = axes.axhline(heights[0], color="grey", linestyle=":")
                continue
            look = {"color": f"tab:{COLOURS[k]}" if k else "black", "linewidth": 1.2 if k else 2.2}
            look |= {"marker": MARKERS[k], "markersize": 4.5, "zorder": 2 if k else 3}
            (handles[rule],) = axes.plot(rounds, heights, **look)
        for line in lines["parastep"]:
            where, word = (statistics.mean(line["rounds"]), line["psnr"]), line["rule"].split()[-1]
            if word in NAMES:
                axes.annotate(word, where, (-5, 4), ha="right", size=9, zorder=4,
                              textcoords="offset points", path_effects=around)  # fmt: skip
        axes.set_title(f"{name}, {len(lines['parastep'][0]['rounds'])} seeds")
        axes.grid(alpha=0.25)
        axes.margins(y=0.09)
    unit = "forwards on one device" if options.ranks == 1 else f"rounds on {options.ranks} ranks"
    for axes in panels[-1]:
        axes.set_xlabel(f"{unit}, of {options.steps} steps")
    for axes in panels[:, 0]:
        axes.set_ylabel("PSNR to the sequential result, dB")
    ordered = {rule: handles[rule] for rule in rules}
    below = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    figure.legend(ordered.values(), ordered.keys(), **below)
    return figure


def main() -> None:
    options = arguments(
        "dial", models=list(_models.NAMES), steps=28, ranks=1, seeds=8, picture="out/dial.png",
        tolerance=[0.006, 0.015, 0.04, 0.12, 0.3], rounds=[12, 15, 18, 22], beside="",
    )  # fmt: skip
    torch.set_num_threads(1)
    found = json.loads(pathlib.Path(options.beside).read_text())["dial"] if options.beside else {}
    for name in options.models:
        lines = curves(name, options)
        rows = [line.row() for group in lines.values() for line in group]
        columns = ["rule", "rounds", "most", "distance", "PSNR dB", "worst seed"]
        show(f"{name}, {options.steps} steps, {options.ranks} ranks", columns, rows)
        found[name] = {rule: [line.figures() for line in group] for rule, group in lines.items()}
    write(options.json, {"dial": found})
    drawn = {name: found[name] for name in _models.NAMES if name in found}
    draw(drawn, options).savefig(options.picture, dpi=100)


if __name__ == "__main__":
    main()
