"""The helpers of one rank in one call: what is asked of them, and what is lost with them.

A helper that gives nothing in time, or nothing of use, is lost for the call, and costs speed. What
makes the denoisers no functions of their inputs ends the sharing of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Any, NamedTuple

import torch

from ... import _core
from ...messages import describe
from ...report import Share
from ...threads import finish_work
from ..forwards import Inputs, is_finite
from ..leaving import Leave
from .helpers import NAN, CannotBeSent, Helper, Served

_SLICE = 0.05  # seconds between looks at whether the run is over

Key = tuple[str, int]  # a denoiser, and which of its calls in an iteration


class HelperLost(RuntimeError):
    """This rank would go on at its head's speed alone, and others can do without it."""


class Unserved(Exception):
    """A helper gave nothing that could be used."""


class Cuts:
    """What was found out about a pipeline's forwards, for all teams and calls until its replicas
    are made anew.
    """

    def __init__(self) -> None:
        self.rules: dict[Any, str | None] = {}  # by which a call of a denoiser is cut, if it can be
        self.reasons: dict[Any, str] = {}  # why it cannot
        self.forms: dict[Any, Any] = {}  # of what such a call gives
        self.exact: set[int] = set()  # places of helpers that have given the head's own bits
        self.close: set[int] = set()  # and those that came within rounding
        self.calls: dict[Key, Inputs] = {}  # the newest of an iteration that were foretold rightly

    def drop(self, place: int) -> None:
        """Whoever serves from there now has shown nothing yet."""
        self.exact.discard(place)
        self.close.discard(place)


class Lost(NamedTuple):
    """A helper that serves no more, from which step on, and why."""

    where: str
    step: int
    why: str


class Crew:
    """Of one team. The arguments are `Team`'s.

    `reason` is why nothing is shared, in this whole call; `step` the iteration that it is in;
    `longest` the head's longest forward, in seconds.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        helpers: Sequence[Helper],
        cuts: Cuts,
        exact: bool,
        deadline: float | None,
        over: Callable[[], bool],
        leaves: Callable[[], bool],
        raises: bool,
    ) -> None:
        self.devices, self.all, self.cuts, self.exact = devices, list(helpers), cuts, exact
        self.losses: list[Lost] = []
        self.log: list[Share] = []  # of what helpers served
        self.reason: str | None = None
        self.step = 0
        self.longest = self.own_time = self.waited = 0.0
        self._deadline, self._over, self._leaves = deadline, over, leaves
        self._raises = raises

    # ---- who serves ------------------------------------------------------------------------------

    @property
    def helpers(self) -> list[Helper]:
        return [helper for helper in self.all if helper.lost is None]

    def sharing(self, inputs: Inputs) -> list[Helper]:
        """Helpers that get a share of this call's items."""
        return self.helpers[: inputs.items - 1]

    def are_known(self, helpers: Sequence[Helper]) -> bool:
        """Whether they have shown that they compute what the head does."""
        known = self.cuts.exact if self.exact else self.cuts.close
        return all(helper.place in known for helper in helpers)

    def dissolve(self, reason: str) -> None:
        """From here on the head evaluates alone; the first reason counts. From any thread."""
        self.reason = self.reason or reason

    # ---- what they serve -------------------------------------------------------------------------

    def start(
        self, helper: Helper, name: str, inputs: Inputs, watched: bool = False
    ) -> Future[Served]:
        """Has a helper evaluate, and notes when it did."""
        device, step, began = 1 + self.all.index(helper), self.step, time.perf_counter()

        def note(_: Future[Served]) -> None:
            self.log.append(Share(device, step, began, time.perf_counter()))

        answer = helper.start(name, inputs, watched)
        answer.add_done_callback(note)
        return answer

    def wait(self, helper: Helper, answer: Future[Served]) -> None:
        """Until there is an output or an error; a helper without one in time is lost."""
        patience = left = (self._deadline or max(60.0, 10 * self.longest)) / 2
        while True:
            try:
                answer.exception(min(_SLICE, left))
                return
            except NotYet:
                left -= _SLICE
            if self._over():
                raise Leave
            if left <= 0:
                self.lose(helper, f"no output within {patience:.3g} s")
                raise Unserved

    def served(self, helper: Helper, answer: Future[Served]) -> Served:
        """What it gave, finite or not; Unserved where that is nothing to use."""
        self.wait(helper, answer)
        error = answer.exception()
        if error is not None:
            self.unserved(helper, error)
            raise Unserved from error
        served = answer.result()
        if served.flaw not in (None, NAN):
            self.dissolve(str(served.flaw))
            raise Unserved
        return served

    def all_served(
        self, pairs: Sequence[tuple[Helper, Future[Served]]], began: float
    ) -> list[Served]:
        """What several gave, beside a forward of the head's own that began then."""
        finish_work(self.devices[0])
        through = time.perf_counter()
        served = [self.served(*pair) for pair in pairs]
        self.own_time += through - began
        self.waited += time.perf_counter() - through
        return served

    # ---- what is lost ----------------------------------------------------------------------------

    def unserved(self, helper: Helper, error: BaseException) -> None:
        """It answered with an error."""
        if isinstance(error, CannotBeSent):
            self.dissolve(str(error))
        else:
            self.lose(helper, str(error) if isinstance(error, _core.Error) else describe(error))

    def lose(self, helper: Helper, why: str) -> None:
        """It serves no more in this call; raises where that is the end of the call or the rank."""
        if helper.lost is None:
            helper.lost = why
            self.losses.append(Lost(helper.where, self.step, why))
        words = f"its helper on {helper.where} was lost: {why}"
        if self._raises:
            raise _core.LostError(words)
        if self._leaves():
            raise HelperLost(words)

    def blame(self, helper: Helper, whole: Any) -> None:
        """It gave NaN or Inf where `whole` was to be: the untouched model may do so too."""
        if is_finite(whole):
            self.lose(helper, f"its output {NAN}, the head's own does not")
