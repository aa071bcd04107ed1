"""How a follower's loop passes the iterations that it does not evaluate.

Most pipelines begin an iteration with `if self.interrupt: continue`. A replica whose `interrupt` is
true for a while goes through its loop at next to no cost, where every iteration that is walked
through, denoisers left out, holds Python's lock for as long as the leader's own. Not every loop can
be passed so: the first iterations are walked through and tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .hooks import Hooks, first_times


class Passing:
    """Whether one replica's loop can be passed; later checks may take that back."""

    def __init__(self, replica: Any) -> None:
        self._possible = isinstance(getattr(type(replica), "interrupt", None), property)
        self.known = False  # the first iterations have shown that it can be
        self.first: Any = None  # the first timestep
        self._reads = 0  # of `interrupt`, since the call was entered
        self._times: list[float] = []  # what the loop hands to step, from its first iteration on
        self._drawn: list[torch.Tensor] = []  # the generators' states after the first iteration
        self._generators: list[torch.Generator] = []

    def place(self, hooks: Hooks, replica: Any, passed: Callable[[], bool]) -> None:
        """`passed()` says, at the top of an iteration, whether to leave the whole of it out."""
        self._reads = 0
        if not self._possible:
            return

        def interrupt(read: Callable[[], Any]) -> Any:
            self._reads += 1
            return read() or (self.known and passed())

        hooks.wrap_property(replica, "interrupt", interrupt)

    def watch(self, random: torch.Generator, given: Iterable[Any]) -> None:
        """The generators that the loop could draw from: this one, or those among the arguments."""
        lists = (value if isinstance(value, list) else [value] for value in given)
        found = (one for values in lists for one in values)
        self._generators = [random, *(g for g in found if isinstance(g, torch.Generator))]

    def begin(self, scheduler: Any, timestep: Any) -> None:
        """The first step, of the first iteration, which every rank evaluates."""
        times = first_times(scheduler, timestep).tolist() if self._possible else []
        self._possible = times[:1] == [_number(timestep)] and len(set(times)) == len(times)
        self._times, self._drawn, self.first = times, self._states(), timestep

    def check(self, step: int, timestep: Any, moved: bool) -> bool:
        """Whether this iteration is that of this step; whether its like can be passed is learnt.

        `moved`: the loop made another sample of what the last step returned. Then, and where it
        draws from a generator, every iteration counts.
        """
        right = self._times[step : step + 1] == [_number(timestep)]
        if not self.known and self._possible:
            drawn = any(not torch.equal(a, b) for a, b in zip(self._drawn, self._states()))
            self.known = right and not drawn and self._reads == step + 1
        right = right or not self.known
        if moved or not right:
            self.give_up()
        return right

    def give_up(self) -> None:
        self._possible = self.known = False

    def _states(self) -> list[torch.Tensor]:
        return [g.get_state() for g in self._generators] if self._possible else []


def _number(timestep: Any) -> float:
    """NaN, which equals nothing, where there is a timestep for every token."""
    value = torch.as_tensor(timestep)
    return float(value) if value.numel() == 1 else math.nan
