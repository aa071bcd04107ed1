"""Pictures of a report with matplotlib, which is imported only when one is asked for."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from .record import Record

COLOURS = {
    "exact": "#4878a8",
    "accepted": "#6aa56e",
    "interpolated": "#c9a227",
    "rejected": "#d9a08c",
}
LABELS = {
    "exact": "leader, at the true latent",
    "accepted": "guess, accepted",
    "interpolated": "between two nodes",
    "rejected": "guess, not used",
}

_LINES = 8  # of what teams did, above the pictures


def report(report: Record, figure: Any = None) -> Any:
    """Timeline, drift, steps taken in each round; returns the figure."""
    figure = _own_figure() if figure is None else figure
    lines = report.team_lines[:_LINES]
    if lines:
        more = len(report.teams) - len(lines)
        lines += [f"and {more} ranks more"] * (more > 0)
        figure.suptitle("\n".join(lines), x=0.01, horizontalalignment="left", fontsize=8)
    axes = figure.subplots(3, 1, height_ratios=[2, 1.5, 1])
    timeline(report, axes[0])
    drift(report, axes[1])
    taken(report, axes[2])
    return figure


def timeline(report: Record, axes: Any) -> None:
    """Draws a report's evaluations on matplotlib axes: a row a device, seconds to the right."""
    for row, step, begin, end, kind in drawn(report):
        width, look = end - begin, {"color": COLOURS[kind], "linewidth": 0}
        axes.barh(row, width, left=begin, height=0.8, **look)
        axes.text(begin + width / 2, row, str(step), ha="center", va="center", fontsize=6)
    names, _ = rows(report)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("seconds (numbers are steps)")
    axes.invert_yaxis()
    _finish(axes, ["exact", "accepted", "rejected"])
    axes.set_title(f"{report.steps} steps in {report.rounds} rounds", loc="left", fontsize=10)


def rows(report: Record) -> tuple[list[str], dict[tuple[int, int], int]]:
    """The names of the timeline's rows, and which one a rank's head (0) and its helpers have."""
    names: list[str] = []
    places = {}
    for rank in range(report.ranks):
        served = report.teams[rank].served if rank < len(report.teams) else ()
        for device in range(1 + max((share.device for share in served), default=0)):
            places[rank, device] = len(names)
            names.append(f"rank {rank}" if device == 0 else "helper")
    return names, places


def drawn(report: Record) -> list[tuple[int, int, float, float, str]]:
    """(row, step, begin, end, kind) of all that the timeline shows; what a helper served is of the
    kind of its rank's evaluation.
    """
    _, places = rows(report)
    pairs = list(zip(report.timeline, report.evaluated))
    found = [(places[r.rank, 0], r.step, r.begin, r.end, kind) for r, kind in pairs]
    kinds = defaultdict(list)
    for record, kind in pairs:
        kinds[record.rank, record.step].append((record.begin, kind))
    for rank, team in enumerate(report.teams[: report.ranks]):
        for device, step, begin, end in team.served:
            near = [(abs(first - begin), kind) for first, kind in kinds[rank, step]]
            kind = min(near, default=(0.0, "rejected"))[1]
            found.append((places[rank, device], step, begin, end, kind))
    return found


def drifts(report: Record) -> list[tuple[int, float, str]]:
    """(step, drift, what became of the guess) where a logarithmic axis can show it."""
    kinds = report.kinds
    return [
        (step, value, "rejected" if kinds[step] == "exact" else kinds[step])
        for step, value in enumerate(report.drift[: report.steps])
        if math.isfinite(value) and value > 0
    ]


def drift(report: Record, axes: Any) -> None:
    """Draws how far off each step's guess was, in units of its noise scale."""
    for kind in COLOURS:
        points = [(step, value) for step, value, own in drifts(report) if own == kind]
        if points:
            axes.plot(*zip(*points), "o", markersize=4, color=COLOURS[kind])
            axes.set_yscale("log")
    axes.set_ylabel("drift")
    axes.set_xlabel("step")
    axes.set_xlim(-1, max(report.steps, 1))
    _finish(axes, [])


def taken(report: Record, axes: Any) -> None:
    """Draws the steps that each round took, by what answered them."""
    kinds, step = report.kinds, 0
    for number, count in enumerate(report.accepted):
        own, bottom = kinds[step : step + count], 0
        for kind in COLOURS:
            height = own.count(kind)
            if height:
                axes.bar(number, height, 0.8, bottom, color=COLOURS[kind], linewidth=0)
                bottom += height
        step += count
    axes.set_ylabel("steps taken")
    axes.set_xlabel("round")
    _finish(axes, ["interpolated"] if "interpolated" in kinds else [])


def _finish(axes: Any, kinds: list[str]) -> None:
    from matplotlib.patches import Patch

    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if kinds:
        patches = [Patch(color=COLOURS[kind], label=LABELS[kind]) for kind in kinds]
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "frameon": False}
        axes.legend(handles=patches, ncols=len(kinds), **place)


def _own_figure() -> Any:
    """A figure outside of pyplot: a notebook shows it once, and nothing keeps it open."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        text = "plots need matplotlib, which is not installed: pip install matplotlib"
        raise ImportError(text) from error

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            import io

            written = io.BytesIO()
            self.savefig(written, format="png")
            return written.getvalue()

    return Picture(figsize=(9, 7), dpi=100, layout="constrained")
