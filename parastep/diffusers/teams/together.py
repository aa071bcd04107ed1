"""A context group's head: every forward of a denoiser that is split is one of all its processes.

The head tells its members the arguments of each call, and all of them enter it in one order. Nobody
can evaluate alone: a member that is lost ends the rank, in the leader's group the call.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NoReturn

import torch

from ... import _core
from ...messages import describe
from ...report import TeamRecord
from ..forwards import Inputs
from ..leaving import Leave
from .crew import Lost
from .helpers import NAN, CannotBeSent, Helper, Served
from .likeness import Likeness
from .team import ALTERED

_SLICE = 0.05  # seconds between looks at whether the run is over
_MOMENT = 2.0  # seconds in which all have come back from a forward that one has come back from

Pending = dict[Future[Served], Helper]


class Together:
    """In one call of the pipeline, for all in this process that evaluate.

    Args:
        names: the denoisers that are split.
        own: evaluates in this process.
        others: in the members of the group.
        deadline: seconds that a forward may take, None: 60, or ten times the longest so far, and no
            limit for the first one.
        over: whether the run has ended meanwhile.
        broken: told, once, why no more forward of this group is possible.
    """

    def __init__(
        self,
        names: Collection[str],
        own: Helper,
        others: Sequence[Helper],
        deadline: float | None,
        broken: Callable[[str], None],
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        self.names, self.own, self.others = names, own, others
        self._deadline, self._broken, self._over = deadline, broken, over
        self._longest: float | None = None
        self._lock = threading.Lock()
        self._why: str | None = None  # no more forward is possible

    def evaluate(self, name: str, args: Any, kwargs: Any, watched: bool = False) -> Any:
        """What the denoiser of this name gives, whoever asks, from any thread."""
        inputs, began = Inputs(args, kwargs), time.perf_counter()
        with self._lock:  # all processes hear of forwards in one order
            if self._why is not None:
                raise _core.LostError(self._why)
            pending = {each.start(name, inputs, watched): each for each in self.others}
            failed = next((pair for pair in pending.items() if _error_of(pair[0])), None)
            own = self.own.start(name, inputs, watched) if failed is None else Future()
        if failed is not None and isinstance(_error_of(failed[0]), CannotBeSent):
            raise _core.UnsupportedError(f"{name} in a context group: {_error_of(failed[0])}")
        if failed is not None:
            self._lose(_words(*failed))
        self._wait_for(own, pending)
        served = self._served(own, pending)
        self._longest = max(self._longest or 0.0, time.perf_counter() - began)
        if served.flaw not in (None, NAN):
            raise _core.UnsupportedError(f"{name} in a context group: {served.flaw}")
        return served.output

    def _wait_for(self, own: Future[Served], pending: Pending) -> None:
        """Until this process is through, or another one has failed a moment ago."""
        began, failed = time.monotonic(), None
        limit = self._deadline
        if limit is None and self._longest is not None:
            limit = max(60.0, 10 * self._longest)
        waiting = {own, *pending}
        while not own.done():
            wait(waiting, _SLICE, FIRST_COMPLETED)
            waiting = {answer for answer in waiting if not answer.done()}
            now = time.monotonic()
            if failed is None and any(_error_of(answer) for answer in pending):
                failed = now
            if failed is not None and now - failed > _MOMENT:
                break
            if self._over():
                raise Leave
            if limit is not None and now - began > limit:
                late = [h.where for a, h in pending.items() if not a.done()]
                self._lose(f"no output within {limit:.3g} s: {' and '.join(late) or 'any'}")

    def _served(self, own: Future[Served], pending: Pending) -> Served:
        """What this process gave. Where it raised, the others have to be through as well: who is
        within the forward yet will not be in step with them again.
        """
        error = _error_of(own)
        if own.done() and error is None:
            return own.result()
        wait(pending, _MOMENT)
        lost = [p for p in pending.items() if isinstance(_error_of(p[0]), _core.Error)]
        failed = [p for p in pending.items() if _error_of(p[0])] if error is None else []
        stuck = [pair for pair in pending.items() if not pair[0].done()]
        for pair in (*lost, *failed, *stuck):
            self._lose(_words(*pair), error)
        assert error is not None
        raise error

    def _lose(self, why: str, error: BaseException | None = None) -> NoReturn:
        with self._lock:
            first = self._why is None
            self._why = self._why or f"its context group cannot go on: {why}"
        for each in (self.own, *self.others):
            each.lost = each.lost or why
        if first:
            self._broken(self._why)
        raise _core.LostError(self._why) from error


def _words(answer: Future[Served], helper: Helper) -> str:
    error = _error_of(answer)
    if error is None:
        return f"{helper.where} did not come back from a forward"
    return f"{helper.where}: {error if isinstance(error, _core.Error) else describe(error)}"


def _error_of(answer: Future[Served]) -> BaseException | None:
    return answer.exception() if answer.done() else None


class ContextTeam:
    """As a `Team` for whoever evaluates at a head, in one call. `where`: what reports call the
    processes, the head's first.
    """

    def __init__(self, together: Together, where: Sequence[str], watches: bool = False) -> None:
        self.losses: list[Lost] = []
        self.lost_places: list[int] = []
        self._together, self._where, self._watches = together, where, watches
        self._likeness: Likeness | None = None
        self._reason: str | None = None
        self._counts: Counter[bool] = Counter()
        self._step = 0

    def open(
        self, denoisers: dict[str, torch.nn.Module], is_still: Callable[[], bool] = lambda: True
    ) -> None:
        self._likeness = Likeness(denoisers)

    def doubt(self) -> None:
        """Nothing is known of members that would have to be shown again."""

    def dissolve(self, reason: str) -> None:
        """They cannot part; but other modules than the members' would give a mixture of both."""
        if reason == ALTERED:
            self._reason = reason

    def begin(self, step: int) -> None:
        self._step = step

    def call(self, name: str, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What a call of the denoiser returns; `run` makes it here, where it is not split."""
        split = name in self._together.names
        self._counts[split] += 1
        if not split:
            return run(*args, **kwargs)
        changed = self._likeness.changed() if self._likeness is not None else None
        if changed is not None or self._reason is not None:
            reason = self._reason or f"the loop changes {changed}"
            raise _core.UnsupportedError(
                f"{reason}, of which the other processes of its context group see nothing"
            )
        output = self._together.evaluate(name, args, kwargs, self._watches and self._step == 0)
        if self._likeness is not None and self._likeness.changed() is not None:
            self._likeness.renew()
        return output

    def record(self, others: Sequence[ContextTeam] = ()) -> TeamRecord:
        counts = sum((team._counts for team in (self, *others)), Counter())
        return TeamRecord(
            devices=list(self._where),
            split=f"context {len(self._where)}" if counts[True] else None,
            unsplit=None if counts[True] else "it evaluated nothing that is split",
            shared=counts[True],
            missed=0,
            whole=counts[False],
        )

    @property
    def kinds(self) -> set[str]:
        return {"context"} if self._counts[True] else set()
