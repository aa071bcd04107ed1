"""Calls, foretold: where guidance makes several calls a step, helpers evaluate the later ones while
the head evaluates the first.

Their arguments are guessed from the first one's and the iteration before (at step 0 the pipeline's
call before, if that was given as many words and pixels). When the host makes the call, its real
arguments are compared bit for bit: the same ones take the helper's output, which is what the head
itself would give; others are evaluated as ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from ..forwards import Inputs, form_of, is_same
from .crew import Crew, Key, Unserved
from .helpers import Helper, Served

_MISSES = 2  # of a call, before it is foretold no more

Links = dict[str, slice]  # of a call's leaves to those of the first one: all items, or some


class _Guess(NamedTuple):
    """A call that the host has not made yet, and who evaluates it."""

    inputs: Inputs
    versions: Any  # of what they hold, as they were given out
    helper: Helper
    answer: Future[Served]


class Foretelling:
    """Of one team; `shared` counts the calls that were foretold rightly, `missed` the others."""

    def __init__(self, crew: Crew) -> None:
        self.shared = self.missed = 0
        self._crew, self._cuts = crew, crew.cuts
        self._before: dict[Key, Inputs] = {}  # the calls of the last iteration
        self._now: dict[Key, Inputs] = {}
        self._foretold: dict[Key, _Guess] = {}
        self._links: dict[Key, Links] = {}
        self._forms: dict[Key, Any] = {}  # of the head's own outputs
        self._misses: Counter[Key] = Counter()

    def begin(self) -> None:
        """Another iteration: calls that were not made were foretold wrongly."""
        self.missed += len(self._foretold)
        self._foretold.clear()
        self._before, self._now = self._now or self._before, {}

    def note(self, key: Key, inputs: Inputs) -> None:
        """The host makes this call."""
        self._now[key] = inputs

    def learn(self, key: Key, output: Any) -> None:
        """What the head's denoiser gave for it."""
        self._forms[key] = form_of(output)

    def has(self, key: Key) -> bool:
        """Whether a call was foretold and has not been made yet."""
        return key in self._foretold

    def has_others(self, name: str) -> bool:
        """Whether a call of this denoiser was."""
        return any(other == name for other, _ in self._foretold)

    def start(self, name: str, inputs: Inputs) -> None:
        """Starts the later calls of this iteration, with what they will be given if they differ
        from the first one as they did in the iteration before; where there is none, as in another
        pass or call with arguments of the same kinds.
        """
        before = self._before
        if (name, 0) not in before:
            before = self._cuts.calls
            if (name, 0) in before and inputs.unlike(before[name, 0]) is not None:
                return
        first, helpers = before.get((name, 0)), self._crew.helpers
        later = [key for key in before if key[0] == name and key[1] > 0]
        later = [key for key in later if self._misses[key] < _MISSES]
        if first is None or not self._crew.are_known(helpers):
            return
        for number, key in enumerate(later):
            last, exact = before[key], self._crew.exact
            links = self._links.setdefault(key, _links_between(first, last))
            guess = _followed(last, inputs, links, own=exact)
            if any(v.is_inference() for v in guess.values.values() if isinstance(v, torch.Tensor)):
                guess = guess.own_copy()  # nothing would tell that somebody wrote to them
            helper = helpers[number % len(helpers)]
            answer = self._crew.start(helper, name, guess, watched=exact)
            self._foretold[key] = _Guess(guess, guess.versions, helper, answer)

    def take(self, key: Key, inputs: Inputs, whole: Callable[[], Any]) -> Any:
        """What `whole()` gives, the head's own evaluation of a call that was foretold; where the
        guess was right, from the helper.
        """
        guess, versions, helper, answer = self._foretold.pop(key)
        if self._crew.reason is not None:
            return whole()
        if guess.versions != versions or not guess.is_same(inputs):
            self.missed += 1
            self._misses[key] += 1
            self._links.pop(key, None)
            return whole()
        try:
            served = self._crew.served(helper, answer)
        except Unserved:
            return whole()
        if served.flaw is not None:
            instead = whole()
            self._crew.blame(helper, instead)
            return instead
        form = form_of(served.output)
        if form != self._forms.get(key, self._forms.get((key[0], 0))):
            instead = whole()
            if form_of(instead) != form:
                self._crew.lose(helper, f"its output does not fit: {form}")
            return instead
        self._misses[key] = 0
        self._cuts.calls = {**self._cuts.calls, **self._now}
        self.shared += 1
        return served.output


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
