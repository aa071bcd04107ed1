"""`parastep COMMAND`, or `python -m parastep COMMAND`: check this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import __version__
from .check import check


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="parastep", description=__doc__)
    parser.add_argument("--version", action="version", version=f"parastep {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    help_ = "what was found here, and a self-test: paste it into a bug report"
    commands.add_parser("check", help=help_, description=help_)
    options = parser.parse_args(arguments)
    assert options.command == "check"
    return 0 if check(lambda line: print(line, flush=True)) else 1
