"""How many rounds a run would take, told from reports of runs of the same model.

At stride 1 rounds come from a model of drift.  In a round that begins at step i the output of a
step l behind the newest known one is off by c_j l (the guess goes on along part of the slope), that
of a carried step by k_j times the drift of the point where it was evaluated; both add up to the
drift of the steps after them.  Drifts spend the tolerance, each at the cost of its step, and where
it is spent the next round begins.  c, k and costs are read off the report of one run at stride 1,
or those of the demo's image model.  Strided runs follow an empirical law of ranks, tolerance and
steps.  Used by `plan`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from .. import _core
from ..report import Report


@dataclass(frozen=True)
class Profile:
    """c and k of each step, (N,) each, in units of its noise scale, and what a drift of 1 costs."""

    bend: np.ndarray
    carry: np.ndarray
    cost: np.ndarray

    @classmethod
    def of(cls, report: Report) -> Profile:
        """From the report of one run at a tolerance above 0, at stride 1.

        Raises InvalidError where the run tells nothing of its drift.
        """
        if report.tolerance is None or report.steps < 4 or not report.cost:
            raise _core.InvalidError(
                "profile: the report of a run with a tolerance is needed "
                "(policy='verified', 4 steps or more)"
            )
        profile = default_profile().at(report.steps)
        for _ in range(3):  # how far off carried points were is itself told by the profile
            profile = _Seen(profile).fitted(report)
        return profile

    def at(self, steps: int) -> Profile:
        """The same trajectory in another number of steps: an output changes from step to step as
        1/N, and what it does to the latent goes with 1/N once more, as does a step's cost.
        """
        own = len(self.bend)
        if steps == own:
            return self
        where = (np.arange(steps) + 0.5) * own / steps - 0.5
        bend = np.exp(np.interp(where, np.arange(own), np.log(self.bend)))
        carry = np.interp(where, np.arange(own), self.carry)
        cost = np.interp(where, np.arange(own), self.cost)
        return Profile(bend * (own / steps) ** 2, carry * own / steps, cost * own / steps)

    def windows(self, steps: int, slots: int, tolerance: float) -> list[int]:
        """Evaluations in each round, full but in the first one and near the end; at tolerance 0
        nobody evaluates ahead.
        """
        if tolerance == 0:
            return [1] * steps
        taken = rounds_of(self.at(steps), slots, tolerance)
        begins = itertools.accumulate(taken, initial=0)
        return [min(slots, steps - begin) if begin else 1 for begin in begins if begin < steps]


@dataclass(frozen=True)
class Pace:
    """Rounds of strided runs: level x (1 + 1.3 / ranks)^r tolerance^-t steps^n, with (r, t, n) as
    `powers`. The first part of the sum is rounds in which strides grow, and shrink again near the
    end, the second those whose nodes the ranks divide among them.
    """

    level: float
    powers: tuple[float, float, float]

    @classmethod
    def of(cls, *reports: Report) -> Pace:
        """From strided runs of one model. The level is theirs, the powers as far as they tell.

        Raises InvalidError where one has no tolerance.
        """
        if not all(r.tolerance is not None and 0 < r.tolerance < math.inf for r in reports):
            raise _core.InvalidError("profile: runs with a tolerance above 0 are needed")
        told = [[1.0, *cls._scales(r.ranks, r.tolerance or 0.0, r.steps)] for r in reports]
        found = [math.log(r.rounds) for r in reports]
        doubt = np.diag([0.0, *[_STIFF] * 3])[1:]  # rows that hold the powers to what others showed
        rows, sides = np.vstack([told, doubt]), [*found, *(_STIFF * power for power in _POWERS)]
        level, *powers = np.linalg.lstsq(rows, np.array(sides), rcond=None)[0].tolist()
        return cls(math.exp(level), tuple(powers))

    @staticmethod
    def _scales(ranks: int, tolerance: float, steps: int) -> tuple[float, float, float]:
        return math.log1p(_DIVIDED / ranks), -math.log(tolerance), math.log(steps)

    def windows(self, steps: int, slots: int, tolerance: float) -> list[int]:
        """Evaluations in each round; never more rounds than steps."""
        if tolerance == 0:
            return default_profile().windows(steps, slots, 0)
        scales = self._scales(slots, min(tolerance, 1e3), steps)
        rounds = self.level * math.exp(sum(k * v for k, v in zip(self.powers, scales)))
        return [1] + [slots] * (max(1, min(round(rounds), steps)) - 1)


# Of the demo's models, on 1 to 8 ranks at tolerances .01 to .12 in 20 to 100 steps: what a run
# starts from whose own reports say too little.
_DIVIDED = 1.3
_POWERS = (0.73, 0.16, 0.26)
_STIFF = 0.5  # by how much more a power is sure than what one report says: seeds differ by a tenth


@dataclass(frozen=True)
class Warmup:
    """The published rule."""

    steps: int

    def windows(self, steps: int, slots: int, tolerance: float) -> list[int]:
        """One step a round first, then full windows, all of it taken."""
        alone = min(self.steps, steps)
        full, rest = divmod(steps - alone, slots)
        return [1] * alone + [slots] * full + [rest] * (rest > 0)


class _Seen:
    """c and k of the steps where a report tells them, with a first idea of the others."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.bend: dict[int, float] = {}
        self.carry: dict[int, float] = {}

    def fitted(self, report: Report) -> Profile:
        last = {record.round: 0 for record in report.timeline}
        for record in report.timeline:
            last[record.round] = max(record.step, last[record.round])
        first = 0
        carried: dict[int, float] = {}
        for number, taken in enumerate(report.accepted):
            if first > 0 and number in last:
                drift = self._round(report.drift, first, taken, last[number], carried)
                carried = {first + k: v for k, v in enumerate(drift) if k >= taken}
            first += taken
        if len(self.bend) < 2:
            raise _core.InvalidError(
                "profile: hardly any guess of the run was accepted; record one at a higher "
                "tolerance, or on more ranks"
            )
        unknown = {0: _CARRY / report.steps}
        return Profile(
            _between(self.bend, report.steps),
            _between(self.carry or unknown, report.steps),
            np.interp(np.arange(report.steps), np.arange(len(report.cost)), report.cost),
        )

    def _round(
        self, drift: list[float], first: int, taken: int, last: int, carried: dict[int, float]
    ) -> list[float]:
        """Drift of steps first to last: measured up to the rejected one, then by the model."""
        found, newest = [0.0], first - 1
        told = _drift(self.profile, first, last - first + 1, carried)
        for j in range(first, last):
            k = j + 1 - first
            known = k <= taken and math.isfinite(drift[j + 1])
            found.append(drift[j + 1] if known else found[-1] + told[k] - told[k - 1])
            off = found[-1] - found[-2]
            if j in carried:
                newest = j
                if known and off > 0 < carried[j]:
                    self.carry[j] = off / carried[j]
            elif known:
                off -= self.profile.carry[newest] * carried.get(newest, 0.0)
                if off > 0:
                    self.bend[j] = off / (j - newest)
        return found


