"""`parastep COMMAND`, or `python -m parastep COMMAND`: check this machine, plan a run."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__, _core
from .check import check
from .planning.plan import plan
from .planning.quantities import LINKS
from .report import Report
from .tolerance import read


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="parastep", description=__doc__)
    parser.add_argument("--version", action="version", version=f"parastep {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    help_ = "what was found here, and a self-test: paste it into a bug report"
    commands.add_parser("check", help=help_, description=help_)
    _add_plan(commands)
    options = parser.parse_args(arguments)
    if options.command == "plan":
        return _plan(options)
    return 0 if check(lambda line: print(line, flush=True)) else 1


def _add_plan(commands: Any) -> None:
    help_ = "rounds, wall time, memory and the link that is needed, predicted"
    command = commands.add_parser("plan", help=help_, description=help_)
    command.add_argument("--steps", type=int, default=50)
    command.add_argument("--latents", help="bytes of one latent, as 2.2MB")
    command.add_argument("--forward", help="time of one forward, guidance included, as 600ms")
    command.add_argument("--ranks", default="2,4,8", help="as 8,16,32")
    command.add_argument("--link", default="pcie", help=f"{', '.join(LINKS)}, or as 3GB/s")
    command.add_argument("--tolerance", type=read, default="balanced", help="a number, or a word")
    command.add_argument("--profile", nargs="+", help="JSON of report.to_dict() of runs")
    command.add_argument("--paper", type=int, metavar="W", help="the published rule, warm-up W")
    command.add_argument("--speeds", help="of each rank relative to the first, as 1,1,0.5")
    command.add_argument("--weights", default="0", help="bytes of the denoiser, as 10GB")
    command.add_argument("--overhead", help="of the host's loop, a step, as 1ms")
    command.add_argument("--split", type=int, default=1, help="devices of each rank, as 2")
    command.add_argument("--efficiency", type=float, default=0.9, help="of a split, up to 1")


def _plan(options: argparse.Namespace) -> int:
    try:
        given: dict[str, Any] = {
            name: getattr(options, name)
            for name in ("latents", "forward", "link", "tolerance", "weights", "overhead")
        }
        given |= {"split": options.split, "efficiency": options.efficiency}
        if options.paper is not None:
            given |= {"policy": "paper", "warmup": options.paper}
        if options.profile is not None:
            texts = [pathlib.Path(name).read_text() for name in options.profile]
            given["profile"] = [Report.from_dict(json.loads(text)) for text in texts]
        if options.speeds is not None:
            given["speeds"] = [float(speed) for speed in options.speeds.split(",")]
        ranks = [int(number) for number in options.ranks.split(",")]
        print(plan(options.steps, ranks=ranks, **given))
    except (_core.Error, OSError, ValueError) as error:
        print(f"parastep plan: {error}", file=sys.stderr)
        return 2
    if options.profile is None and options.paper is None:
        print("without --profile rounds are those of the demo's image model, a stand-in for yours")
    return 0
