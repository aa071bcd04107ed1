"""Teams: one evaluation, several devices. The head runs the loop, helpers serve it with forwards.

A rank's hooks call `Team.call` in place of a denoiser. Two ways to share a step out:

- A batch is cut: guidance evaluates its branches as items of one forward, which is cut into shares,
  one a device, and the outputs are joined. Whether and how a forward can be cut is tried at step 0,
  beside the whole one. Equal to rounding, so never at tolerance 0.
- Calls are foretold: where guidance makes several calls a step, the later ones' arguments are
  guessed from the first one's and the iteration before (at step 0 the pipeline's call before, if
  that was given as many words and pixels), and evaluated by helpers meanwhile. When the host makes
  the call, its real arguments are compared bit for bit: the same ones take the helper's output,
  which is what the head itself would give; others are evaluated as ever.

A helper that is lost costs speed. Nothing here knows of rounds or of the core.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Any, NamedTuple

import torch

from .. import _core
from ..messages import describe
from ..report import Share, TeamRecord
from ..threads import finish_work
from .forwards import (
    RULES,
    Apart,
    Inputs,
    check_shares,
    form_of,
    have_same_bits,
    is_finite,
    is_same,
    joined,
    shares_memory,
    tensors_in,
)
from .helpers import NAN, CannotBeSent, Helper, Served
from .leaving import Leave
from .likeness import Likeness
from .tensors import map_tensors

ALTERED = "the pipeline alters its denoisers within its call"
_WORDS = {"batch": "batch (to rounding)", "calls": "calls (bit for bit)"}
_CALLS = 8  # of one denoiser in an iteration: more of them are no branches of guidance
_MISSES = 2  # of a call, before it is foretold no more
_SLICE = 0.05  # seconds between looks at whether the run is over

Links = dict[str, slice]  # of a call's leaves to those of the first one: all items, or some
Key = tuple[str, int]  # a denoiser, and which of its calls in an iteration


class HelperLost(RuntimeError):
    """This rank would go on at its head's speed alone, and others can do without it."""


class _Unserved(Exception):
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

    device: torch.device
    step: int
    why: str


class _Trial(NamedTuple):
    """What helpers evaluate beside the head's own call: shares of it by a rule, or the whole."""

    cut: Any  # the key of its verdict; None where helpers are only to show their bits
    rule: str
    places: list[int]
    answers: list[Future[Served]]
    wanted: list[Any]  # the head's output, when it is there
    lists: bool


class _Made(NamedTuple):
    """An output that was joined, and its shares where they were made, the head's first."""

    whole: torch.Tensor
    version: int
    shares: Sequence[torch.Tensor]


