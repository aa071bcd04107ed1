"""Bytes, seconds and links as users write them: "2.2MB", "600ms", "25GbE"."""

from __future__ import annotations

import math
import re

from .. import _core

# Bytes a second in one direction and seconds until the first of them arrives; nominal figures.
LINKS = {
    "nvlink": (450e9, 10e-6),  # fourth generation, as on an H100
    "pcie5": (63e9, 10e-6),  # 16 lanes
    "pcie": (31.5e9, 10e-6),  # fourth generation, 16 lanes
    "pcie3": (15.75e9, 10e-6),
    "100GbE": (12.5e9, 30e-6),
    "25GbE": (3.125e9, 30e-6),
    "10GbE": (1.25e9, 30e-6),
    "1GbE": (0.125e9, 50e-6),
}

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def _number_in(text: float | str, name: str, pattern: str, example: str) -> tuple[float, str]:
    if isinstance(text, (int, float)):
        value, unit = float(text), ""
    else:
        found = re.fullmatch(rf"\s*([0-9.]+(?:e[-+]?\d+)?)\s*{pattern}\s*", text)
        if found is None:
            raise _core.InvalidError(f"{name}: {text!r}: not understood, write it as {example}")
        value, unit = float(found[1]), found[2] or ""
    if not (math.isfinite(value) and value >= 0):
        raise _core.InvalidError(f"{name}: {text!r}: must be finite and not below 0")
    return value, unit


def bytes_in(text: float | str, name: str, per: str = "") -> float:
    pattern = rf"(?:([kMGT]i?)?B{per})?"
    value, unit = _number_in(text, name, pattern, f"2.2MB{per}, 100MiB{per} or as a number")
    return value * {**_UNITS, **_BINARY}[unit]


def seconds_in(text: float | str, name: str) -> float:
    value, unit = _number_in(text, name, r"(us|ms|s)?", "600ms, 1.5s or as a number")
    return value * {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}[unit]


def link_in(link: str | float) -> tuple[float, float]:
    """(bytes a second, latency)."""
    names = {name.lower(): found for name, found in LINKS.items()}
    if isinstance(link, str) and link.lower() in names:
        return names[link.lower()]
    try:
        rate = bytes_in(link, "link", "/s")
    except _core.InvalidError:
        rate = 0.0
    if rate <= 0:
        known = ", ".join(LINKS)
        raise _core.InvalidError(f"link: {link!r}: one of {known}, or bytes a second as 3GB/s")
    return rate, 30e-6


def shown_bytes(size: float) -> str:
    """Bytes to three figures with a unit."""
    if not math.isfinite(size):
        return "inf"
    for unit, factor in reversed(_UNITS.items()):
        if size >= factor or not unit:
            return f"{size / factor:.3g} {unit}B"
    raise AssertionError
