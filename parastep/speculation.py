"""What the adapters' leaders share: a core that is asked until there is a reason not to.

Used by `leading` (a pipeline's loop) and `ksampling` (a sampler function).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _core


class Speculation:
    """A run's leader. Where speculation has ended, `reason` says why, and the host runs alone."""

    def __init__(self, reason: str | None = None) -> None:
        self.leader: _core.Leader | None = None
        self.reason = reason

    def give_up(self, reason: str) -> None:
        """From here on the host runs as it would without us; the first reason counts."""
        if self.reason is None:
            self.reason = reason
            if self.leader is not None:
                self.leader.stop(reason)

    def _told(self, ask: Callable[..., Any], *args: Any) -> Any:
        """What the core says; an error of its own ends speculation, not the host's run."""
        try:
            return ask(*args)
        except (_core.LostError, _core.InterruptedRunError):
            raise
        except (_core.Error, BufferError) as error:
            self.give_up(str(error))
            return None
