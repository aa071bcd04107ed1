"""Writes the table of docs/diffusers.md: what each pipeline class of the tests does in parallel.

    python tests/hosts/diffusers/table.py [CASE ...]

Every case of tests/support/tiny runs three times on 4 ranks rehearsed, which has to give the host's
bits, and three times as it comes. Without names the table in the page is written anew, else its
lines are printed.
"""

from __future__ import annotations

import pathlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

TREE = pathlib.Path(__file__).parents[3]
sys.path.insert(0, str(TREE / "tests" / "support"))

import tiny  # noqa: E402
import torch  # noqa: E402
from hosting import distance  # noqa: E402

import parastep  # noqa: E402

PAGE = TREE / "docs" / "diffusers.md"
BEGIN, END = "<!-- by tests/hosts/diffusers/table.py -->\n", "<!-- end -->\n"
HEAD = "| pipeline | case | rehearsed | rounds, balanced | distance |\n|---|---|---|---|---|\n"
RANKS, CALLS = 4, 3


def results(pipe: Any, case: tiny.Case, tolerance: str) -> tuple[list[torch.Tensor], Any]:
    """What three calls give, and the last one's report."""
    with parastep.parallelize(pipe, ["cpu"] * RANKS, tolerance=tolerance) as together:
        found = [tiny.run(together, case.kwargs()) for _ in range(CALLS)]
    return found, together.report


def line_of(name: str) -> str:
    case = tiny.case_of(name)
    pipe = case.build()
    alone = tiny.run(pipe, case.kwargs())
    rehearsed, report = results(pipe, case, "rehearse")
    same = all(torch.equal(result, alone) for result in rehearsed)
    bits = "the host's bits" if same else "**other bits**"
    if report.failures:
        bits += f", {len(report.failures)} ranks lost"
    near, report = results(pipe, case, "balanced")
    rounds = f"{report.rounds} of {report.steps}"
    if report.fallback is not None:
        rounds = f"serially: {report.fallback}"
    off = max(distance(result, alone) for result in near)
    return f"| {type(pipe).__name__} | {name} | {bits} | {rounds} | {off:.1g} |\n"


def lines() -> Iterator[str]:
    for name in sorted(tiny.CASES | tiny.MORE | tiny.SEVERAL):
        yield line_of(name)


def named(page: str) -> set[str]:
    """The cases that the page has a line for."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    return set(re.findall(r"^\| \w+ \| (\w+) \|", table, re.M))


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            print(line_of(name), end="", flush=True)
        return
    table = "".join(sorted(lines(), key=str.lower))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + HEAD + table + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
