"""`plan`: rounds, wall time and memory before anything is bought or booked; pure arithmetic.

Rounds come from a model of drift.  In a round that begins at step i the output of a step l behind
the newest known one is off by c_j l (the guess goes on along half the slope), that of a carried
step by k_j times the drift of the point where it was evaluated; both add up to the drift of the
steps after them, and the first that exceeds the tolerance begins the next round.  c and k are read
off the report of one run at stride 1, or those of the demo's image model.  Rounds of strided runs
hardly depend on the number of steps and follow an empirical law of ranks and tolerance.
"""

from __future__ import annotations

import html
import itertools
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _core
from .report import Report

# Bytes a second in one direction and seconds until the first of them arrives; nominal figures.
LINKS = {
    "nvlink": (450e9, 10e-6),  # fourth generation, as on an H100
    "pcie5": (63e9, 10e-6),  # 16 lanes
    "pcie": (31.5e9, 10e-6),  # fourth generation, 16 lanes
    "pcie3": (15.75e9, 10e-6),
    "100GbE": (12.5e9, 30e-6),
    "25GbE": (3.125e9, 30e-6),
    "10GbE": (1.25e9, 30e-6),
    "1GbE": (0.125e9, 50e-6),
}
_SLOTS_MAX = 16

# ---- how a run's drift goes ----------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """c and k of each step, (N,) each, in units of its noise scale."""

    bend: np.ndarray
    carry: np.ndarray

    @classmethod
    def of(cls, report: Report) -> Profile:
        """From the report of one run at a tolerance above 0, at stride 1.

        Raises InvalidError where the run tells nothing of its drift.
        """
        if report.tolerance is None or report.steps < 4:
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
        1/N, and what it does to the latent goes with 1/N once more.
        """
        own = len(self.bend)
        if steps == own:
            return self
        where = (np.arange(steps) + 0.5) * own / steps - 0.5
        bend = np.exp(np.interp(where, np.arange(own), np.log(self.bend)))
        carry = np.interp(where, np.arange(own), self.carry)
        return Profile(bend * (own / steps) ** 2, carry * own / steps)

    def windows(self, steps: int, slots: int, tolerance: float) -> list[int]:
        """Evaluations in each round, full but in the first one and near the end."""
        taken = rounds_of(self.at(steps), slots, tolerance)
        begins = itertools.accumulate(taken, initial=0)
        return [min(slots, steps - begin) if begin else 1 for begin in begins if begin < steps]


@dataclass(frozen=True)
class Pace:
    """Rounds of strided runs at a tolerance, if there were ranks without end.

    With p ranks it takes (1 + 0.6 / p^2) times as many, whatever the number of steps, and a
    tolerance r times as large r^-0.2 times as many: what small trained models showed.
    """

    rounds: float
    tolerance: float

    @classmethod
    def of(cls, report: Report) -> Pace:
        """From the report of a strided run. Raises InvalidError where it has no tolerance."""
        if report.tolerance is None or not 0 < report.tolerance < math.inf:
            raise _core.InvalidError("profile: a run with a tolerance above 0 is needed")
        return cls(report.rounds / cls._share(report.ranks), report.tolerance)

    @staticmethod
    def _share(ranks: int) -> float:
        return 1 + 0.6 / ranks**2

    def windows(self, steps: int, slots: int, tolerance: float) -> list[int]:
        """Evaluations in each round; never more rounds than steps."""
        if tolerance == 0:
            return default_profile().windows(steps, slots, 0)
        rounds = self.rounds * self._share(slots) * (self.tolerance / tolerance) ** 0.2
        return [1] + [slots] * (max(1, min(round(rounds), steps)) - 1)


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
            _between(self.bend, report.steps), _between(self.carry or unknown, report.steps)
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
_KNOTS = ((0, 8, 17, 28, 38, 44, 49), (5.5e-4, 8e-4, 9.5e-4, 3.5e-4, 3.5e-4, 6.5e-4, 1.8e-3))
_CARRY = 3.7


def default_profile() -> Profile:
    """A stand-in where no run of the model was recorded."""
    return Profile(np.interp(np.arange(50), *_KNOTS), np.full(50, _CARRY / 50))


def rounds_of(profile: Profile, window: int, tolerance: float) -> list[int]:
    """Steps taken in each round with that many evaluations a round at most."""
    steps = len(profile.bend)
    rounds, first = [1], 1
    carried: dict[int, float] = {}
    while first < steps:
        nodes = min(window, steps - first)
        drift = _drift(profile, first, nodes, carried)
        taken = 1
        while taken < nodes and drift[taken] < tolerance:
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


def assign(slots: Sequence[int], nodes: int) -> list[int]:
    """Evaluations of each rank in a round of so many nodes, as csrc/core/plan.c hands them out:
    every rank gets its first before any gets a second one.
    """
    counts = [0] * len(slots)
    for slot in range(_SLOTS_MAX):
        for rank, own in enumerate(slots):
            if slot < own and sum(counts) < nodes:
                counts[rank] += 1
    return counts


# ---- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run would take: seconds, bytes; `slots` are the evaluations of each rank and round.

    `breakeven` is the link's bytes a second at which nothing is gained, 0 where any link will do
    and inf where none does.
    """

    ranks: int
    slots: tuple[int, ...]
    steps: int
    rounds: int
    forwards_seconds: float
    exchange_seconds: float
    overhead_seconds: float
    sequential_seconds: float
    breakeven: float
    bytes_sent: int
    memory: int

    @property
    def seconds(self) -> float:
        """Wall time of the whole loop."""
        return self.forwards_seconds + self.exchange_seconds + self.overhead_seconds

    @property
    def speedup(self) -> float:
        return self.sequential_seconds / self.seconds


