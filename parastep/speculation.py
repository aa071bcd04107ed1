"""What the adapters' leaders share: a core that is asked until there is a reason not to.

Used by `diffusers.leader` (a pipeline's loop) and `comfy.sampling` (a sampler function).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _core


class Speculation:
    """A run, led by the core. Where speculation has ended, `reason` says why, and the host runs
    alone.
    """

    def __init__(self, reason: str | None = None) -> None:
        self.core: _core.Leader | None = None
        self.reason = reason

    def give_up(self, reason: str) -> None:
        """From here on the host runs as it would without us; the first reason counts."""
        if self.reason is None:
            self.reason = reason
            if self.core is not None:
                self.core.stop(reason)

    def _told(self, ask: Callable[..., Any], *args: Any) -> Any:
        """What the core says; an error of its own ends speculation, not the host's run."""
        try:
            return ask(*args)
        except (_core.LostError, _core.InterruptedRunError):
            raise
        except (_core.Error, BufferError) as error:
            self.give_up(str(error))
            return None
