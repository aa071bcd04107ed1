"""The dial between speed and distance to the sequential result: names, and the numbers behind."""

from __future__ import annotations

from typing import Any, Literal, SupportsFloat, TypeAlias, cast

from . import _core

Name = Literal["exact", "high", "balanced", "fast"]
Tolerance: TypeAlias = float | Name

# Rounds are run and none of their answers is used: for tests, which are to see both.
REHEARSE: Any = "rehearse"

# Points of the curve that tests/bench/fidelity.py measures.
NAMES: dict[str, float] = {"exact": 0.0, "high": 0.005, "balanced": 0.02, "fast": 0.05}


def read(text: str) -> Tolerance:
    """What was written on a command line: a number, or a name that is yet to be looked up."""
    try:
        return float(text)
    except ValueError:
        return cast(Tolerance, text)


def number_of(tolerance: Tolerance) -> float:
    """The number behind a name; InvalidError for what is neither a name nor 0 or above."""
    if isinstance(tolerance, str):
        if tolerance not in NAMES:
            names = ", ".join(map(repr, NAMES))
            raise _core.InvalidError(
                f"tolerance: {tolerance!r}: must be a number or one of {names}"
            )
        return NAMES[tolerance]
    if not isinstance(tolerance, SupportsFloat) or isinstance(tolerance, bool):
        raise TypeError(f"tolerance: {tolerance!r}: must be a number")
    if not float(tolerance) >= 0:
        raise _core.InvalidError(f"tolerance {float(tolerance):g}: must be 0 (exact) or above")
    return float(tolerance)
