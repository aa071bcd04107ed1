"""The options of a run, which `sample`, `parallelize` and the ComfyUI node share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from . import _core
from .report import TeamRecord
from .tolerance import REHEARSE, Tolerance, number_of


@dataclass(frozen=True)
class Options:
    """How a run is judged and kept going. Checked where they are given; the tolerance becomes a
    number.

    Attributes:
        tolerance: what the answers of a round may add to the error of the last latents, as
            estimated, in units of about a fifth of their scale: a number, or "exact" (0), "high"
            (.006), "balanced" (.04), "fast" (.12). 0 is the untouched host: nobody evaluates
            ahead; `math.inf` accepts everything.
        policy: "verified", or "paper", the published rule (arXiv 2505.14741): `warmup` steps one by
            one, then every guess is used, whatever the tolerance.
        max_stride: steps from one evaluation to the next at most. 1: every step is evaluated by
            some rank. None: as far apart as the tolerance allows, where the sampler draws no noise
            and has one evaluation a noise level; steps between are interpolated, which is
            estimated, not verified.
        warmup: steps that the published rule evaluates one by one, 1 or above.
        order: guesses reuse outputs (0), or go on along their slope (1).
        deadline: seconds for a follower's reply; None: 60, or ten times the leader's longest
            forward.
        on_failure: "continue", without a follower that is lost, or "raise" LostError.

    Raises:
        InvalidError: a value that cannot be; the text says what may.
        TypeError: something of another kind.
    """

    tolerance: Tolerance = "balanced"
    policy: str = "verified"
    max_stride: int | None = None
    warmup: int = 5
    order: int = 1
    deadline: float | None = None
    on_failure: str = "continue"
    rehearsed: bool = False  # at tolerance 0: rounds are run, and none of their answers is used

    def __post_init__(self) -> None:
        rehearsed = self.rehearsed or self.tolerance == REHEARSE
        object.__setattr__(self, "rehearsed", rehearsed)
        tolerance: Tolerance = 0.0 if self.tolerance == REHEARSE else self.tolerance
        object.__setattr__(self, "tolerance", number_of(tolerance))
        _core.check_options(**self.for_core())

    def for_core(self) -> dict[str, Any]:
        """As `_core.Leader` takes them."""
        options = asdict(self)
        del options["rehearsed"]
        return options

    @property
    def verified_at(self) -> float | None:
        """The tolerance as a number; None under the published rule, which has none."""
        return number_of(self.tolerance) if self.policy == "verified" else None

    @property
    def exact(self) -> bool:
        """Whether nothing but what the host itself would compute may reach it."""
        return self.verified_at == 0

    @property
    def untouched(self) -> bool:
        """Whether the host runs as it would without us, and nobody evaluates ahead."""
        return self.exact and not self.rehearsed

    def idle_reason(self, ranks: int, team: TeamRecord | None = None) -> str | None:
        """What keeps a run from being faster, as far as the options say it; `team`: what the
        leader's devices did together, where it has several.
        """
        if not self.untouched:
            return None
        text = "tolerance 0 is the untouched host: nothing is evaluated ahead"
        if ranks > 1:
            text += f", and {ranks - 1} of {ranks} ranks are idle"
        if team is None:
            return text
        named = f"{len(team.devices)} devices of rank 0"
        if team.split is not None:
            return f"{text}; the {named} shared {team.shared} forwards, bit for bit"
        return f"{text}; of the {named} the first worked alone: {team.unsplit}"

    @property
    def strides(self) -> bool:
        """Whether steps may be left out, so that one device gains too."""
        return bool(self.verified_at) and self.max_stride != 1
