"""What all benches share: a table on the terminal, JSON in a file, targets never hidden."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
from typing import Any


def arguments(name: str, **extra: Any) -> argparse.Namespace:
    """The options of a bench; `extra` are further ones with their defaults, lists take several."""
    parser = argparse.ArgumentParser(prog=f"tests/bench/{name}.py")
    parser.add_argument("--json", default=f"out/{name}.json", help="where the figures are written")
    for option, default in extra.items():
        kind = type(default[0] if isinstance(default, list) else default)
        several = "+" if isinstance(default, list) else None
        name = option.replace("_", "-")
        parser.add_argument(f"--{name}", type=kind, nargs=several, default=default)
    return parser.parse_args()


def show(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Prints rows under their columns, floats to three figures."""
    text = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(len(row[k]) for row in [columns, *text]) for k in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, ["-" * width for width in widths], *text]:
        print("  ".join(value.ljust(width) for value, width in zip(row, widths)).rstrip())


def verdict(measured: float, target: float, least: bool = False) -> str:
    """'met', or by how much it was missed; `least`: the measured figure should be the larger."""
    met = measured >= target if least else measured <= target
    return "met" if met else f"MISSED by {abs(measured - target) / target:.0%}"


def write(path: str, figures: dict[str, Any]) -> None:
    machine = {"cores": os.cpu_count(), "machine": platform.machine()}
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"machine": machine, **figures}, indent=1) + "\n")
    print(f"\nwritten: {target}")