class Team:
    """Of one rank, in one call of the pipeline.

    Args:
        devices: the head's and its helpers'.
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
    ) -> None:
        self.losses: list[Lost] = []
        self._devices, self._all, self._cuts, self._exact = devices, list(helpers), cuts, exact
        self._deadline, self._over, self._leaves = deadline, over, leaves
        self._raises = raises
        self._longest = self._own_time = self._waited = 0.0
        self._ready = False
        self._reason: str | None = None  # why it shares nothing, in this whole call
        self._shared: Counter[str] = Counter()  # forwards, by how
        self._missed = self._unsplit = 0
        self._log: list[Share] = []  # of what helpers served
        self._step = 0
        self._likeness: Likeness | None = None
        self._is_still: Callable[[], bool] = lambda: True
        self._why: str | None = None  # the newest reason why a call was not shared
        self._ordinals: Counter[str] = Counter()
        self._before: dict[Key, Inputs] = {}  # the calls of the last iteration
        self._now: dict[Key, Inputs] = {}
        self._foretold: dict[Key, tuple[Inputs, list[int], Helper, Future[Served]]] = {}
        self._links: dict[Key, Links] = {}
        self._forms: dict[Key, Any] = {}  # of the head's own outputs
        self._misses: Counter[Key] = Counter()
        self._trials: list[_Trial] = []
        self._made: dict[int, _Made] = {}  # in this iteration, by the whole's id
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
        self._is_still = is_still
        self._likeness, self._ready = Likeness(denoisers), True

    def doubt(self) -> None:
        """Code of the user's own is part of what helpers compute: they show it in every call."""
        for helper in self._all:
            self._cuts.drop(helper.place)

    def dissolve(self, reason: str) -> None:
        """From here on the head evaluates alone; the first reason counts. From any thread."""
        self._reason = self._reason or reason

    def begin(self, step: int) -> None:
        """An iteration: its denoisers are about to be called."""
        self._step = step
        self._missed += len(self._foretold)  # calls that were not made
        self._ordinals.clear()
        self._foretold.clear()
        self._made.clear()
        self._before, self._now = self._now or self._before, {}
        trials, self._trials = self._trials, []
        for trial in trials:
            self._settle(trial)

    def call(self, name: str, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What `run(*args, **kwargs)`, a call of the head's denoiser, returns."""
        key = name, self._ordinals[name]
        self._ordinals[name] += 1
        if key[1] >= _CALLS or not self._helpers or not self._shares():
            self._unsplit += 1
            return run(*args, **kwargs)
        began = time.perf_counter()
        try:
            return self._shared_out(key, run, args, kwargs)
        finally:
            self._longest = max(self._longest, time.perf_counter() - began)

    def _shared_out(self, key: Key, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name, inputs = key[0], Inputs(args, kwargs)
        if inputs.opaque is not None:
            self._why = f"{name} is given what cannot be compared ({inputs.opaque})"
            self._unsplit += 1
            return self._alone(run, args, kwargs)
        self._now[key] = inputs
        if key in self._foretold:
            return self._taken(key, run, inputs)
        if key[1] == 0:
            self._foretell(name, inputs)
        if not any(other == name for other, _ in self._foretold):
            cut = self._cut_of(key, inputs)
            rule = self._cuts.rules.get(cut)
            if rule is not None and self._are_known(self._sharing(inputs)):
                return self._in_shares(run, inputs, key, cut, rule)
        return self._whole(key, run, inputs)

    def _alone(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """By the head; what changes in the denoisers while they run is their own affair."""
        output = run(*args, **kwargs)
        if self._likeness is not None and self._likeness.changed() is not None:
            self._likeness.renew()
        return output

    def record(self, others: Sequence[Team] = ()) -> TeamRecord:
        """For the report, by the clock of `time.perf_counter`; `others` are of the same devices."""
        teams = (self, *others)
        own, waited = (sum(times) for times in zip(*((t._own_time, t._waited) for t in teams)))
        how = [_WORDS[kind] for kind in sorted(set().union(*(team.kinds for team in teams)))]
        return TeamRecord(
            devices=[str(device) for device in self._devices],
            split=" and ".join(how) or None,
            unsplit=None if how else self._why_unsplit(),
            shared=sum(sum(team._shared.values()) for team in teams),
            missed=sum(team._missed for team in teams),
            whole=sum(team._unsplit for team in teams),
            served=tuple(share for team in teams for share in team._log),
            waited=waited if waited > own / 4 else 0.0,
        )

    @property
    def lost_places(self) -> list[int]:
        return [helper.place for helper in self._all if helper.lost is not None]

    @property
    def kinds(self) -> set[str]:
        """How it has shared forwards out: "batch", "calls"."""
        return set(self._shared)

    # ---- who serves ------------------------------------------------------------------------------

    @property
    def _helpers(self) -> list[Helper]:
        return [helper for helper in self._all if helper.lost is None]

    def _sharing(self, inputs: Inputs) -> list[Helper]:
        """Helpers that get a share of this call's items."""
        return self._helpers[: inputs.items - 1]

    def _shares(self) -> bool:
        """Whether this call may be shared out: helpers compute no gradients, and are as the head
        was when the loop began.
        """
        if not self._ready or self._reason is not None or self._likeness is None:
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

    @property
    def _known(self) -> set[int]:
        """Places of helpers that compute what the head does."""
        return self._cuts.exact if self._exact else self._cuts.close

    def _are_known(self, helpers: Sequence[Helper]) -> bool:
        return all(helper.place in self._known for helper in helpers)

    def _why_unsplit(self) -> str:
        lost = [lost.why for lost in self.losses]
        reasons = [self._reason, *lost, *self._cuts.reasons.values(), self._why]
        found = next((reason for reason in reasons if reason), None)
        if found is None and self._exact:
            found = "one call a step, which at tolerance 0 is not cut: a share rounds differently"
        return found or "one call a step, of one item: there is nothing to share"

    def _start(
        self, helper: Helper, name: str, inputs: Inputs, watched: bool = False
    ) -> Future[Served]:
        """Has a helper evaluate, and notes when it did."""
        device, step, began = 1 + self._all.index(helper), self._step, time.perf_counter()

        def note(_: Future[Served]) -> None:
            self._log.append(Share(device, step, began, time.perf_counter()))

        answer = helper.start(name, inputs, watched)
        answer.add_done_callback(note)
        return answer

    def _wait(self, helper: Helper, answer: Future[Served]) -> None:
        """Until there is an output or an error; a helper without one in time is lost."""
        patience = left = (self._deadline or max(60.0, 10 * self._longest)) / 2
        while True:
            try:
                answer.exception(min(_SLICE, left))
                return
            except NotYet:
                left -= _SLICE
            if self._over():
                raise Leave
            if left <= 0:
                self._lose(helper, f"no output within {patience:.3g} s")
                raise _Unserved

    def _served(self, helper: Helper, answer: Future[Served]) -> Served:
        self._wait(helper, answer)
        error = answer.exception()
        if error is not None:
            self._unserved(helper, error)
            raise _Unserved from error
        served = answer.result()
        if served.flaw not in (None, NAN):
            self.dissolve(str(served.flaw))
            raise _Unserved
        return served

    def _unserved(self, helper: Helper, error: BaseException) -> None:
        if isinstance(error, CannotBeSent):
            self.dissolve(str(error))
        else:
            self._lose(helper, str(error) if isinstance(error, _core.Error) else describe(error))

    def _lose(self, helper: Helper, why: str) -> None:
        if helper.lost is None:
            helper.lost = why
            self.losses.append(Lost(helper.device, self._step, why))
        words = f"its helper on {helper.device} was lost: {why}"
        if self._raises:
            raise _core.LostError(words)
        if self._leaves():
            raise HelperLost(words)

    # ---- the whole, and trials beside it ---------------------------------------------------------

    def _whole(self, key: Key, run: Callable[..., Any], inputs: Inputs) -> Any:
        trials, state = self._begin_trials(key, inputs), inputs.state
        output = self._alone(run, inputs.args, inputs.kwargs)
        self._unsplit += not any(other == key[0] for other, _ in self._foretold)
        self._forms[key] = form_of(output)
        if inputs.state != state:
            self.dissolve(f"{key[0]} writes to its own inputs")
        elif shares_memory(output, inputs):
            self.dissolve(f"{key[0]} gives back what it was given, or one tensor twice")
        elif trials:
            wanted = map_tensors(torch.clone, output)
            for trial in trials:
                trial.wanted.append(wanted)
            self._trials += trials
        return output

    def _cut_of(self, key: Key, inputs: Inputs) -> Any:
        """By which a verdict is known; None where the call is not one to cut."""
        if self._exact or inputs.items < 2:
            return None
        return key, inputs.signature, 1 + len(self._sharing(inputs))

    def _begin_trials(self, key: Key, inputs: Inputs) -> list[_Trial]:
        """By the next rule not tried; where nothing is to be cut, each helper shows its bits."""
        cut = self._cut_of(key, inputs)
        if cut is not None:
            rule, helpers = self._cuts.rules.get(cut, RULES[0]), self._sharing(inputs)
            known = cut in self._cuts.rules and self._are_known(helpers)
            return [] if known or rule is None else [self._try(cut, rule, key[0], inputs, helpers)]
        if key[1] > 0:
            return []
        others = [helper for helper in self._helpers if helper.place not in self._known]
        return [self._try(None, "", key[0], inputs, [helper]) for helper in others]

    def _try(self, cut: Any, rule: str, name: str, inputs: Inputs, helpers: list[Helper]) -> _Trial:
        shares = inputs.cut(cut[-1], rule) if cut is not None else [inputs]
        places, answers = [], []
        for number, share in enumerate(shares):
            helper = helpers[number % len(helpers)]
            places.append(helper.place)
            answers.append(self._start(helper, name, share.own_copy(), watched=True))
        return _Trial(cut, rule, places, answers, [], inputs.of_lists)

    def _settle(self, trial: _Trial) -> None:
        """Compares what helpers gave with what the head did."""
        here = {helper.place: helper for helper in self._helpers}
        if self._reason is not None or not here.keys() >= set(trial.places):
            return
        for place, answer in zip(trial.places, trial.answers):
            try:
                self._wait(here[place], answer)
            except _Unserved:
                return
            error = answer.exception()
            if isinstance(error, (_core.Error, CannotBeSent)):  # no verdict on its denoiser
                self._unserved(here[place], error)
                return
        try:
            served = [answer.result() for answer in trial.answers]
            flaw = next((each.flaw for each in served if each.flaw not in (None, NAN)), None)
            if flaw is not None:
                self.dissolve(flaw)
                return
            outputs = [each.output for each in served]
            output = joined(outputs, trial.lists) if trial.cut is not None else outputs[0]
            check_shares(output, trial.wanted[0])
        except Exception as error:  # a denoiser may raise anything at a share
            self._failed(trial, str(error) if isinstance(error, Apart) else describe(error))
            return
        self._cuts.close.update(trial.places)
        if trial.cut is not None:
            self._cuts.rules[trial.cut] = trial.rule
            self._cuts.forms[trial.cut] = form_of(trial.wanted[0])
        elif all(map(have_same_bits, tensors_in(output), tensors_in(trial.wanted[0]))):
            self._cuts.exact.update(trial.places)
        elif self._exact:
            self.dissolve("a helper's output differs in bits from its head's")

    def _failed(self, trial: _Trial, why: str) -> None:
        """The next rule is tried at the next step."""
        if trial.cut is None:
            self.dissolve(f"a helper does not compute what its head does: {why}")
            return
        left = RULES[RULES.index(trial.rule) + 1 :]
        self._cuts.rules[trial.cut] = left[0] if left else None
        if not left:
            self._cuts.reasons[trial.cut] = f"{trial.cut[0][0]} cannot be cut: {why}"

    # ---- a batch, cut ----------------------------------------------------------------------------

    def _in_shares(
        self, run: Callable[..., Any], inputs: Inputs, key: Key, cut: Any, rule: str
    ) -> Any:
        """The head evaluates the first share, helpers the others; one that gives none is lost, and
        the head evaluates the whole. All work on copies, for the case that it comes to that.
        """
        helpers = self._sharing(inputs)
        first, *others = self._cut(inputs, 1 + len(helpers), rule)
        pairs = [(h, self._start(h, key[0], share)) for h, share in zip(helpers, others)]
        with torch.inference_mode(False):
            first = first.own_copy()
        state = first.state
        began = time.perf_counter()
        try:
            own = self._alone(run, first.args, first.kwargs)
        except Exception as error:  # the whole says whether it is the share's fault
            self._cuts.rules[cut] = None
            self._cuts.reasons[cut] = f"{key[0]} raises {describe(error)} for a share"
            return self._instead(key, run, inputs)
        if first.state != state:
            self.dissolve(f"{key[0]} writes to its own inputs")
            return self._instead(key, run, inputs)
        try:
            served = self._all_served(pairs, began)
            output = self._joined(own, pairs, served, inputs.of_lists)
            if form_of(output) != self._cuts.forms[cut]:
                self._lose(helpers[0], f"its output does not fit: {form_of(output)}")
                raise _Unserved
        except _Unserved:
            return self._instead(key, run, inputs)
        if all(share.flaw is None for share in served):
            self._shared["batch"] += 1
            return output
        whole = self._instead(key, run, inputs)
        broken = next(helper for (helper, _), share in zip(pairs, served) if share.flaw)
        self._blame(broken, whole)
        return whole

    def _all_served(self, pairs: Any, began: float) -> list[Served]:
        finish_work(self._devices[0])
        through = time.perf_counter()
        served = [self._served(*pair) for pair in pairs]
        self._own_time += through - began
        self._waited += time.perf_counter() - through
        return served

    def _instead(self, key: Key, run: Callable[..., Any], inputs: Inputs) -> Any:
        self._unsplit += 1
        return self._alone(run, inputs.args, inputs.kwargs)

    def _cut(self, inputs: Inputs, count: int, rule: str) -> list[Inputs]:
        """What was made in shares in this iteration, a ControlNet's residuals, stays with those."""
        shares = inputs.cut(count, rule)
        for k, share in enumerate(shares if self._made else ()):
            if share.values.keys() == inputs.values.keys():
                pairs = zip(inputs.values.values(), share.values.values())
                shares[k] = share.with_values([self._made_by(k, *pair) for pair in pairs])
        return shares

    def _made_by(self, k: int, whole: Any, share: Any) -> Any:
        made = self._made.get(id(whole))
        return share if made is None or whole._version != made.version else made.shares[k]

    def _joined(self, own: Any, pairs: Any, served: list[Served], lists: bool) -> Any:
        output = own
        for (helper, _), share in zip(pairs, served):
            try:
                output = joined([output, share.output], lists)
            except Exception as error:  # of another kind, or another form
                self._lose(helper, f"its output does not fit: {describe(error)}")
                raise _Unserved from error
        if not lists:
            self._remember(output, own, [share.kept for share in served])
        return output

    def _remember(self, output: Any, own: Any, kept: Sequence[Any]) -> None:
        if any(made is None for made in kept):
            return
        columns = zip(tensors_in(own), *map(tensors_in, kept))
        for whole, shares in zip(tensors_in(output), columns):
            if not whole.is_inference():  # nothing would tell that the host wrote to it
                self._made[id(whole)] = _Made(whole, whole._version, shares)

    def _blame(self, helper: Helper, whole: Any) -> None:
        """A helper gave NaN or Inf: the untouched model may do so too."""
        if is_finite(whole):
            self._lose(helper, f"its output {NAN}, the head's own does not")

    # ---- calls, foretold -------------------------------------------------------------------------

    def _foretell(self, name: str, inputs: Inputs) -> None:
        """Starts the later calls of this iteration, with what they will be given if they differ
        from the first one as they did in the iteration before; where there is none, as in another
        pass or call with arguments of the same kinds.
        """
        before = self._before
        if (name, 0) not in before:
            before = self._cuts.calls
            if (name, 0) in before and inputs.unlike(before[name, 0]) is not None:
                return
        first = before.get((name, 0))
        later = [key for key in before if key[0] == name and key[1] > 0]
        later = [key for key in later if self._misses[key] < _MISSES]
        if first is None or not self._are_known(self._helpers):
            return
        for number, key in enumerate(later):
            last = before[key]
            links = self._links.setdefault(key, _links_between(first, last))
            guess = _followed(last, inputs, links, own=self._exact)
            if any(v.is_inference() for v in guess.values.values() if isinstance(v, torch.Tensor)):
                guess = guess.own_copy()  # nothing would tell that somebody wrote to them
            helper = self._helpers[number % len(self._helpers)]
            answer = self._start(helper, name, guess, watched=self._exact)
            self._foretold[key] = guess, guess.versions, helper, answer

    def _taken(self, key: Key, run: Callable[..., Any], inputs: Inputs) -> Any:
        guess, versions, helper, answer = self._foretold.pop(key)
        if self._reason is not None:
            return self._whole(key, run, inputs)
        if guess.versions != versions or not guess.is_same(inputs):
            self._missed += 1
            self._misses[key] += 1
            self._links.pop(key, None)
            return self._whole(key, run, inputs)
        try:
            served = self._served(helper, answer)
        except _Unserved:
            return self._whole(key, run, inputs)
        if served.flaw is not None:
            whole = self._whole(key, run, inputs)
            self._blame(helper, whole)
            return whole
        form = form_of(served.output)
        if form != self._forms.get(key, self._forms.get((key[0], 0))):
            whole = self._whole(key, run, inputs)
            if form_of(whole) != form:
                self._lose(helper, f"its output does not fit: {form}")
            return whole
        self._misses[key] = 0
        self._cuts.calls = {**self._cuts.calls, **self._now}
        self._shared["calls"] += 1
        return served.output


def _kind_of(device: torch.device) -> str:
    """Of one kind compute the same bits."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _links_between(first: Inputs, last: Inputs) -> Links:
    """Where a later call of an iteration was given what the first one was, or some items of it."""
    found = {leaf: _link(first.values.get(leaf), value) for leaf, value in last.values.items()}
    return {leaf: link for leaf, link in found.items() if link is not None}


def _link(theirs: Any, ours: Any) -> slice | None:
    if is_same(ours, theirs):
        return slice(None)
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return None
    if ours.dim() == 0 or ours.dim() != theirs.dim() or not len(ours) < len(theirs):
        return None
    shares = (slice(k, k + len(ours)) for k in range(0, len(theirs), len(ours)))
    return next((share for share in shares if is_same(ours, theirs[share])), None)


def _followed(last: Inputs, first: Inputs, links: Links, own: bool) -> Inputs:
    """The later call of this iteration, by the first one; what follows nothing is as it was. `own`:
    what follows is copied, to be compared by its values: it is what hosts write to.
    """
    values = []
    for leaf, value in last.values.items():
        link, now = links.get(leaf), first.values.get(leaf)
        if link is not None and now is not None:
            value = now[link] if link != slice(None) else now
            copied = value.clone() if own and isinstance(value, torch.Tensor) else value
            if isinstance(value, torch.Tensor) and copied.stride() == value.stride():
                value = copied
        values.append(value)
    return last.with_values(values)
