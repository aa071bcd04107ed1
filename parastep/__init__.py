"""parastep: one diffusion generation, several denoising steps at a time (reuse-then-predict,
verified).

`parallelize(pipe, devices=[...])` for diffusers, `sample(program, denoiser, x)` for anything else;
`trace(scheduler, n)` writes a scheduler down as a `Program`; `plan(...)` predicts a run;
`calibrate(...)` finds the tolerance for a model of one's own.  Needs NumPy alone; torch and
diffusers are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._core import (
    AbandonedError,
    DeadlineError,
    DenoiserError,
    DeviceError,
    DiffersError,
    DtypeError,
    Error,
    InterruptedRunError,
    InvalidError,
    LostError,
    NotFiniteError,
    OutOfMemoryError,
    Program,
    ProtocolError,
    ShapeError,
    StateError,
    UnsupportedError,
    build_info,
)
from ._version import __version__
from .calibration import Calibration, calibrate
from .messages import FollowerWarning, SerialWarning
from .planning.plan import plan
from .report import Report
from .sampling import sample

if TYPE_CHECKING:
    from .diffusers.context import node_mesh
    from .diffusers.pipeline import ParallelPipeline, parallelize
    from .tracing.program import trace

__all__ = [
    "AbandonedError",
    "Calibration",
    "DeadlineError",
    "DenoiserError",
    "DeviceError",
    "DiffersError",
    "DtypeError",
    "Error",
    "FollowerWarning",
    "InterruptedRunError",
    "InvalidError",
    "LostError",
    "NotFiniteError",
    "OutOfMemoryError",
    "ParallelPipeline",
    "Program",
    "ProtocolError",
    "Report",
    "SerialWarning",
    "ShapeError",
    "StateError",
    "UnsupportedError",
    "__version__",
    "build_info",
    "calibrate",
    "node_mesh",
    "parallelize",
    "plan",
    "sample",
    "trace",
]

_LAZY = {
    "parallelize": "diffusers",
    "ParallelPipeline": "diffusers",
    "node_mesh": "diffusers.context",
    "trace": "tracing.program",
}


def __getattr__(name: str) -> Any:
    """torch and diffusers cost seconds to import: only who asks for them pays."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
