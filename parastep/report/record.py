"""What a run tells of itself, as data: rounds, drift, the timeline, failures."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeVar

HELPER_LOST = "HELPER_LOST"  # as a failure's status
Own = TypeVar("Own", bound="Record")


class Evaluation(NamedTuple):
    """One run of the denoiser; times in seconds since the run began."""

    rank: int
    step: int
    round: int
    begin: float
    end: float
    accepted: bool


class Failure(NamedTuple):
    """A rank that was left out: the step it was to evaluate, a short name, and the reason. With the
    name HELPER_LOST it is a device that helped the rank, which may have gone on.
    """

    rank: int
    step: int
    status: str
    text: str

    @property
    def became(self) -> str:
        """What of the rank, in words."""
        return "goes on without a helper" if self.status == HELPER_LOST else "was left out"


class Share(NamedTuple):
    """A forward, or a share of one, that a helper served: which of its team's devices it is (1 and
    up, the head being 0), for which step, and in seconds since the run began when it was asked and
    when it had answered.
    """

    device: int
    step: int
    begin: float
    end: float


class TeamRecord(NamedTuple):
    """What the devices of one rank did together: those, the head's first; how forwards were shared
    out ("calls (bit for bit)", "batch (to rounding)"), or None and the reason why they were not;
    forwards that were shared, calls that were foretold wrongly, forwards that the head made whole,
    a trial's at step 0 among them; all that helpers served; seconds that the head waited for
    shares of its forwards when it was through with its own, if that is more than a fourth of what
    those took: a helper is slower than its head. `str` is one line of it.
    """

    devices: list[str]
    split: str | None
    unsplit: str | None
    shared: int
    missed: int
    whole: int
    served: tuple[Share, ...] = ()
    waited: float = 0.0

    def __repr__(self) -> str:
        return f"<TeamRecord: {self}>"

    def since(self, began: float) -> TeamRecord:
        """With times from then on."""
        shares = (Share(device, step, a - began, b - began) for device, step, a, b in self.served)
        return self._replace(served=tuple(shares))

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"served": [share._asdict() for share in self.served]}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> TeamRecord:
        served = tuple(Share(**share) for share in plain.get("served", []))
        return cls(**plain | {"served": served})

    def __str__(self) -> str:
        devices = " + ".join(self.devices)
        if self.split is None:
            return f"{devices}, unsplit: {' '.join((self.unsplit or 'no reason known').split())}"
        text = f"{devices}, split by {self.split}: {_count(self.shared, 'forward')} shared"
        if self.whole:
            text += f", {self.whole} whole"
        if self.missed:
            text += f", {self.missed} foretold wrongly"
        if self.waited:
            text += f"; a helper is slower than its head, which waited {self.waited:.2g} s for it"
        return text


@dataclass(repr=False)
class Record:
    """A finished run.

    `rounds` are the leader's evaluations, so wall time in forwards; `accepted` the steps taken in
    each round; `forwards` how often the denoiser ran on any rank, a batch of steps counting once,
    and `unbatched` why steps that were to share a batch did not; `drift` how far each step's guess
    was off in units of its noise scale, NaN where there was no guess, and `cost` what a drift of 1
    spends of the tolerance at a step of the program; `interpolated` how many steps were answered
    between nodes; `tolerance` the one that decided, None under the published rule, which has none;
    `fallback` why speculation ended, or None; `transports` what took the latents to each rank of a
    pipeline ("threads", "host" or "nccl"; "" for the leader); `limit` what kept the run from being
    faster, where the options did, or None; `teams`, of each rank that has several devices or could
    have, what these did together.
    """

    steps: int = 0
    ranks: int = 1
    rounds: int = 0
    evaluations: list[int] = field(default_factory=list)
    interpolated: int = 0
    accepted: list[int] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    timeline: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0
    bytes_sent: int = 0
    failures: list[Failure] = field(default_factory=list)
    fallback: str | None = None
    answered: int = 0
    not_finite: int = 0
    tolerance: float | None = None
    forwards: int = 0
    unbatched: str | None = None
    transports: list[str] = field(default_factory=list)
    limit: str | None = None
    teams: list[TeamRecord] = field(default_factory=list)

    @classmethod
    def from_core(cls: type[Own], found: dict[str, Any], tolerance: float | None = None) -> Own:
        """From the dict of `_core.Leader.report()`, and the tolerance it was created with."""
        found = {**found, "tolerance": tolerance, "forwards": sum(found["evaluations"])}
        found["timeline"] = [Evaluation(*record) for record in found["timeline"]]
        found["failures"] = [Failure(*line) for line in found["failures"]]
        return cls(**found)

    def add_idle(self, ranks: int, limit: str | None) -> None:
        """`ranks` were asked for, of which those that are missing had nothing to do."""
        self.evaluations += [0] * (ranks - self.ranks)
        self.ranks, self.limit = ranks, limit

    @property
    def speedup(self) -> float:
        """Model calls over rounds: the gain in forwards of wall time, were all else free."""
        return self.steps / self.rounds if self.rounds else math.nan

    @property
    def evaluated(self) -> list[str]:
        """What became of each evaluation of the timeline: exact (the leader's, at the true latent
        with which its round began), accepted or rejected (guesses, its own among them).
        """
        frontier = [0, *itertools.accumulate(self.accepted)]

        def kind(record: Evaluation) -> str:
            if not record.accepted:
                return "rejected"
            own = record.rank == 0 and record.round < len(frontier)
            return "exact" if own and record.step == frontier[record.round] else "accepted"

        return [kind(record) for record in self.timeline]

    @property
    def kinds(self) -> list[str]:
        """What answered each step: exact, accepted or interpolated.

        Steps without an evaluation of their own lie between nodes, as many as `interpolated`; those
        after them the host evaluated alone, once speculation had ended.
        """
        pairs = zip(self.timeline, self.evaluated)
        found = {record.step: kind for record, kind in pairs if record.accepted}
        others = [step for step in range(self.steps) if step not in found]
        found |= dict.fromkeys(others, "exact")
        found |= dict.fromkeys(others[: self.interpolated], "interpolated")
        return [found[step] for step in range(self.steps)]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, valid JSON: NaN and Inf become None, but for an
        infinite tolerance, which is "inf".
        """
        plain = asdict(self)
        plain["drift"] = [value if math.isfinite(value) else None for value in self.drift]
        if self.tolerance == math.inf:
            plain["tolerance"] = "inf"
        plain["timeline"] = [record._asdict() for record in self.timeline]
        plain["failures"] = [line._asdict() for line in self.failures]
        plain["teams"] = [team.to_dict() for team in self.teams]
        return plain

    @classmethod
    def from_dict(cls: type[Own], plain: dict[str, Any]) -> Own:
        """What `to_dict` made, maybe by way of JSON. Raises ValueError for anything else."""
        try:
            found = dict(plain)
            found["drift"] = [math.nan if value is None else value for value in found["drift"]]
            if found["tolerance"] is not None:
                found["tolerance"] = float(found["tolerance"])
            found["timeline"] = [Evaluation(**record) for record in found["timeline"]]
            found["failures"] = [Failure(**line) for line in found["failures"]]
            found["teams"] = [TeamRecord.from_dict(team) for team in found.get("teams", [])]
            return cls(**found)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the dict of a report: {error!r}") from error

    @property
    def team_lines(self) -> list[str]:
        """A line for each rank of several devices."""
        return [f"rank {rank}: {team}" for rank, team in enumerate(self.teams)]

    def __repr__(self) -> str:
        return f"<parastep.{type(self).__name__}: {self.line}>"

    def __str__(self) -> str:
        return "\n".join([self.line, *self.team_lines])

    @property
    def line(self) -> str:
        """The run in one line."""
        text = f"{_count(self.steps, 'step')} in {_count(self.rounds, 'round')} on "
        text += f"{_count(self.ranks, 'rank')} ({self.speedup:.2f}x in forwards), "
        text += f"{self.seconds:.2f} s"
        if 0 < self.forwards < sum(self.evaluations):
            text += f", {_count(self.forwards, 'forward')}"
        if self.interpolated:
            text += f", {self.interpolated} interpolated"
        helpers = sum(line.status == HELPER_LOST for line in self.failures)
        if len(self.failures) > helpers:
            text += f", {_count(len(self.failures) - helpers, 'rank')} left out"
        if helpers:
            text += f", {_count(helpers, 'helper')} lost"
        if self.limit:
            text += f"; {self.limit}"
        if self.fallback:
            text += f"; went on serially: {' '.join(self.fallback.split())}"
        return text


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
