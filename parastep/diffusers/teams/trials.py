"""Trials: helpers evaluate beside the head, to show that they compute what it does.

At step 0 a forward that has several items is evaluated in shares as well, by one rule after another
(`forwards.RULES`) until the shares, joined, are what the head gave. Where nothing is to be cut each
helper evaluates the whole. The head waits for none of them before its next iteration.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from ... import _core
from ...messages import describe
from ..forwards import (
    RULES,
    Apart,
    Inputs,
    check_shares,
    form_of,
    have_same_bits,
    joined,
    tensors_in,
)
from ..tensors import map_tensors
from .crew import Crew, Key, Unserved
from .helpers import NAN, CannotBeSent, Helper, Served


class Trial(NamedTuple):
    """What helpers evaluate beside the head's own call: shares of it by a rule, or the whole."""

    cut: Any  # the key of its verdict; None where helpers are only to show their bits
    rule: str
    places: list[int]
    answers: list[Future[Served]]
    wanted: list[Any]  # the head's output, when it is there
    lists: bool


class Trials:
    """Those of one team that are under way."""

    def __init__(self, crew: Crew) -> None:
        self._crew, self._cuts = crew, crew.cuts
        self._begun: list[Trial] = []

    def settle(self) -> None:
        """Another iteration begins: what the last one's trials have shown."""
        begun, self._begun = self._begun, []
        for trial in begun:
            self._settle(trial)

    def verdict_of(self, key: Key, inputs: Inputs) -> Any:
        """By which a verdict on a call is known; None where it is not one to cut."""
        if self._crew.exact or inputs.items < 2:
            return None
        return key, inputs.signature, 1 + len(self._crew.sharing(inputs))

    def begin(self, key: Key, inputs: Inputs) -> list[Trial]:
        """By the next rule not tried; where nothing is to be cut, each helper shows its bits."""
        crew, rules = self._crew, self._cuts.rules
        cut = self.verdict_of(key, inputs)
        if cut is not None:
            rule, helpers = rules.get(cut, RULES[0]), crew.sharing(inputs)
            known = cut in rules and crew.are_known(helpers)
            return [] if known or rule is None else [self._try(cut, rule, key[0], inputs, helpers)]
        if key[1] > 0:
            return []
        others = [helper for helper in crew.helpers if not crew.are_known([helper])]
        return [self._try(None, "", key[0], inputs, [helper]) for helper in others]

    def compare(self, trials: list[Trial], output: Any) -> None:
        """Has them compared with what the head gave, when they are there."""
        wanted = map_tensors(torch.clone, output) if trials else None
        for trial in trials:
            trial.wanted.append(wanted)
        self._begun += trials

    def _try(self, cut: Any, rule: str, name: str, inputs: Inputs, helpers: list[Helper]) -> Trial:
        shares = inputs.cut(cut[-1], rule) if cut is not None else [inputs]
        places, answers = [], []
        for number, share in enumerate(shares):
            helper = helpers[number % len(helpers)]
            places.append(helper.place)
            answers.append(self._crew.start(helper, name, share.own_copy(), watched=True))
        return Trial(cut, rule, places, answers, [], inputs.of_lists)

    def _settle(self, trial: Trial) -> None:
        """Compares what helpers gave with what the head did."""
        crew = self._crew
        here = {helper.place: helper for helper in crew.helpers}
        if crew.reason is not None or not here.keys() >= set(trial.places):
            return
        for place, answer in zip(trial.places, trial.answers):
            try:
                crew.wait(here[place], answer)
            except Unserved:
                return
            error = answer.exception()
            if isinstance(error, (_core.Error, CannotBeSent)):  # no verdict on its denoiser
                crew.unserved(here[place], error)
                return
        try:
            served = [answer.result() for answer in trial.answers]
            flaw = next((each.flaw for each in served if each.flaw not in (None, NAN)), None)
            if flaw is not None:
                crew.dissolve(flaw)
                return
            outputs = [each.output for each in served]
            output = joined(outputs, trial.lists) if trial.cut is not None else outputs[0]
            check_shares(output, trial.wanted[0])
        except Exception as error:  # a denoiser may raise anything at a share
            self._failed(trial, str(error) if isinstance(error, Apart) else describe(error))
            return
        self._passed(trial, output)

    def _passed(self, trial: Trial, output: Any) -> None:
        self._cuts.close.update(trial.places)
        if trial.cut is not None:
            self._cuts.rules[trial.cut] = trial.rule
            self._cuts.forms[trial.cut] = form_of(trial.wanted[0])
        elif all(map(have_same_bits, tensors_in(output), tensors_in(trial.wanted[0]))):
            self._cuts.exact.update(trial.places)
        elif self._crew.exact:
            self._crew.dissolve("a helper's output differs in bits from its head's")

    def _failed(self, trial: Trial, why: str) -> None:
        """The next rule is tried at the next step."""
        if trial.cut is None:
            self._crew.dissolve(f"a helper does not compute what its head does: {why}")
            return
        left = RULES[RULES.index(trial.rule) + 1 :]
        self._cuts.rules[trial.cut] = left[0] if left else None
        if not left:
            self._cuts.reasons[trial.cut] = f"{trial.cut[0][0]} cannot be cut: {why}"
