"""What a run tells of itself: rounds, drift, the timeline, failures."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Evaluation(NamedTuple):
    """One run of the denoiser; times in seconds since the run began."""

    rank: int
    step: int
    round: int
    begin: float
    end: float
    accepted: bool


class Failure(NamedTuple):
    """A rank that was left out: the step it was to evaluate, a short name, and the reason."""

    rank: int
    step: int
    status: str
    text: str


@dataclass
class Report:
    """A finished run.

    `rounds` are the leader's evaluations, so wall time in forwards; `accepted` the steps taken in
    each round; `drift` how far each step's guess was off in units of its noise scale, NaN where
    there was no guess; `fallback` why speculation ended, or None.
    """

    steps: int = 0
    ranks: int = 1
    rounds: int = 0
    evaluations: list[int] = field(default_factory=list)
    interpolated: int = 0
    accepted: list[int] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    timeline: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0
    bytes_sent: int = 0
    failures: list[Failure] = field(default_factory=list)
    fallback: str | None = None
    answered: int = 0
    not_finite: int = 0

    @classmethod
    def from_core(cls, found: dict[str, Any]) -> Report:
        """From the dict of `_core.Leader.report()`."""
        found = dict(found)
        found["timeline"] = [Evaluation(*record) for record in found["timeline"]]
        found["failures"] = [Failure(*line) for line in found["failures"]]
        return cls(**found)

    @property
    def speedup(self) -> float:
        """Model calls over rounds: the gain in forwards of wall time, were all else free."""
        return self.steps / self.rounds if self.rounds else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; NaN and Inf become None, so that it is valid JSON."""
        plain = asdict(self)
        plain["drift"] = [value if math.isfinite(value) else None for value in self.drift]
        plain["timeline"] = [record._asdict() for record in self.timeline]
        plain["failures"] = [line._asdict() for line in self.failures]
        return plain

    def __str__(self) -> str:
        text = f"{self.steps} steps in {self.rounds} rounds on {self.ranks} ranks"
        text += f" ({self.speedup:.2f}x in forwards), {self.seconds:.2f} s"
        if self.failures:
            text += f", {len(self.failures)} ranks left out"
        if self.fallback:
            text += f"; went on serially: {self.fallback}"
        return text