def _between(known: dict[int, float], steps: int) -> np.ndarray:
    """(N,) from the values at some steps, by their logarithms."""
    where = sorted(known)
    return np.exp(np.interp(np.arange(steps), where, [math.log(known[j]) for j in where]))


# The demo's image model in 50 steps of DDIM and DPM++ 2M, mean over runs on 8 and 16 ranks: c, and
# k times N.
_KNOTS = ((0, 8, 17, 28, 38, 44, 49), (7.4e-4, 5.3e-4, 3.9e-4, 3.6e-4, 5.7e-4, 1.9e-3, 7e-3))
_CARRY = 4.0
# The costs of that schedule.
_COSTS = (
    (0, 4, 8, 12, 17, 22, 28, 33, 38, 44, 48, 49),
    (117, 85, 51, 27.3, 11.7, 5.1, 2.06, 1.09, 0.65, 0.46, 0.56, 1.18),
)


def default_profile() -> Profile:
    """A stand-in where no run of the model was recorded."""
    where = np.arange(50)
    return Profile(np.interp(where, *_KNOTS), np.full(50, _CARRY / 50), np.interp(where, *_COSTS))


def rounds_of(profile: Profile, window: int, tolerance: float) -> list[int]:
    """Steps taken in each round with that many evaluations a round at most."""
    steps = len(profile.bend)
    rounds, first = [1], 1
    carried: dict[int, float] = {}
    while first < steps:
        nodes = min(window, steps - first)
        drift = _drift(profile, first, nodes, carried)
        taken, spent = 1, 0.0
        while taken < nodes:
            spent += drift[taken] * profile.cost[first + taken]
            if not spent < tolerance:
                break
            taken += 1
        carried = {first + k: drift[k] for k in range(taken, nodes)}
        rounds.append(taken)
        first += taken
    return rounds


def _drift(profile: Profile, first: int, nodes: int, carried: dict[int, float]) -> list[float]:
    """Drift of the first + k-th step's guess, k = 0 to nodes - 1."""
    drift, newest = [0.0], first - 1
    for j in range(first, first + nodes - 1):
        if j in carried:
            newest = j
        off = profile.carry[newest] * carried.get(newest, 0.0) + profile.bend[j] * (j - newest)
        drift.append(drift[-1] + off)
    return drift
