"""Faults drawn at random for the helpers of teams; `make chaos` runs it.

    python tests/hosts/diffusers/chaos_teams.py 500

A helper of the leader's or a follower's raises, is late, or gives NaN or rubbish, at a forward
drawn at random, in pipelines that cut a batch, make calls, or do both. The picture is the
one without a fault: to the bit where calls are shared, to rounding where a batch is cut. The call
after it is as if nothing had been, and no thread is left. One fault in twenty-five is a worker's,
which may also be killed, stop, or write past everybody; no process is left of those either.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
import faults
import tiny
import torch
from hosting import children, distance, set_options, threads

import parastep

STEPS, DEADLINE, HANGS = 5, 4.0, 900
NAMES = ("wan", "flux_cfg", "sd", "sd_controlnet", "z_image", "sd3_slg")
BITS = ("wan", "flux_cfg")
OF_WORKERS = ("raise", "nan", "infinity", "dtype", "exit", "kill", "stop", "rubbish", "babble")
SILENT = ("stop", "rubbish", "babble")  # known by their deadline, or by what they wrote


def raises(output: Any) -> Any:
    raise RuntimeError("it is broken")


def is_late(output: Any) -> Any:
    time.sleep(DEADLINE)
    return output


def changed(by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return lambda output: tuple(
        [by(t) for t in part] if isinstance(part, list) else by(part)
        for part in (output if isinstance(output, tuple) else tuple(output.values()))
        if isinstance(part, (torch.Tensor, list))
    )


FAULTS: dict[str, Callable[[Any], Any]] = {
    "raises": raises,
    "late": is_late,
    "nan": changed(lambda t: t * math.nan),
    "infinity": changed(lambda t: t + math.inf),
    "shape": changed(lambda t: t[..., :1]),
    "dtype": changed(lambda t: t.double()),
    "none": lambda output: None,
    "words": lambda output: "rubbish",
}


@contextlib.contextmanager
def broken(replica: Any, number: int, fault: Callable[[Any], Any]) -> Iterator[None]:
    """The number-th forward of its denoisers, from 0, goes through a fault."""
    calls, placed = [0], []

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            output = forward(*args, **kwargs)
            return fault(output) if calls[0] - 1 == number else output

        return faulty

    for module in tiny.denoisers(replica):
        vars(module)["forward"] = wrap(module.forward)
        placed.append(module)
    try:
        yield
    finally:
        for module in placed:
            del vars(module)["forward"]


def survive(together: Any, case: tiny.Case, wanted: torch.Tensor, bits: bool, draw: Any) -> str:
    what, count = draw.choice(list(FAULTS)), len(together._ranks.shares)
    place = 2 * draw.randrange(count) + 1
    number = draw.randrange(STEPS)
    set_options(together, deadline=DEADLINE if what == "late" else None)
    near = 0.0 if bits else 1e-4
    with broken(together._ranks._replicas[place], number, FAULTS[what]):
        found = tiny.run(together, case.kwargs(steps=STEPS))
    assert distance(found, wanted) <= near, (what, place, number, distance(found, wanted))
    lost = together.report.failures
    set_options(together, deadline=None)
    found = tiny.run(together, case.kwargs(steps=STEPS))
    assert distance(found, wanted) <= near and together.report.failures == []
    assert all(team.shared > 0 for team in together.report.teams), together.report
    return what if lost else "none in time"


def main(total: int) -> None:
    warnings.simplefilter("ignore")
    of_threads, of_workers = in_threads(total - total // 25), in_workers(total // 25)
    faulthandler.cancel_dump_traceback_later()
    for where, seen in ("threads", of_threads), ("workers", of_workers):
        listed = ", ".join(f"{what} {n}" for what, n in seen.items())
        print(f"{sum(seen.values())} faults of helpers that are {where}: {listed}")


def in_threads(total: int) -> Counter[str]:
    draw, seen = random.Random(11), Counter[str]()
    for number, name in enumerate(NAMES):
        case, pipe = tiny.CASES[name], tiny.CASES[name].build()
        wanted, bits = tiny.run(pipe, case.kwargs(steps=STEPS)), name in BITS
        tolerance = "rehearse" if bits else 1e-9  # every answer of a follower's is refused
        with parastep.parallelize(
            pipe, [("cpu", "cpu")] * 2, tolerance=tolerance, mode="threads", max_stride=1
        ) as together:
            for _ in range(2):
                tiny.run(together, case.kwargs(steps=STEPS))
            for _ in range(total * (number + 1) // len(NAMES) - total * number // len(NAMES)):
                faulthandler.dump_traceback_later(HANGS, exit=True)
                seen[survive(together, case, wanted, bits, draw)] += 1
        end = time.monotonic() + 20
        while threads():
            assert time.monotonic() < end, threads()
            time.sleep(0.05)
    return seen


# ---- workers -------------------------------------------------------------------------------------


def faulty(name: str, folder: Path) -> Any:
    """A pipe whose workers carry out the orders left in a folder, at a part that each forward of
    their denoiser calls once.
    """
    pipe = tiny.CASES[name].build()
    blocks = pipe.transformer.blocks if name == "wan" else pipe.unet.mid_block.resnets
    blocks[0] = faults.Faulty(blocks[0], folder)
    return pipe


def survive_worker(together: Any, name: str, folder: Path, wanted: torch.Tensor, draw: Any) -> str:
    what, number, who = (
        draw.choice(OF_WORKERS),
        draw.randrange(1, STEPS),
        draw.choice((None, "helper")),
    )
    near, case = 0.0 if name in BITS else 1e-4, tiny.CASES[name]
    set_options(together, deadline=DEADLINE if what in SILENT else None)
    faults.order(folder, what, number, who)
    found = tiny.run(together, case.kwargs(steps=STEPS))
    lost, taken = together.report.failures, faults.taken(folder)
    assert distance(found, wanted) <= near, (what, who, number, distance(found, wanted))
    assert taken or not lost, (what, who, number, lost)
    (folder / "order").unlink(missing_ok=True)
    set_options(together, deadline=None)
    found = tiny.run(together, case.kwargs(steps=STEPS))
    assert distance(found, wanted) <= near and together.report.failures == [], together.report
    assert all(team.shared > 0 for team in together.report.teams), together.report
    if not taken:
        return "none in time"
    return what if lost else f"{what} in a trial"  # which ends sharing in that call


def in_workers(total: int) -> Counter[str]:
    """Of a follower's head, its helper, and the leader's helper."""
    draw, seen = random.Random(12), Counter[str]()
    for number, name in enumerate(("wan", "sd")):
        with tempfile.TemporaryDirectory() as orders:
            folder, pipe, case = Path(orders), faulty(name, Path(orders)), tiny.CASES[name]
            wanted = tiny.run(pipe, case.kwargs(steps=STEPS))
            tolerance = "rehearse" if name in BITS else 1e-9
            with parastep.parallelize(
                pipe, [("cpu", "cpu")] * 2, tolerance=tolerance, mode="processes", max_stride=1
            ) as together:
                for _ in range(2):
                    tiny.run(together, case.kwargs(steps=STEPS))
                for _ in range(total * (number + 1) // 2 - total * number // 2):
                    faulthandler.dump_traceback_later(HANGS, exit=True)
                    seen[survive_worker(together, name, folder, wanted, draw)] += 1
        assert not children(), children()
    return seen


if __name__ == "__main__":
    main(int(sys.argv[1]))
