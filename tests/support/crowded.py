"""A model on a device with room for one forward: the leader finds it taken by another rank's."""

from __future__ import annotations

import threading
from typing import Any

import torch


class Crowded:
    """`with crowded(leads):` around a forward. The leader's raises once, while another is at work,
    as torch does on a full device; after that there must be nobody beside it.
    """

    def __init__(self, at: int) -> None:
        """`at`: the forward of the leader's that raises, from 0 on."""
        self.at, self.refused = at, 0
        self._changed = threading.Condition()
        self._others = self._own = 0

    def __call__(self, leads: bool) -> Any:
        return _Forward(self, leads)

    def begin(self, leads: bool) -> None:
        with self._changed:
            if not leads:
                self._others += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self.refused > 0 or self._own > self.at, 10)
                return
            if self._own == self.at and self.refused == 0:
                assert self._changed.wait_for(lambda: self._others > 0, 10)
                self.refused += 1
                self._changed.notify_all()
                raise torch.OutOfMemoryError("as on a full device")
            assert self.refused == 0 or self._others == 0, "somebody is still at work"
            self._own += 1
            self._changed.notify_all()

    def end(self, leads: bool) -> None:
        with self._changed:
            self._others -= not leads
            self._changed.notify_all()


class _Forward:
    def __init__(self, crowded: Crowded, leads: bool) -> None:
        self._crowded, self._leads = crowded, leads

    def __enter__(self) -> None:
        self._crowded.begin(self._leads)

    def __exit__(self, *exc: Any) -> None:
        self._crowded.end(self._leads)
