"""A team: a rank's head, and the helpers that it shares its forwards with.

A rank's hooks call `Team.call` in place of a denoiser. A helper that is lost costs speed. Nothing
here knows of rounds or of the core.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...report import TeamRecord
from ..forwards import Inputs, shares_memory
from .crew import Crew, Cuts, Key, Lost
from .cutting import Cutting
from .foretelling import Foretelling
from .helpers import Helper
from .likeness import Likeness
from .trials import Trials

ALTERED = "the pipeline alters its denoisers within its call"
_WORDS = {"batch": "batch (to rounding)", "calls": "calls (bit for bit)"}
_CALLS = 8  # of one denoiser in an iteration: more of them are no branches of guidance


class Team:
    """Of one rank, in one call of the pipeline.

    Args:
        devices: the head's and its helpers'.
        where: the head's as the report has it, if that is more than a device.
        exact: the head's own bits alone may reach the host: nothing is cut.
        deadline: seconds that the rank may take; None: 60, or ten times the head's longest forward.
            A helper may take half of them, so that a follower is not late with it.
        over: whether the run has ended meanwhile.
        leaves: whether the rank had better leave when a helper is lost.
        raises: a lost helper is a LostError.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        helpers: Sequence[Helper],
        cuts: Cuts,
        exact: bool,
        deadline: float | None,
        over: Callable[[], bool] = lambda: False,
        leaves: Callable[[], bool] = lambda: False,
        raises: bool = False,
        where: str | None = None,
    ) -> None:
        self._crew = Crew(devices, helpers, cuts, exact, deadline, over, leaves, raises)
        self._trials, self._cutting = Trials(self._crew), Cutting(self._crew)
        self._foretelling = Foretelling(self._crew)
        self._where = where or str(devices[0])
        self._likeness: Likeness | None = None  # None: the loop has not begun
        self._is_still: Callable[[], bool] = lambda: True
        self._unsplit = 0
        self._why: str | None = None  # the newest reason why a call was not shared
        self._ordinals: Counter[str] = Counter()
        kinds = dict.fromkeys(map(_kind_of, devices))
        if exact and len(kinds) > 1:
            self.dissolve(f"tolerance 0 needs devices of one kind: {' and '.join(kinds)}")

    # ---- for the rank ----------------------------------------------------------------------------

    def open(
        self, denoisers: dict[str, torch.nn.Module], is_still: Callable[[], bool] = lambda: True
    ) -> None:
        """The loop begins, and what hangs in the denoisers keeps nothing. `is_still`: whether what
        code of the user's own reaches is as it was after the last evaluation.
        """
        self._is_still, self._likeness = is_still, Likeness(denoisers)

    def doubt(self) -> None:
        """Code of the user's own is part of what helpers compute: they show it in every call."""
        for helper in self._crew.all:
            self._crew.cuts.drop(helper.place)

    def dissolve(self, reason: str) -> None:
        """From here on the head evaluates alone; the first reason counts. From any thread."""
        self._crew.dissolve(reason)

    def begin(self, step: int) -> None:
        """An iteration: its denoisers are about to be called."""
        self._crew.step = step
        self._ordinals.clear()
        self._foretelling.begin()
        self._cutting.begin()
        self._trials.settle()

    def call(self, name: str, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What `run(*args, **kwargs)`, a call of the head's denoiser, returns."""
        key = name, self._ordinals[name]
        self._ordinals[name] += 1
        if key[1] >= _CALLS or not self._crew.helpers or not self._shares():
            self._unsplit += 1
            return run(*args, **kwargs)
        began = time.perf_counter()
        try:
            return self._shared_out(key, functools.partial(self._alone, run), args, kwargs)
        finally:
            self._crew.longest = max(self._crew.longest, time.perf_counter() - began)

    def record(self, others: Sequence[Team] = ()) -> TeamRecord:
        """For the report, by the clock of `time.perf_counter`; `others` are of the same devices."""
        teams = (self, *others)
        crews = [team._crew for team in teams]
        own, waited = (sum(c.own_time for c in crews), sum(c.waited for c in crews))
        how = [_WORDS[kind] for kind in sorted(set().union(*(team.kinds for team in teams)))]
        return TeamRecord(
            devices=[self._where, *(helper.where for helper in self._crew.all)],
            split=" and ".join(how) or None,
            unsplit=None if how else self._why_unsplit(),
            shared=sum(team._cutting.shared + team._foretelling.shared for team in teams),
            missed=sum(team._foretelling.missed for team in teams),
            whole=sum(team._unsplit for team in teams),
            served=tuple(share for crew in crews for share in crew.log),
            waited=waited if waited > own / 4 else 0.0,
        )

    @property
    def losses(self) -> list[Lost]:
        return self._crew.losses

    @property
    def lost_places(self) -> list[int]:
        return [helper.place for helper in self._crew.all if helper.lost is not None]

    @property
    def kinds(self) -> set[str]:
        """How it has shared forwards out: "batch", "calls"."""
        counts = {"batch": self._cutting.shared, "calls": self._foretelling.shared}
        return {kind for kind, count in counts.items() if count}

    # ---- how a call is shared out ----------------------------------------------------------------

    def _shares(self) -> bool:
        """Whether this call may be shared out: helpers compute no gradients, and are as the head
        was when the loop began.
        """
        if self._crew.reason is not None or self._likeness is None:
            return False
        if torch.is_grad_enabled():
            self._why = "gradients are on in its forwards"
            return False
        changed = self._likeness.changed()
        if changed is None and not self._is_still():
            changed = "what hangs in its denoisers reaches"
        if changed is not None:
            self._why = f"the loop changes {changed}"
        return changed is None

    def _shared_out(self, key: Key, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name, inputs = key[0], Inputs(args, kwargs)
        if inputs.opaque is not None:
            self._why = f"{name} is given what cannot be compared ({inputs.opaque})"
            self._unsplit += 1
            return run(*args, **kwargs)
        self._foretelling.note(key, inputs)
        whole = functools.partial(self._whole, key, run, inputs)
        if self._foretelling.has(key):
            return self._foretelling.take(key, inputs, whole)
        if key[1] == 0:
            self._foretelling.start(name, inputs)
        if not self._foretelling.has_others(name):
            cut = self._trials.verdict_of(key, inputs)
            passed = self._crew.cuts.rules.get(cut) is not None
            if passed and self._crew.are_known(self._crew.sharing(inputs)):
                instead = functools.partial(self._instead, run, inputs)
                return self._cutting.in_shares(key, inputs, cut, run, instead)
        return whole()

    def _whole(self, key: Key, run: Callable[..., Any], inputs: Inputs) -> Any:
        """By the head, with trials beside it."""
        trials, state = self._trials.begin(key, inputs), inputs.state
        output = run(*inputs.args, **inputs.kwargs)
        self._unsplit += not self._foretelling.has_others(key[0])
        self._foretelling.learn(key, output)
        if inputs.state != state:
            self.dissolve(f"{key[0]} writes to its own inputs")
        elif shares_memory(output, inputs):
            self.dissolve(f"{key[0]} gives back what it was given, or one tensor twice")
        else:
            self._trials.compare(trials, output)
        return output

    def _instead(self, run: Callable[..., Any], inputs: Inputs) -> Any:
        """By the head, since a helper failed."""
        self._unsplit += 1
        return run(*inputs.args, **inputs.kwargs)

    def _alone(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """By the head; what changes in the denoisers while they run is their own affair."""
        output = run(*args, **kwargs)
        if self._likeness is not None and self._likeness.changed() is not None:
            self._likeness.renew()
        return output

    def _why_unsplit(self) -> str:
        crew = self._crew
        lost = [lost.why for lost in crew.losses]
        reasons = [crew.reason, *lost, *crew.cuts.reasons.values(), self._why]
        found = next((reason for reason in reasons if reason), None)
        if found is None and crew.exact:
            found = "one call a step, which at tolerance 0 is not cut: a share rounds differently"
        return found or "one call a step, of one item: there is nothing to share"


def _kind_of(device: torch.device) -> str:
    """Of one kind compute the same bits."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
