"""Pictures of a report: which rank evaluated which step when, and what became of it."""

from __future__ import annotations

from typing import Any

from .report import Report

COLOURS = {"exact": "#4878a8", "accepted": "#6aa56e", "rejected": "#d9a08c"}
LABELS = {
    "exact": "leader, at the true latent",
    "accepted": "guess, accepted",
    "rejected": "guess, not used",
}


def kind(rank: int, accepted: bool) -> str:
    if rank == 0:
        return "exact"
    return "accepted" if accepted else "rejected"


def timeline(report: Report, axes: Any) -> None:
    """Draws a report's evaluations on matplotlib axes: a row a rank, seconds to the right."""
    from matplotlib.patches import Patch

    for record in report.timeline:
        width = record.end - record.begin
        colour = COLOURS[kind(record.rank, record.accepted)]
        axes.barh(record.rank, width, left=record.begin, height=0.8, color=colour, linewidth=0)
        middle = record.begin + width / 2
        axes.text(middle, record.rank, str(record.step), ha="center", va="center", fontsize=6)
    axes.set_yticks(range(report.ranks))
    axes.set_ylabel("rank")
    axes.set_xlabel("seconds (numbers are steps)")
    axes.invert_yaxis()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    patches = [Patch(color=COLOURS[name], label=text) for name, text in LABELS.items()]
    axes.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    axes.set_title(f"{report.steps} steps in {report.rounds} rounds", loc="left", fontsize=10)
