"""The one line of an exception that travels to the leader, and the warnings that a user gets."""

from __future__ import annotations

import warnings
from typing import Any


class FollowerWarning(RuntimeWarning):
    """A follower was left out; the result is right, the run was slower than it could be."""


class SerialWarning(RuntimeWarning):
    """The host evaluates alone; the result is right, nothing is gained."""


def warn_of(report: Any, stacklevel: int = 3) -> None:
    """Of a `Report`: one warning for each follower or helper lost, and one for speculation that
    ended.
    """
    for line in report.failures:
        text = f"rank {line.rank} {line.became} at step {line.step} ({line.status}): {line.text}"
        warnings.warn(text, FollowerWarning, stacklevel=stacklevel)
    if report.fallback is not None:
        warnings.warn(f"running serially: {report.fallback}", SerialWarning, stacklevel=stacklevel)


class Told(RuntimeError):
    """What was raised in another process, by the line that describes it there."""


def describe(error: BaseException) -> str:
    """The one line of an exception that travels to the leader, whatever its message is made of."""
    if isinstance(error, Told):
        return str(error)
    try:
        text = str(error).strip()
    except Exception as worse:
        text = f"(no message: its __str__ raised {type(worse).__name__})"
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line.split("\n", 1)[0].encode(errors="backslashreplace").decode()
