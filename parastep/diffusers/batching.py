"""Several denoising steps in one forward: where the ranks of one device meet.

Each rank runs the pipeline's own loop in a thread. In front of a denoiser all that evaluate in the
round wait for each other; then one of them calls it once, with the inputs of all end to end along
the batch axis and a timestep for each item, and everybody goes on with its own part of the output.
What cannot be put together so runs one by one, and the reason is kept for the report.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..messages import describe
from .forwards import Apart, Inputs, check_output, parts_of
from .leaving import Leave
from .tensors import map_tensors

LEADER = -1  # before all lanes: where it takes part, it makes the call

_MISSES = 2  # meetings in a row that nobody shared a call in, before lanes leave


class _Coming:
    """A call that waits for the others."""

    def __init__(
        self, who: int, name: str, ordinal: int, first: bool, inputs: Inputs, run: Any
    ) -> None:
        self.who, self.name, self.ordinal, self.inputs, self.run = who, name, ordinal, inputs, run
        self.first = first  # of its evaluation
        self.output: Any = None
        self.settled = False  # there is an output, or it is to be made alone
        self.alone = False
        self.left = False  # its round is over


class Meeting:
    """Of the ranks of one device, for one call of the pipeline.

    `size`: steps in a full batch. `leads`: the leader's own evaluations are part of batches, but
    for that of step 0; otherwise they never are.
    """

    def __init__(self, size: int, leads: bool) -> None:
        self.size, self.leads = size, leads
        self.forwards = 0  # evaluations, those of a batch counting once
        self.unbatched: str | None = None  # why some were made one by one
        self._changed = threading.Condition()
        self._over = self._narrow = self._lane = False
        self._exact: dict[tuple[str, int], tuple[Inputs, Any]] = {}  # the leader's calls at step 0
        self._round = 0  # 1: that of step 0
        self._count = 0  # who evaluates in it, and by whom nothing more is to come
        self._gone: set[int] = set()
        self._began: dict[int, int] = {}  # the round that each is in
        self._waiting: list[_Coming] = []
        self._patience: float | None = None
        self._tried: set[tuple[str, int]] = set()  # denoisers, with sizes of batches
        self._misses: dict[str, int] = {}

    # Rounds.

    def tell_exact(self, name: str, ordinal: int, inputs: Inputs, output: Any) -> None:
        """The leader's call at step 0: what a batch is compared with."""
        self._exact[name, ordinal] = inputs, map_tensors(torch.clone, output)

    def open(self, ranks: set[int], lane: bool, patience: float) -> None:
        """The run begins: these have reached step 0. `lane`: rank 0's follower stays where batches
        are not possible; the others leave. Nobody waits for another longer than `patience` seconds.
        """
        with self._changed:
            self._lane, self._patience = lane, patience
            self._begin_round(1, len(ranks))
            self._began = dict.fromkeys(ranks, 1)

    def begin_loop(self) -> None:
        """A run is over, and another one is to be opened; who waits here yet was left out."""
        with self._changed:
            self._begin_round(0, 0)
            self._exact.clear()
            self._began = {}

    def begin(self, who: int, company: tuple[int, int, bool]) -> None:
        """A rank takes work; `company` as `Follower.company`. Raises RuntimeError where it had
        better leave, since nothing is gained by evaluating one by one.
        """
        number, followers, exact = company
        with self._changed:
            if number > self._round:
                self._begin_round(number, followers + (exact and self.leads))
            self._began[who] = number
            leaves = self._narrow and who != LEADER and not (who == 0 and self._lane)
        if leaves:
            raise RuntimeError(f"its steps cannot share a batch: {self.unbatched}")

    def _begin_round(self, number: int, count: int) -> None:
        for call in self._waiting:  # of ranks that were left out meanwhile
            call.left = True
        if number > 1:
            self._exact.clear()
        self._round, self._count, self._waiting, self._gone = number, count, [], set()
        self._changed.notify_all()

    def done(self, who: int) -> None:
        """Nothing more is to come from it in this round."""
        with self._changed:
            if self._began.get(who) == self._round:
                self._gone.add(who)
                self._changed.notify_all()

    def end(self) -> None:
        """The run is over: whoever waits leaves."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    # Calls.

    def call(
        self,
        who: int,
        name: str,
        ordinal: int,
        first: bool,
        run: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """What `run(*args, **kwargs)` returns, evaluated together with the others of the round."""
        coming = _Coming(who, name, ordinal, first, Inputs(args, kwargs), run)
        calls = self._meet(coming)
        if calls:
            try:
                self._evaluate(calls)
            finally:
                with self._changed:
                    for call in calls:
                        call.alone = call.alone or not call.settled
                        call.settled = True
                    self._changed.notify_all()
        if not coming.alone:
            return coming.output
        with self._changed:
            self.forwards += first
        return run(*args, **kwargs)

    def _meet(self, coming: _Coming) -> list[_Coming]:
        """Waits for the others; returns the calls to be made by this thread, if any."""

        def ready() -> bool:
            return self._over or coming.left or coming.settled or self._is_turn(coming)

        with self._changed:
            self._changed.wait_for(lambda: self._over or self._round > 0)
            if self._began.get(coming.who) != self._round:
                raise Leave  # the run began, or went on, without this rank
            self._waiting.append(coming)
            self._changed.notify_all()
            taken = self._changed.wait_for(
                lambda: ready() or coming not in self._waiting, self._patience
            )
            if not taken:  # somebody hangs
                self._count = len(self._waiting) + len(self._gone)
                self._changed.notify_all()
            self._changed.wait_for(ready)
            if coming.settled:
                return []
            if self._over or coming.left:
                raise Leave
            calls, self._waiting = self._waiting, []
            return calls

    def _is_turn(self, coming: _Coming) -> bool:
        """Whether all are there and this one makes the call."""
        if coming not in self._waiting or len(self._waiting) + len(self._gone) < self._count:
            return False
        return coming.who == min(call.who for call in self._waiting)

    # Batches.

    def _evaluate(self, calls: list[_Coming]) -> None:
        for name in dict.fromkeys(call.name for call in calls):
            named = [call for call in calls if call.name == name]
            if self._round == 1:
                self._try(named)
                continue
            groups = _groups(named)
            shared = [group for group in groups if len(group) > 1 and self._share(group)]
            if shared:
                self._misses[name] = 0
            elif len(groups) > 1:
                self._miss(name, groups)

    def _miss(self, name: str, groups: list[list[_Coming]]) -> None:
        """Everybody came with something else. That may be so at a step where settings change."""
        what = groups[0][0].inputs.unlike(groups[1][0].inputs)
        self.unbatched = self.unbatched or f"{what} of {name} differs from step to step"
        self._misses[name] = self._misses.get(name, 0) + 1
        self._narrow = self._narrow or self._misses[name] >= _MISSES

    def _give_up(self, error: Exception) -> None:
        why = str(error) if isinstance(error, Apart) else f"a batch raises {describe(error)}"
        self.unbatched, self._narrow = self.unbatched or why, True

    def _try(self, calls: list[_Coming]) -> None:
        """Step 0, which the leader has evaluated alone: once more, in a batch with other items.

        Those that were to do the same then go on with the leader's output. Others evaluate alone,
        and the core sees whether they compute its function; so does the one that is to go on alone.
        """
        name, ordinal = calls[0].name, calls[0].ordinal
        if (name, ordinal) not in self._exact:
            return
        inputs, wanted = self._exact[name, ordinal]
        same = [call for call in calls if call.inputs.equals(inputs)]
        if same:
            try:
                batch = [*[inputs.altered()] * (self.size - 1), inputs]
                check_output(self._run(same[0], batch)[-1], wanted)
                self._tried.add((name, inputs.items))
            except Exception as error:
                self._give_up(error)
        for call in same:
            if not (self._narrow and call.who == 0):
                call.output, call.settled = map_tensors(torch.clone, wanted), True

    def _share(self, group: list[_Coming]) -> bool:
        """One call for all of the group; False where that cannot be."""
        if self._narrow:
            return False
        last, trial = group[-1], (group[0].name, group[0].inputs.items)
        try:
            outputs = self._run(group[0], [call.inputs for call in group])
            if trial not in self._tried:  # not called at step 0
                alone = last.run(*last.inputs.args, **last.inputs.kwargs)
                self._tried.add(trial)
                check_output(outputs[-1], alone)
        except Exception as error:
            self._give_up(error)
            return False
        for call, output in zip(group, outputs):
            call.output, call.settled = output, True
        return True

    def _run(self, call: _Coming, every: list[Inputs]) -> list[Any]:
        inputs = every[0].joined(every[1:])
        with self._changed:
            self.forwards += call.first
        return parts_of(call.run(*inputs.args, **inputs.kwargs), len(every))


def _groups(calls: list[_Coming]) -> list[list[_Coming]]:
    """Calls with inputs alike, in order of rank. The replica of the first follower makes the call,
    so that nothing of the leader's own model changes by it.
    """
    groups: list[list[_Coming]] = []
    for call in sorted(calls, key=lambda call: (call.who == LEADER, call.who)):
        for group in groups:
            if group[0].inputs.unlike(call.inputs) is None:
                group.append(call)
                break
        else:
            groups.append([call])
    return groups
