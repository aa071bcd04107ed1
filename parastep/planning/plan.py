"""`plan`: rounds, wall time and memory before anything is bought or booked; pure arithmetic."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import _core
from ..report import Report
from ..tolerance import Tolerance, number_of
from .quantities import LINKS, bytes_in, link_in, seconds_in, shown_bytes
from .rounds import Pace, Profile, Warmup, default_profile

__all__ = ["LINKS", "Plan", "Plans", "plan"]

_SLOTS_MAX = 16


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
    """What a run would take: seconds, bytes; `slots` are the evaluations of each rank and round,
    `split` the devices of each rank, which share its forwards out.

    `memory` is that of each device. `breakeven` is the link's bytes a second at which nothing is
    gained, 0 where any link will do and inf where none does.
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
    split: int = 1

    @property
    def devices(self) -> int:
        """Those of all ranks together."""
        return self.ranks * self.split

    @property
    def seconds(self) -> float:
        """Wall time of the whole loop."""
        return self.forwards_seconds + self.exchange_seconds + self.overhead_seconds

    @property
    def speedup(self) -> float:
        return self.sequential_seconds / self.seconds


class Plans(list[Plan]):
    """Plans for several numbers of ranks; prints as a table, with the devices that they need where
    a rank has several.
    """

    _HEAD = ("ranks", "rounds", "seconds", "exchange", "speed-up", "break-even link", "memory")

    def _table(self) -> list[tuple[str, ...]]:
        """The head, then a row for each plan."""
        rows = [self._HEAD, *self._rows()]
        if all(plan.split == 1 for plan in self):
            return rows
        devices = ["devices", *(str(plan.devices) for plan in self)]
        return [(row[0], needed, *row[1:]) for row, needed in zip(rows, devices)]

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for plan in self:
            shared = "" if set(plan.slots) <= {1} else f" ({':'.join(map(str, plan.slots))})"
            times = (f"{plan.seconds:.3g}", f"{plan.exchange_seconds:.2g}", f"{plan.speedup:.2f}x")
            sizes = (f"{shown_bytes(plan.breakeven)}/s", shown_bytes(plan.memory))
            rows.append((f"{plan.ranks}{shared}", str(plan.rounds), *times, *sizes))
        return rows

    def __str__(self) -> str:
        rows = self._table()
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows
        )

    def _repr_html_(self) -> str:
        names, *plans = self._table()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in names)
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in plans
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
    tolerance: Tolerance = "balanced",
    profile: Report | Sequence[Report] | Profile | Pace | None = None,
    policy: str = "verified",
    warmup: int = 5,
    speeds: Sequence[float] | None = None,
    weights: float | str = 0,
    overhead: float | str | None = None,
    split: int = 1,
    efficiency: float = 0.9,
) -> Plans:
    """Predicts runs: one for each number of ranks.

    Args:
        latents: bytes of one latent ("2.2MB"), of which one travels to and one from each follower
            and evaluation. This, `forward` and `overhead` may be left to a report as `profile`.
        forward: seconds of one evaluation on the leader's device alone ("600ms"), guidance
            included; several as one batch take as many times as long.
        link: of the leader, which all followers share: a name (`LINKS`), or bytes a second
            ("3GB/s"), in each direction; `latency` in seconds where it differs from the name's.
        profile: the report of one run of the model that is planned for; of a strided run, strided
            ones are predicted, and several on other ranks, at other tolerances, in other numbers of
            steps tell more than one. None: the demo's image model at stride 1, a stand-in.
            `policy="paper"` needs none.
        speeds: forwards a second of each rank relative to the leader's, in place of `ranks`; ranks
            get as many slots as make the run shortest.
        weights: bytes of the denoiser, of which every device holds a replica.
        overhead: seconds a step of the host's own loop and of ours.
        split: devices of each rank, which share its forwards out, as `parallelize` has them: a run
            needs ranks x split devices.
        efficiency: of that, above 0 and at most 1: a shared forward takes forward / (split x
            efficiency), and .9 of a pair are 1.8 devices. A figure of the model's and the links'.

    Raises:
        InvalidError: for what cannot be read, or makes no sense.
    """
    known: Profile | Pace | None
    if isinstance(profile, (Report, Sequence)):
        reports = [profile] if isinstance(profile, Report) else profile
        known, *told = _known_by(reports)
        if forward is None:
            _refuse_shared(reports[0])
        latents, forward, overhead = (
            seen if given is None else given
            for given, seen in zip((latents, forward, overhead), told)
        )
    else:
        known = profile
    if latents is None or forward is None:
        raise _core.InvalidError("latents and forward are needed, or a report as profile")
    tolerance = number_of(tolerance)
    _check(steps, policy, warmup)
    _check_split(split, efficiency)
    rule = Warmup(warmup) if policy == "paper" else known or default_profile()
    rate, first = link_in(link)
    run = _Run(
        steps=steps,
        windows=lambda slots: rule.windows(steps, slots, tolerance),
        size=bytes_in(latents, "latents"),
        forward=seconds_in(forward, "forward"),
        rate=rate,
        latency=first if latency is None else seconds_in(latency, "latency"),
        host=seconds_in(overhead or 0, "overhead"),
        weights=bytes_in(weights, "weights"),
        split=split,
        ahead=policy == "paper" or tolerance > 0,
        faster=split * efficiency if split > 1 else 1.0,
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
    split: int
    ahead: bool  # somebody evaluates ahead
    faster: float  # a forward of a rank's devices together than one of the leader's alone

    def plan(self, slots: tuple[int, ...], rates: Sequence[float]) -> Plan:
        """With so many evaluations a round of each rank, of such speeds."""
        counts = [assign(slots, k) for k in self.windows(sum(slots))]
        forward = self.forward / self.faster
        times = [max(n * forward / v for n, v in zip(count, rates)) for count in counts]
        sent = [sum(count[1:]) for count in counts]
        if self.ahead:  # all evaluate the first step, to be verified
            sent[0] = sum(n > 0 for n in slots[1:])
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
            split=self.split,
        )

    def shared(self, rates: Sequence[float]) -> Plan:
        """The smallest shares that are about as quick as the quickest."""
        found = [self.plan(slots, rates) for slots in _shares(rates)]
        enough = 1.02 * min(plan.seconds for plan in found)
        return min((p for p in found if p.seconds <= enough), key=lambda plan: sum(plan.slots))


