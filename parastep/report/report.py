"""The record of a run that shows itself: `report.plot()`, and whatever a notebook does with it."""

from __future__ import annotations

from typing import Any

from . import notebook, plot
from .record import Record


class Report(Record):
    """A finished run, with all of `Record`. In a notebook it shows itself; `print` gives one line,
    and one for each rank of several devices, `plot` a figure.
    """

    def plot(self, figure: Any = None) -> Any:
        """A matplotlib figure: who evaluated what when, the drift of each step, steps per round.

        Draws into `figure` where one is given (`report.plot(pyplot.figure())` for `pyplot.show`),
        else makes one of its own, which a notebook shows and `savefig` writes.

        Raises ImportError where matplotlib is missing.
        """
        return plot.report(self, figure)

    def _repr_html_(self) -> str:
        return notebook.html_of(self)
