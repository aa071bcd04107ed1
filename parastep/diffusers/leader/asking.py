"""A tensor's way from ask to submit: what the leader of a loop asks the core, in every iteration
but the first.

Before the first denoiser call the core is asked with the latents that the next step will be handed,
as far as they can be told. Where it answers, the denoisers are skipped and step gets the answer.
Else they run, and what step is handed is submitted. The sample that step is handed is what counts:
it corrects the question.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ... import _core
from ...speculation import Speculation
from .. import tokens
from ..latents import Latents
from ..tensors import is_rounded
from ..watch import Watch


class Asking:
    """In one loop. `tolerance`: that of the run, or None where it has none."""

    def __init__(
        self,
        speculation: Speculation,
        core: _core.Leader,
        latents: Latents,
        watch: Watch | None,
        tolerance: float | None,
    ) -> None:
        self.latents = latents
        self.submitted = 0  # outputs that the core took
        self.answer: torch.Tensor | None = None  # in this iteration, whose denoisers are skipped
        self._speculation, self._core = speculation, core
        self._watch, self._tolerance = watch, tolerance
        self._at = self._calls = 0  # the iteration's step, and its calls of step so far
        self._asked: list[torch.Tensor] | None = None  # the samples the core was asked with
        self._xs: list[torch.Tensor] = []  # the samples that step is handed, as far as known
        self._ms: list[torch.Tensor] = []  # and outputs, of the iteration
        self._began_ns = 0

    @property
    def answered(self) -> bool:
        """Whether this iteration was: its denoisers' outputs are none of its own."""
        return self.answer is not None

    @property
    def skips(self) -> bool:
        """Whether a denoiser that is called now has nothing to evaluate: the iteration was
        answered, and not all of its steps had their part yet.
        """
        return self.answer is not None and self._calls < self.latents.form.calls

    def open(self, x: torch.Tensor, m: torch.Tensor, began_ns: int) -> None:
        """The first iteration, which nobody could have answered."""
        self._speculation.told(self._core.ask, 0, x)
        self._submit(m, began_ns)

    def is_cut_short(self) -> bool:
        """Whether the iteration had fewer steps than the first, and no more of it is to come."""
        return 0 < self._calls < self.latents.form.calls

    def iterate(self, step: int, shown: list[torch.Tensor]) -> bool:
        """The first denoiser call since the last step: the moment to ask. Whether the iteration is
        the core's to evaluate.
        """
        self._asked, self.answer, self._xs, self._ms = None, None, [], []
        self._at, self._calls = step, 0
        self._began_ns = _core.now_ns()
        if self._is_beyond_end():
            return False
        xs = self.latents.coming(shown, self._is_edited())
        if xs is None:
            why = self.latents.why_unseen()
            if why is not None:
                self._speculation.give_up(why)
            return False
        for coming, drawn in self.latents.noise_ahead(step, self._core.horizon):
            self._speculation.told(self._core.noise, coming, drawn)
        x = self.latents.point(xs)
        answer = torch.empty(x.shape, dtype=self.latents.m_dtype, device=x.device)
        self._asked = [x.detach().clone() for x in xs]  # the host may edit x in place
        wanted = () if self._is_edited_at_once() else (answer,)
        answered = self._speculation.told(self._core.ask, step, x, *wanted)
        self.answer = answer if answered else None
        return answered is False

    def _is_beyond_end(self) -> bool:
        """Of the program: a call after the last step, to fill a cache for one, or more steps."""
        return self._at >= len(self.latents)

    def _is_edited(self) -> bool:
        """Whether a callback edited the latents since the last step."""
        return self._watch is not None and self._watch.latents_edited

    def _is_edited_at_once(self) -> bool:
        """Whether a callback made an edit at this step alone: it is evaluated, however small. One
        that edits in every step is part of the loop, and what it does is drift; so is all where
        drift has no limit, or none of it is let pass.
        """
        first = self._watch is not None and self._watch.is_first_edit()
        return first and self._tolerance is not None and 0 < self._tolerance < math.inf

    def turn(self, scheduler: Any, arguments: dict[str, Any], taken_back: bool) -> Any:
        """Before a step: hands in the leader's output, or returns the answer that takes its place.
        `taken_back`: the step before it was.
        """
        latents, call = self.latents, self._calls
        m, x = arguments["model_output"], arguments["sample"]
        why = latents.why_unlike(call, scheduler, taken_back, x)
        if why is not None and self.answered:
            raise _core.ShapeError(
                f"{why}, in step {self._at}, which was not evaluated: this pipeline cannot be run "
                "in parallel"
            )
        if why is not None:
            self._speculation.give_up(why)
            return None
        if not latents.form.kept[call] or self._is_beyond_end():
            return None
        number = latents.form.latent_of(call)
        shares = tokens.shares(scheduler, arguments) if latents.form.by_token[number] else None
        x, m = x.detach(), m.detach()
        if latents.form.calls > 1:  # the host may edit them before the last one comes
            x, m = x.clone(), m.clone()
        self._xs.append(x)
        if self._asked is None or not is_rounded(self._asked[number], x):
            self._correct(number)
        if self.answer is not None:
            answer = latents.form.part(self.answer, number).to(latents.all[number].m_dtype)
            return answer if shares is None else tokens.in_own_measure(answer, shares)
        self._ms.append(m if shares is None else tokens.in_rows_measure(m, shares))
        if latents.form.is_last(number) and self._speculation.reason is None:
            self._submit(latents.output(self._ms), self._began_ns)
        return None

    def _correct(self, number: int) -> None:
        """The sample that this step is handed is not what the core was asked with: it measures and
        rebases on this one.
        """
        latents, told = self.latents, self._speculation.told
        if not self._is_edited():
            latents.all[number].was_handed(self._xs[-1])
        if self._asked is None:
            if latents.form.is_last(number):
                told(self._core.ask, self._at, latents.point(self._xs))
            return
        point = latents.point([*self._xs, *self._asked[number + 1 :]])
        if self.answer is None:
            told(self._core.amend, point)
            return
        spent = told(self._core.amend, point, self.answer)
        if None not in (spent, self._tolerance) and not spent < self._tolerance:
            self._speculation.give_up("the host edited the latents after the denoiser was called")

    def _submit(self, m: torch.Tensor, began_ns: int) -> None:
        self.submitted += 1
        self._speculation.told(self._core.submit, m, began_ns)

    def stepped(self, result: Any) -> bool:
        """Whether all steps of the iteration had their part."""
        if self._calls < self.latents.form.calls:
            self.latents.calls[self._calls].stepped(result)
        self._calls += 1
        return self._calls >= self.latents.form.calls

    def is_at_end(self) -> bool:
        """Whether the iteration is the program's last."""
        return self._at + 1 == len(self.latents)