class Plans(list[Plan]):
    """Plans for several numbers of ranks; prints as a table."""

    _HEAD = ("ranks", "rounds", "seconds", "exchange", "speed-up", "break-even link", "memory")

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for plan in self:
            shared = "" if set(plan.slots) <= {1} else f" ({':'.join(map(str, plan.slots))})"
            times = (f"{plan.seconds:.3g}", f"{plan.exchange_seconds:.2g}", f"{plan.speedup:.2f}x")
            sizes = (f"{shown_bytes(plan.breakeven)}/s", shown_bytes(plan.memory))
            rows.append((f"{plan.ranks}{shared}", str(plan.rounds), *times, *sizes))
        return rows

    def __str__(self) -> str:
        rows = [self._HEAD, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self._HEAD)
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
            for row in self._rows()
        )
        return f"<table><tr>{head}</tr>{rows}</table>"


def plan(
    steps: int = 50,
    *,
    latents: float | str | None = None,
    forward: float | str | None = None,
    ranks: int | Sequence[int] = (2, 4, 8),
    link: str | float = "pcie",
    latency: float | str | None = None,
    tolerance: float = 0.02,
    profile: Report | Profile | Pace | None = None,
    policy: str = "verified",
    warmup: int = 5,
    speeds: Sequence[float] | None = None,
    weights: float | str = 0,
    overhead: float | str | None = None,
) -> Plans:
    """Predicts runs: one for each number of ranks.

    Args:
        latents: bytes of one latent ("2.2MB"), of which one travels to and one from each follower
            and evaluation. This, `forward` and `overhead` may be left to a report as `profile`.
        forward: seconds of one evaluation on the leader ("600ms"), guidance included; several as
            one batch take as many times as long.
        link: of the leader, which all followers share: a name (`LINKS`), or bytes a second
            ("3GB/s"), in each direction; `latency` in seconds where it differs from the name's.
        profile: the report of one run of the model that is planned for; of a strided run, strided
            ones are predicted. None: the demo's image model at stride 1, a stand-in.
            `policy="paper"` needs none.
        speeds: forwards a second of each rank relative to the leader's, in place of `ranks`; ranks
            get as many slots as make the run shortest.
        weights: bytes of the denoiser, of which every rank holds a replica.
        overhead: seconds a step of the host's own loop and of ours.

    Raises:
        InvalidError: for what cannot be read, or makes no sense.
    """
    if isinstance(profile, Report):
        told = _told_by(profile)
        latents, forward, overhead = (
            given if given is not None else known
            for given, known in zip((latents, forward, overhead), told)
        )
        profile = Pace.of(profile) if profile.interpolated else Profile.of(profile)
    if latents is None or forward is None:
        raise _core.InvalidError("latents and forward are needed, or a report as profile")
    _check(steps, tolerance, policy, warmup)
    rule = Warmup(warmup) if policy == "paper" else profile or default_profile()
    rate, first = _link_in(link)
    run = _Run(
        steps=steps,
        windows=lambda slots: rule.windows(steps, slots, tolerance),
        size=_bytes_in(latents, "latents"),
        forward=_seconds_in(forward, "forward"),
        rate=rate,
        latency=first if latency is None else _seconds_in(latency, "latency"),
        host=_seconds_in(overhead or 0, "overhead"),
        weights=_bytes_in(weights, "weights"),
    )
    if run.forward <= 0:
        raise _core.InvalidError("forward: must be above 0")
    if speeds is not None:
        return Plans([run.shared(_speeds_in(speeds))])
    numbers = [ranks] if isinstance(ranks, int) else list(ranks)
    if not numbers or not all(isinstance(n, int) and 1 <= n <= 256 for n in numbers):
        raise _core.InvalidError(f"ranks: {ranks!r}: numbers from 1 to 256 are needed")
    return Plans([run.plan((1,) * n, (1.0,) * n) for n in numbers])


