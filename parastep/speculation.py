"""What the adapters' leaders share: a core that is asked until there is a reason not to.

Used by `diffusers.leader` (a pipeline's loop) and `comfy.sampling` (a sampler function).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from . import _core

Made = TypeVar("Made")

CROWDED = "the device has no memory for the leader's forward beside the others on it"


def out_of_memory() -> type[BaseException]:
    """What torch raises where a device is full; a class of nothing without torch."""
    torch: Any = sys.modules.get("torch")
    found = getattr(torch, "OutOfMemoryError", None) or getattr(
        getattr(torch, "cuda", None), "OutOfMemoryError", None
    )
    return found if isinstance(found, type) else _Never


class _Never(Exception):
    pass


def give_room() -> None:
    """torch gives memory back to the device that it only keeps for later."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_room(make: Callable[[], Made]) -> Made:
    """What `make` makes of the core's; once more where the device is full at first."""
    try:
        return make()
    except _core.OutOfMemoryError:
        give_room()
    return make()


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

    def told(self, ask: Callable[..., Any], *args: Any) -> Any:
        """What the core says; an error of its own ends speculation, not the host's run."""
        try:
            return ask(*args)
        except (_core.LostError, _core.InterruptedRunError):
            raise
        except (_core.Error, BufferError) as error:
            self.give_up(str(error))
            return None
