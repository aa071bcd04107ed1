"""How a loop skips iterations that are not evaluated, and denoisers' calls within them.

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

from .arguments import first_times
from .hooks import Hooks
from .tensors import map_tensors, private


class Skipping:
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


class Outputs:
    """The denoisers' outputs of the first iteration, which skipped calls return again.

    Only their shapes and containers matter: what the pipeline makes of them never reaches the
    solver, so it may even work on them in place. They are values that were really computed, since
    zeros would divide by zero in some pipelines.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[torch.Size | None, Any]] = {}

    def keep(self, module: Any, ordinal: int, inputs: list[torch.Tensor], output: Any) -> None:
        shape = inputs[0].shape if inputs else None
        # A copy: what a module returned may be memory that its next run writes to, or takes back.
        self._kept[id(module), ordinal] = (shape, map_tensors(private, output))

    def fake(self, module: Any, ordinal: int, inputs: list[torch.Tensor]) -> Any:
        """An output for this call; None where none can be made and the caller must evaluate."""
        shape = inputs[0].shape if inputs else None
        exact = self._kept.get((id(module), ordinal))
        own = [kept for (key, _), kept in self._kept.items() if key == id(module)]
        for seen, output in (*([exact] if exact else []), *(own or self._kept.values())):
            if seen == shape:
                return map_tensors(torch.Tensor.detach, output)  # the container may be edited too
        for seen, output in own:
            if seen is not None and shape is not None and seen[1:] == shape[1:]:
                return _with_batch(output, seen[0], shape[0])
        return None


def _with_batch(output: Any, before: int, after: int) -> Any:
    """The output with another batch size: calls that are not there in the first iteration."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != before:
            return tensor.detach()
        picks = torch.arange(after, device=tensor.device) % before
        return tensor.index_select(0, picks)

    return map_tensors(change, output)
