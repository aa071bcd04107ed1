"""Runs one call of a parallel pipeline, from its arguments to its report.

The pipe enters here once: its ranks are made ready, the leader sets its hooks, the pipe's own
`__call__` runs, and whatever happens in it the hooks go, the followers leave, and the report is
written.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from ..options import Options
from ..quiet import quiet_followers
from ..report import HELPER_LOST, Failure, Report, TeamRecord
from .arguments import guidance_of
from .call import Followers, Given
from .hooks import Hooks
from .leader import Leader
from .leader.loops import added_up
from .ranks import Ranks
from .tensors import generators_in
from .watch import Watch

_CALLBACKS = ("callback_on_step_end", "callback")


class Run:
    """`bound`: the call's arguments, bound to the pipe's own `__call__`. `reason`: why the leader
    is to be alone, where that is known. `report` is there as soon as the call is over, whether it
    returned or raised.
    """

    def __init__(
        self,
        pipe: Any,
        ranks: Ranks,
        options: Options,
        bound: inspect.BoundArguments,
        reason: str | None = None,
    ) -> None:
        self.report = Report()
        self._pipe, self._ranks, self._options, self._bound = pipe, ranks, options, bound
        self._began = time.perf_counter()
        given, reason = _without_callbacks(bound), reason or _read_once(bound)
        self._guidance = guidance_of(pipe, bound)
        called = ranks.call(pipe, given, options, self._guidance, reason)
        call, self._followers, reason = called
        generators = (named["generator"] for named in _given(bound) if "generator" in named)
        generator = next((each for each in generators if each is not None), None)
        drawn = (generator, generators_in(*given))
        self._leader = Leader(pipe, call, self._followers, *drawn, options, ranks.state)
        if reason is not None:
            self._leader.give_up(reason)

    def go(self) -> Any:
        """What the pipe returns; what it raises is raised."""
        leader, ranks, hooks = self._leader, self._ranks, Hooks()
        if leader.active or leader.call.team is not None:
            self._watch_callbacks(hooks)
        with contextlib.ExitStack() as leaving:  # whatever one of these raises, the others are done
            leaving.callback(self._write_report)
            leaving.enter_context(quiet_followers())
            leaving.callback(ranks.gather, leader.call)
            for some in self._followers:
                leaving.callback(self._gather, some)
            leaving.callback(leader.call.end)
            leaving.callback(leader.finish)
            leaving.callback(hooks.restore)
            leader.place(hooks)
            result = self._pipe(*self._bound.args[1:], **self._bound.kwargs)
            leader.complete()
        return result

    def _watch_callbacks(self, hooks: Hooks) -> None:
        leader = self._leader
        for named in _given(self._bound):
            for name in _CALLBACKS:
                if named.get(name) is not None:
                    leader.watch = leader.watch or Watch(
                        self._pipe, hooks, leader.settings_changed, leader.model_changed
                    )
                    named[name] = leader.watch.over(named[name])

    def _gather(self, some: Followers) -> None:
        some.gather({line[0] for ended in self._leader.runs() for line in ended.report["failures"]})

    def _write_report(self) -> None:
        """The core's reports, times from the call's beginning, and what ran without the core."""
        leader, ranks = self._leader, len(self._ranks.shares)
        runs = leader.runs()
        report = added_up(runs, ranks)
        if runs:
            report.transports = leader.call.transports
        alone = leader.steps.evaluated - sum(ended.submitted for ended in runs)
        report.accepted = report.accepted + [1] * alone
        report.steps = leader.steps.count + sum(ended.steps for ended in leader.loops.ended)
        report.rounds += alone
        self._count(report)
        report.rounds -= len(runs) * self._is_lane_idle()
        report.drift = (report.drift + [math.nan] * report.steps)[: report.steps]
        report.seconds = time.perf_counter() - self._began
        report.fallback = leader.reason or self._why_nobody(report)
        report.tolerance = self._options.verified_at
        self._write_teams(report)
        team = report.teams[0] if report.teams else None
        report.limit = self._options.idle_reason(ranks, team) or self._why_not_guessed(report)
        self.report = report

    def _why_not_guessed(self, report: Report) -> str | None:
        """A scheduler that cuts what it predicts leaves guesses behind wherever it does."""
        config = getattr(getattr(self._pipe, "scheduler", None), "config", {})
        cuts = [name for name in ("clip_sample", "thresholding") if config.get(name)]
        if not cuts or report.fallback or 2 * report.rounds < report.steps:
            return None
        return (
            f"the scheduler cuts the sample it predicts ({cuts[0]}=True), which guesses do not "
            f"foresee: {report.rounds} rounds for {report.steps} steps"
        )

    def _write_teams(self, report: Report) -> None:
        """What devices did together, and which of them were lost."""
        call = self._leader.call
        leading = [team for team in (call.team, call.teams.get(0)) if team is not None]
        others = {rank: [team] for rank, team in sorted(call.teams.items()) if rank > 0}
        helped = {**({0: leading} if leading else {}), **others}
        for rank in range(report.ranks) if helped else ():
            if rank not in helped:
                devices = [self._ranks.where(place) for place in self._ranks.shares[rank]]
                why = "one device" if len(devices) == 1 else "it evaluated nothing"
                report.teams.append(TeamRecord(devices, None, why, 0, 0, 0))
        for rank, teams in helped.items():
            report.teams.insert(rank, teams[0].record(teams[1:]).since(self._leader.loops.began))
            for lost in (line for team in teams for line in team.losses):
                text = f"its helper on {lost.where} was lost: {lost.why}"
                report.failures.append(Failure(rank, lost.step, HELPER_LOST, text))
        if call.team is not None and report.fallback is None:
            self._ranks.learn(self._guidance, bool(call.team.kinds or call.team.losses))

    def _is_lane_idle(self) -> bool:
        """The core counts a round for the lane's own evaluation of step 0."""
        leader = self._leader
        evaluated = sum(some.evaluated.get(0, 0) for some in self._followers)
        return leader.call.lane and evaluated == 0

    def _why_nobody(self, report: Report) -> str | None:
        """Where none is left of those that evaluate ahead."""
        leader = self._leader
        ahead = set(range(0 if leader.call.lane else 1, report.ranks))
        lost = {line.rank: line for line in report.failures}
        if not lost or ahead - lost.keys():
            return None
        rank, step, _, text = report.failures[-1]
        return f"nobody is left to evaluate ahead: rank {rank} at step {step}: {text}"

    def _count(self, report: Report) -> None:
        """Evaluations of each rank, and forwards, of which a batch is one."""
        leader, meeting = self._leader, self._leader.call.meeting
        report.evaluations[0] = leader.steps.evaluated
        for some in self._followers:
            for rank, evaluated in some.evaluated.items():
                own = leader.steps.evaluated if rank == 0 else 0  # beside its lane's
                report.evaluations[rank] = own + evaluated
        report.forwards = sum(report.evaluations)
        if meeting is not None:
            report.forwards = leader.steps.evaluated - leader.denoising.shared + meeting.forwards
            report.unbatched = meeting.unbatched


def _given(bound: inspect.BoundArguments) -> list[dict[str, Any]]:
    """The call's named arguments, and those that its `**kwargs` took in."""
    parameters = bound.signature.parameters.values()
    extra = (p.name for p in parameters if p.kind is p.VAR_KEYWORD)
    return [bound.arguments, *(bound.arguments[n] for n in extra if n in bound.arguments)]


def _read_once(bound: inspect.BoundArguments) -> str | None:
    """Why the arguments cannot be handed to several ranks, or None."""
    once = [k for k, v in bound.arguments.items() if isinstance(v, Iterator)]
    return f"the argument {once[0]!r} can be read only once" if once else None


def _without_callbacks(bound: inspect.BoundArguments) -> Given:
    """(args, kwargs) for a replica; callbacks are the leader's alone."""
    arguments, parameters = OrderedDict(bound.arguments), bound.signature.parameters
    for name in _CALLBACKS:
        if name in arguments:
            default = parameters[name].default
            arguments[name] = None if default is inspect.Parameter.empty else default
    bound = inspect.BoundArguments(bound.signature, arguments)
    kwargs = {k: v for k, v in bound.kwargs.items() if k in parameters or k not in _CALLBACKS}
    return bound.args[1:], kwargs
