"""Counts the steps of a pipeline's loop by what its scheduler does, and those that the leader's
denoisers ran for.

Where several schedulers step in one iteration, the first of them counts.
"""

from __future__ import annotations

from typing import Any


class Steps:
    """Of the loop at hand, and those evaluated in all loops of a call."""

    def __init__(self) -> None:
        self.evaluated = 0  # whose denoisers ran
        self.begin()

    def begin(self) -> None:
        """Another loop is to come."""
        self.count = 0  # calls of the scheduler's step so far, but for those that were taken back
        self._scheduler: Any = None  # the iteration's first that steps
        self._index: int | None = None  # where its last step left it

    def counts(self, scheduler: Any) -> bool:
        """Whether this is the one whose steps are counted."""
        return scheduler is self._scheduler

    def take_back(self, scheduler: Any, fresh: bool, answered: bool) -> bool:
        """Whether the host has taken back the last step of this scheduler, to step once more: it
        was for what that predicts. `fresh`: no denoiser was called since.
        """
        index = getattr(scheduler, "_step_index", None)
        if not self.counts(scheduler) or not fresh or None in (index, self._index):
            return False
        if self._index != index + 1:  # type: ignore[operator]
            return False
        self.count -= 1
        self.evaluated -= not answered
        return True

    def stepped(self, scheduler: Any, fresh: bool, answered: bool) -> None:
        if self._scheduler is None or not fresh:
            self._scheduler = scheduler
        if self.counts(scheduler):
            self.count += 1
            self.evaluated += not answered
            self._index = getattr(scheduler, "_step_index", None)