def _known_by(
    reports: Sequence[Report],
) -> tuple[Profile | Pace, float | None, float | None, float]:
    """How rounds go; bytes of a latent, seconds of a forward, and of a step beside forwards, as the
    first run had them.
    """
    if not reports or not all(isinstance(report, Report) for report in reports):
        raise _core.InvalidError("profile: reports of runs are needed")
    report = reports[0]
    strided = [report for report in reports if report.interpolated]
    rounds = Pace.of(*strided) if strided else Profile.of(report)
    own = [record for record in report.timeline if record.rank == 0]
    others = len(report.timeline) - len(own)
    latents = report.bytes_sent / (2 * others) if others else None
    if not own:
        return rounds, latents, None, 0.0
    forward = statistics.median(record.end - record.begin for record in own)
    began = min(record.begin for record in report.timeline)
    ended = max(record.end for record in report.timeline)
    beside = ended - began - forward * len({record.round for record in own})
    return rounds, latents, forward, max(beside, 0.0) / max(report.steps, 1)


def _refuse_shared(report: Report) -> None:
    """Its forwards are not those of one device, and how much they gained is not known."""
    team = report.teams[0] if report.teams else None
    if team is not None and team.shared > 0:
        raise _core.InvalidError(
            f"profile: {len(team.devices)} devices shared the forwards of this run: give forward, "
            "the time of one on one device"
        )


def _shares(rates: Sequence[float]) -> list[tuple[int, ...]]:
    """Slots that fill rounds as long as some rank takes for a whole number of evaluations."""
    lengths = {n / v for v in rates for n in range(1, _SLOTS_MAX + 1)}
    found = set()
    for length in lengths:
        slots = tuple(min(_SLOTS_MAX, int(length * v + 1e-9)) for v in rates)
        if slots[0] > 0:
            found.add(slots)
    return sorted(found)


def _speeds_in(speeds: Sequence[float]) -> list[float]:
    found = [float(v) for v in speeds]
    if not 1 <= len(found) <= 256 or not all(0 < v < math.inf for v in found):
        raise _core.InvalidError(f"speeds: {speeds!r}: one above 0 for each of 1 to 256 ranks")
    return [v / found[0] for v in found]


def _check_split(split: Any, efficiency: float) -> None:
    if type(split) is not int or not 1 <= split <= 256:
        raise _core.InvalidError(f"split: {split!r}: devices of a rank, from 1 to 256")
    if not 0 < efficiency <= 1:
        raise _core.InvalidError(f"efficiency: {efficiency!r}: must be above 0 and at most 1")


def _check(steps: Any, policy: str, warmup: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise _core.InvalidError(f"steps: {steps!r}: at least 1 is needed")
    if policy not in ("verified", "paper"):
        raise _core.InvalidError(f"policy: {policy!r}: must be 'verified' or 'paper'")
    if warmup < 1:
        raise _core.InvalidError(f"warmup: {warmup}: must be at least 1")
