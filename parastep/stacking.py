"""Several steps in one call of a plain denoiser: latents end to end along the batch axis.

Used by `sampling` where a rank has several slots. Knows of arrays what torch, NumPy and the array
API have in common.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _core

_PATIENCE = 10.0  # seconds for calls in progress

Work = Sequence[tuple[int, Any]]

# How far an output may differ, alone and in a batch, relative to its largest value.
_ROUNDING = {"float64": 2.0**-20, "float32": 2.0**-12, "float16": 2.0**-7, "bfloat16": 2.0**-5}


def joined(points: Sequence[Any]) -> Any:
    """S tensors (B, ...) as one of the same kind, (S B, ...)."""
    first, torch = points[0], sys.modules.get("torch")
    if torch is not None and isinstance(first, torch.Tensor):
        return torch.cat(tuple(points))
    if isinstance(first, np.ndarray):
        return np.concatenate(points)
    if hasattr(first, "__array_namespace__"):
        return first.__array_namespace__().concat(list(points))
    kind = type(first).__name__
    raise _core.UnsupportedError(f"slots: tensors of {kind} cannot be put end to end; leave it out")


def _parts(output: Any, count: int) -> list[Any]:
    shape = tuple(getattr(output, "shape", ()))
    items, rest = divmod(shape[0] if shape else 0, count)
    if rest or not items:
        what = shape or type(output).__name__
        raise _core.ShapeError(f"the denoiser's output for {count} steps is {what}")
    return [output[k * items : (k + 1) * items] for k in range(count)]


class Stacking:
    """The denoiser as `sample` calls it; one that proves to take no batch gets none."""

    def __init__(self, denoiser: Callable[[Any, Any, int], Any]) -> None:
        self.forwards = 0
        self.unbatched: str | None = None  # why steps are not put into one call
        self.alone = True  # no other thread calls it
        self._busy = 0  # calls of it in progress
        self._denoiser = denoiser
        self._changed = threading.Condition()

    def one(self, x: Any, step: int | tuple[int, ...], rank: int) -> Any:
        """A call of the denoiser."""
        with self._changed:
            self.forwards += 1
            self._busy += 1
        try:
            return self._denoiser(x, step, rank)
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def wait_until_idle(self) -> None:
        """Until all calls in other threads have returned; one that hangs is not waited for."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy == 0, _PATIENCE)

    def all(self, work: Work, rank: int) -> list[Any]:
        """The outputs of [(step, point), ...], by one call."""
        if len(work) == 1:
            return [self.one(work[0][1], work[0][0], rank)]
        steps, points = zip(*work)
        return _parts(self.one(joined(points), steps, rank), len(work))

    def verify(self, x: Any, m: Any, slots: int, steps: int) -> None:
        """Whether step 0 in a batch with other items still gives m, its output alone."""
        others = [(min(1, steps - 1), x * 0.5)] * (slots - 1)
        try:
            found = self.all([*others, (0, x)], 0)[-1]
            bound = _ROUNDING[str(m.dtype).rpartition(".")[2]] * float(abs(m).max())
            apart = float(abs(found - m).max())
            if not apart <= bound:
                self.unbatched = f"its output in a batch differs from that alone by {apart:.3g}"
        except Exception as error:
            self.unbatched = f"a batch raises {type(error).__name__}: {error}"
