"""The calls of denoisers in the leader's iterations: skipped ones return what the first iteration's
returned, the others run, alone, shared out among devices, or as a part of a batch.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ..batching import LEADER
from ..call import Call
from ..forwards import Inputs
from ..skipping import Outputs
from ..writing import Written

Run = Callable[..., Any]


class Denoising:
    """Of a call's iterations, one after the other."""

    def __init__(self, call: Call) -> None:
        self.fresh = True  # no denoiser call yet since the last step
        self.shared = 0  # iterations that were evaluated together with other ranks'
        self._call = call
        self._joins = False  # this iteration's is part of a batch
        self.begin()

    def begin(self) -> None:
        """Another loop is to come."""
        self.fresh = True
        self._ordinals: Counter[int] = Counter()
        self._outputs, self._written = Outputs(), Written()  # of and by the first iteration's calls

    def iterate(self) -> None:
        """A denoiser is called for the first time since the last step."""
        self.fresh = False
        self._ordinals.clear()

    @property
    def calls(self) -> int:
        """Of denoisers since the iteration began."""
        return self._ordinals.total()

    @property
    def most_calls(self) -> int:
        """Of one of them."""
        return max(self._ordinals.values(), default=0)

    def measured(self, name: str, run: Run, step: int) -> Run:
        """`run` as one device does it, or the leader's team."""
        call = self._call
        if step == 0 and call.peak is not None:
            run = call.peak.over(run)
        if call.team is not None:
            return functools.partial(self._share_out, self.fresh, step, name, run)
        return run

    def _share_out(self, first: bool, step: int, name: str, run: Run, *args: Any, **kw: Any) -> Any:
        if first:
            self._call.team.begin(self._call.steps_before(len(self._call.loops)) + step)
        return self._call.team.call(name, run, args, kw)

    def count(self, module: torch.nn.Module) -> int:
        """The number of this call of it in the iteration, from 0 on."""
        self._ordinals[id(module)] += 1
        return self._ordinals[id(module)] - 1

    def fake(self, module: torch.nn.Module, ordinal: int, inputs: list[torch.Tensor]) -> Any:
        """What a skipped call returns; None where the denoiser has to run."""
        return self._outputs.fake(module, ordinal, inputs)

    def first(
        self,
        name: str,
        module: torch.nn.Module,
        ordinal: int,
        inputs: list[torch.Tensor],
        run: Run,
        args: Any,
        kwargs: Any,
    ) -> Any:
        """A call in a loop's first iteration, whose output is what skipped ones will return."""
        meeting = self._call.meeting
        given = Inputs(args, kwargs).own_copy() if meeting is not None else None
        output = self._written.over(run)(*args, **kwargs)
        self._outputs.keep(module, ordinal, inputs, output)
        if given is not None and meeting is not None:
            meeting.tell_exact(name, ordinal, given, output)
        return output

    def why_written(self, args: Any, kwargs: Any) -> str | None:
        """Why the denoisers are no functions, by what a call of the second iteration is handed."""
        name = self._written.handed_again(args, kwargs)
        return name and f"a denoiser writes to what it is handed again, {name}"

    def join(self, company: tuple[int, int, bool]) -> None:
        """This iteration's calls are to be part of batches, where there are any."""
        meeting = self._call.meeting
        if meeting is not None and meeting.leads:
            meeting.begin(LEADER, company)
            self._joins = True

    @property
    def is_joined(self) -> bool:
        return self._joins

    def together(
        self, name: str, ordinal: int, first: bool, run: Run, args: Any, kwargs: Any
    ) -> Any:
        assert self._call.meeting is not None
        self.shared += first
        return self._call.meeting.call(LEADER, name, ordinal, first, run, args, kwargs)

    def leave(self) -> None:
        """No more of this iteration's calls are to come."""
        if self._joins and self._call.meeting is not None:
            self._call.meeting.done(LEADER)
        self._joins = False