@dataclass(frozen=True)
class _Run:
    """What is the same for all shares: sizes in bytes, times in seconds."""

    steps: int
    windows: Callable[[int], list[int]]  # evaluations in each round, with so many slots
    size: float  # of a latent
    forward: float
    rate: float
    latency: float
    host: float
    weights: float

    def plan(self, slots: tuple[int, ...], rates: Sequence[float]) -> Plan:
        """With so many evaluations a round of each rank, of such speeds."""
        counts = [assign(slots, k) for k in self.windows(sum(slots))]
        times = [max(n * self.forward / v for n, v in zip(count, rates)) for count in counts]
        sent = [sum(count[1:]) for count in counts]
        sent[0] = sum(n > 0 for n in slots[1:])  # all evaluate the first step, to be verified
        across = sum((n + 1) * self.size for n in sent if n)  # the last reply overlaps with nothing
        waits = 2 * self.latency * sum(n > 0 for n in sent)
        spare = self.steps * self.forward - sum(times) - waits
        return Plan(
            ranks=len(slots),
            slots=slots,
            steps=self.steps,
            rounds=len(counts),
            forwards_seconds=sum(times),
            exchange_seconds=across / self.rate + waits,
            overhead_seconds=self.steps * self.host,
            sequential_seconds=self.steps * (self.forward + self.host),
            breakeven=0.0 if not across else across / spare if spare > 0 else math.inf,
            bytes_sent=int(2 * self.size * sum(sent)),
            memory=int(self.weights + 2 * self.size * (4 + sum(slots))),  # history, points, outputs
        )

    def shared(self, rates: Sequence[float]) -> Plan:
        """The smallest shares that are about as quick as the quickest."""
        found = [self.plan(slots, rates) for slots in _shares(rates)]
        enough = 1.02 * min(plan.seconds for plan in found)
        return min((p for p in found if p.seconds <= enough), key=lambda plan: sum(plan.slots))


