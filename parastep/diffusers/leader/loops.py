"""The sampling loops of one pipeline call: a run for each, and one report of them all.

A loop is over where its program's last iteration was the last thing to happen, or another one is
set up: then so is its run, and the code goes on to the next loop from what the last iteration's
steps returned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ... import _core
from ...report import Failure, Report
from ..call import Call, Loop
from ..tensors import map_tensors, private


class Ended(NamedTuple):
    """A loop: its steps, those whose outputs the core took, seconds until it began, and the core's
    report.
    """

    steps: int
    submitted: int
    opened: float
    report: dict[str, Any]


class Loops:
    """Of one call, and how the one at hand ends. `generators`: all among the call's arguments."""

    def __init__(self, call: Call, generators: Sequence[torch.Generator]) -> None:
        self.began = time.perf_counter()
        self.ended: list[Ended] = []
        self.encodes = False  # an encoder is called within the loop
        self._call, self._generators = call, generators
        self._opened = 0.0  # seconds from the call's beginning to the run's
        self._returned: list[Any] = []  # by the program's last iteration

    def open(self) -> float:
        """A run begins: the seconds that the call is old by now."""
        self._opened = time.perf_counter() - self.began
        return self._opened

    def stepped(self, result: Any, last: bool) -> None:
        """`last`: in the program's last iteration."""
        if last:
            self._returned.append(map_tensors(private, result))
        else:
            self._returned.clear()

    def is_over(self, calls: int) -> bool:
        """Whether the program's last iteration is done, with as many calls of step."""
        return 0 < len(self._returned) == calls

    def why_last(self, calls: int) -> str | None:
        """Why followers cannot go on to a second loop, or None."""
        if self.encodes:
            return "and the first calls an encoder at its steps"
        if not self.is_over(calls):
            return "and the first was longer or shorter than its scheduler's"
        return None

    def run(self, core: _core.Leader, steps: int, submitted: int) -> Ended:
        """The one at hand, so far."""
        return Ended(steps, submitted, self._opened, core.report())

    def end(self, ended: Ended, after: int) -> None:
        """Of the loop at hand nothing is to come any more. `after`: calls of denoisers since."""
        self.ended.append(ended)
        lost = {rank: text for rank, _, _, text in ended.report["failures"]}
        states = [generator.get_state() for generator in self._generators]
        self._call.begin_next_loop(Loop(ended.steps, self._returned, states, after), lost)
        self._opened, self._returned = 0.0, []


def added_up(runs: Sequence[Ended], ranks: int) -> Report:
    """One report of all; of as many ranks, where there is none."""
    report = Report(ranks=ranks, evaluations=[0] * ranks)
    for ended in runs:
        _add(report, ended)
    return report


def _add(report: Report, ended: Ended) -> None:
    """One more loop of the call's; a rank that was lost is told of once."""
    own, steps, rounds = Report.from_core(ended.report), report.steps, report.rounds
    report.ranks, report.evaluations = own.ranks, [0] * own.ranks
    report.timeline += [
        r._replace(
            step=r.step + steps,
            round=r.round + rounds,
            begin=r.begin + ended.opened,
            end=r.end + ended.opened,
        )
        for r in own.timeline
    ]
    lost = {line.rank for line in report.failures}
    told = (_told(line, own.not_finite) for line in own.failures if line.rank not in lost)
    report.failures += [line._replace(step=line.step + steps) for line in told]
    report.drift += (own.drift + [math.nan] * ended.steps)[: ended.steps]
    report.accepted += own.accepted
    report.cost += own.cost
    for name in ("rounds", "interpolated", "bytes_sent", "answered", "not_finite"):
        setattr(report, name, getattr(report, name) + getattr(own, name))
    report.steps += ended.steps


def _told(line: Failure, not_finite: int) -> Failure:
    """A follower is not to blame for what the untouched model does as well."""
    if not_finite and (line.status == "NOT_FINITE" or "distance nan" in line.text):
        line = line._replace(text="its output holds NaN or Inf, as the untouched model's own does")
    return line._replace(step=max(line.step, 0))
