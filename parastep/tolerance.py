"""The dial between speed and distance to the sequential result: names, and the numbers behind."""

from __future__ import annotations

from typing import Any, Literal, SupportsFloat, TypeAlias, cast

from . import _core

Name = Literal["exact", "high", "balanced", "fast"]
Tolerance: TypeAlias = float | Name | SupportsFloat

# Rounds are run and none of their answers is used: for tests, which are to see both.
REHEARSE: Any = "rehearse"

# What a number means: a saved one is read with the scale that it was saved with.  At scale 1 the
# default was .02, and stood for about what .04 does now.
SCALE = 2

# Chosen so that what README promises of them holds in tests/bench/promise.py, on other seeds.
NAMES: dict[str, float] = {"exact": 0.0, "high": 0.006, "balanced": 0.04, "fast": 0.12}


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