def _told_by(report: Report) -> tuple[float | None, float | None, float]:
    """Bytes of a latent, seconds of a forward and of the loop beside it, as the run had them."""
    own = [record for record in report.timeline if record.rank == 0]
    others = len(report.timeline) - len(own)
    latents = report.bytes_sent / (2 * others) if others else None
    forward = statistics.median(r.end - r.begin for r in own) if own else None
    ends: dict[int, float] = {}
    for record in report.timeline:
        ends[record.round] = max(record.end, ends.get(record.round, 0.0))
    begins = {record.round: record.begin for record in own}
    gaps = [begins[n + 1] - ends[n] for n in begins if n + 1 in begins]
    return latents, forward, max(sum(gaps), 0.0) / max(report.steps, 1)


def _shares(rates: Sequence[float]) -> list[tuple[int, ...]]:
    """Slots that fill rounds as long as some rank takes for a whole number of evaluations."""
    lengths = {n / v for v in rates for n in range(1, _SLOTS_MAX + 1)}
    found = set()
    for length in lengths:
        slots = tuple(min(_SLOTS_MAX, int(length * v + 1e-9)) for v in rates)
        if slots[0] > 0:
            found.add(slots)
    return sorted(found)


# ---- what users write ----------------------------------------------------------------------------

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def _number_in(text: float | str, name: str, pattern: str, example: str) -> tuple[float, str]:
    if isinstance(text, (int, float)):
        value, unit = float(text), ""
    else:
        found = re.fullmatch(rf"\s*([0-9.]+(?:e[-+]?\d+)?)\s*{pattern}\s*", text)
        if found is None:
            raise _core.InvalidError(f"{name}: {text!r}: not understood, write it as {example}")
        value, unit = float(found[1]), found[2] or ""
    if not (math.isfinite(value) and value >= 0):
        raise _core.InvalidError(f"{name}: {text!r}: must be finite and not below 0")
    return value, unit


def _bytes_in(text: float | str, name: str, per: str = "") -> float:
    pattern = rf"(?:([kMGT]i?)?B{per})?"
    value, unit = _number_in(text, name, pattern, f"2.2MB{per}, 100MiB{per} or as a number")
    return value * {**_UNITS, **_BINARY}[unit]


def _seconds_in(text: float | str, name: str) -> float:
    value, unit = _number_in(text, name, r"(us|ms|s)?", "600ms, 1.5s or as a number")
    return value * {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}[unit]


def _link_in(link: str | float) -> tuple[float, float]:
    """(bytes a second, latency)."""
    names = {name.lower(): found for name, found in LINKS.items()}
    if isinstance(link, str) and link.lower() in names:
        return names[link.lower()]
    try:
        rate = _bytes_in(link, "link", "/s")
    except _core.InvalidError:
        rate = 0.0
    if rate <= 0:
        known = ", ".join(LINKS)
        raise _core.InvalidError(f"link: {link!r}: one of {known}, or bytes a second as 3GB/s")
    return rate, 30e-6


def _speeds_in(speeds: Sequence[float]) -> list[float]:
    found = [float(v) for v in speeds]
    if not 1 <= len(found) <= 256 or not all(0 < v < math.inf for v in found):
        raise _core.InvalidError(f"speeds: {speeds!r}: one above 0 for each of 1 to 256 ranks")
    return [v / found[0] for v in found]


def _check(steps: Any, tolerance: float, policy: str, warmup: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise _core.InvalidError(f"steps: {steps!r}: at least 1 is needed")
    if not tolerance >= 0:
        raise _core.InvalidError(f"tolerance: {tolerance}: must be 0 (exact) or above")
    if policy not in ("verified", "paper"):
        raise _core.InvalidError(f"policy: {policy!r}: must be 'verified' or 'paper'")
    if warmup < 1:
        raise _core.InvalidError(f"warmup: {warmup}: must be at least 1")


def shown_bytes(size: float) -> str:
    """Bytes to three figures with a unit."""
    if not math.isfinite(size):
        return "inf"
    for unit, factor in reversed(_UNITS.items()):
        if size >= factor or not unit:
            return f"{size / factor:.3g} {unit}B"
    raise AssertionError
