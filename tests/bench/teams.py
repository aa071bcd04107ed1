"""What a rank of several devices gains: wall time of whole calls, as ratios within one run.

Denoisers that only wait, 100 ms an item of their batch, in real pipelines' loops: Stable Diffusion
and Stable Video Diffusion evaluate guidance's two branches as one batch, Wan and Qwen-Image in two
calls. Each time with a parallel pipeline of its own, whose first call finds out what can be shared
at a step 0 that is evaluated whole, and makes the replicas; a later call knows. Of each the
quickest counts, as other work on the machine only ever lengthens a call.

    python tests/bench/teams.py
    python tests/bench/teams.py --pipelines sd wan --repeats 5
    python tests/bench/teams.py --launcher 4

With `--launcher` it is as many processes of torchrun that are compared, as pairs, against half of
them, each a rank.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from _table import arguments, show, verdict, write
from _waiting import ByItem, WaitingFrames, WaitingQwen, WaitingUNet, WaitingWan

import parastep
from parastep.diffusers.forwards import Inputs
from parastep.diffusers.remote.helping import RemoteHelper, by_socket, serve
from parastep.diffusers.teams.helpers import LocalHelper
from parastep.processes.streams import SocketStream

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))

import tiny

STEPS = 20
DENOISERS = {
    "sd": ("unet", WaitingUNet),
    "svd": ("unet", WaitingFrames),
    "wan": ("transformer", WaitingWan),
    "qwenimage": ("transformer", WaitingQwen),
}
TWO_CALLS = ("wan", "qwenimage")
HAND_OVER = 40e-6
HAND_OVER_TO_PROCESS = 300e-6


class Setup(NamedTuple):
    """Devices, one for each rank or a tuple of them, and a tolerance."""

    devices: tuple[Any, ...]
    tolerance: str


class Took(NamedTuple):
    """A call: seconds, those of them beside the run (replicas are made in a first call), rounds,
    what came out, the forwards of all ranks that were shared or whole, and the calls that were
    foretold wrongly.
    """

    seconds: float
    beside: float
    rounds: int
    latents: torch.Tensor
    shared: int
    whole: int
    missed: int


TEAM = ("cpu", "cpu")
ONE, PAIR = Setup(("cpu",), "balanced"), Setup((TEAM,), "balanced")
RANKS, PAIRS = Setup(("cpu",) * 2, "balanced"), Setup((TEAM,) * 2, "balanced")
UNTOUCHED, EXACT = Setup(("cpu",), "exact"), Setup((TEAM,), "exact")


class Comparison(NamedTuple):
    """`split` against `whole`: at least so many times sooner."""

    what: str
    whole: Setup
    split: Setup
    target: float


BOTH = (
    Comparison("a pair : one device", ONE, PAIR, 1.7),
    Comparison("two pairs : two ranks", RANKS, PAIRS, 1.6),
)
CALLS = (Comparison("exact, a pair : one device", UNTOUCHED, EXACT, 1.7),)


def waiting(name: str, wait: float) -> Any:
    """The tests' tiny pipeline, whose denoiser waits."""
    pipe = tiny.CASES[name].build()
    part, kind = DENOISERS[name]
    kind.wait = wait
    kind.__module__ = "diffusers"  # one of a user's own is looked at alone first, a step more
    getattr(pipe, part).__class__ = kind
    return pipe


def timed(pipe: Any, case: Any) -> Took:
    began = time.perf_counter()
    latents = tiny.run(pipe, case.kwargs(steps=STEPS))
    seconds = time.perf_counter() - began
    report = pipe.report
    counts = [sum(getattr(t, n) for t in report.teams) for n in ("shared", "whole", "missed")]
    if report.fallback is not None or report.failures:
        raise SystemExit(f"not a run to be measured: {report} {report.failures}")
    ran = max((record.end for record in report.timeline), default=seconds)
    return Took(seconds, seconds - ran, report.rounds, latents, *counts)


def measured(pipe: Any, case: Any, setups: list[Setup], repeats: int) -> dict[Setup, list[Took]]:
    """For each setup the quickest first call and the quickest later one."""
    found: dict[Setup, list[tuple[Took, Took]]] = {setup: [] for setup in setups}
    for _ in range(repeats):
        for setup in setups:  # in turns: a busy minute of the machine is everybody's
            made = parastep.parallelize(
                pipe, list(setup.devices), tolerance=setup.tolerance, mode="threads"
            )
            found[setup].append((timed(made, case), timed(made, case)))
            made.close()
    return {
        setup: [min(calls, key=lambda took: took.seconds) for calls in zip(*pairs)]
        for setup, pairs in found.items()
    }


def compare(name: str, wait: float, repeats: int) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    case, pipe = tiny.CASES[name], waiting(name, wait)
    comparisons = (*BOTH, *CALLS) if name in TWO_CALLS else BOTH
    sequential = tiny.run(pipe, case.kwargs(steps=STEPS))
    setups = [setup for each in comparisons for setup in (each.whole, each.split)]
    took = measured(pipe, case, setups, repeats)
    rows, figures = [], []
    for what, whole, split, target in comparisons:
        for calls, a, b in zip(("first", "later"), took[whole], took[split]):
            ratio, off = a.seconds / b.seconds, float((b.latents - a.latents).abs().max())
            equal = torch.equal(b.latents, sequential)
            rows.append([name, what, calls, f"{a.rounds}, {b.rounds}", f"{a.seconds:.2f}",
                         f"{b.seconds:.2f}", f"{b.beside:.2f}", f"{b.shared}, {b.whole}",
                         f"{off:.0e}", f"{ratio:.2f}", target,
                         verdict(ratio, target, least=True)])  # fmt: skip
            figures.append({"pipeline": name, "what": what, "calls": calls, "ratio": ratio,
                            "target": target, "rounds": [a.rounds, b.rounds],
                            "seconds": [a.seconds, b.seconds],
                            "beside": [a.beside, b.beside], "shared": b.shared,
                            "whole": b.whole, "missed": b.missed, "apart": off,
                            "sequential": equal})  # fmt: skip
    return rows, figures


class Bare(ByItem, torch.nn.Module):
    """Gives what it is given."""

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: Any = None) -> Any:
        return (hidden_states,)


def hand_over(batches: int = 20, calls: int = 500) -> float:
    """Seconds that a forward by a helper takes beyond one of the caller's own, 4 KB: the median
    call, of the quietest batch.
    """
    module = Bare()
    pipe = SimpleNamespace(components={"transformer": module}, transformer=module)
    home = torch.device("cpu")
    helper = LocalHelper(pipe, home, home, 1)
    inputs = Inputs((), {"hidden_states": torch.zeros(1, 4, 16, 16)})
    with torch.no_grad():
        apart = min(
            median(lambda: helper.start("transformer", inputs).result(), calls)
            - median(lambda: module(**inputs.kwargs), calls)
            for _ in range(batches)
        )
    helper.close(10.0)
    return apart


def hand_over_to_process(batches: int = 20, calls: int = 200) -> float:
    """The same of a helper process: other latents of 64 KB in each call, and the same words."""
    module, home = Bare(), torch.device("cpu")
    as_made = SimpleNamespace(restore=lambda: None)
    pipe = SimpleNamespace(transformer=module, as_made=as_made)
    ours, theirs = socket.socketpair()
    process = os.fork()
    if process == 0:
        ours.close()
        serve(SocketStream(theirs), pipe, home)
        os._exit(0)
    theirs.close()
    helper = RemoteHelper(by_socket(ours.detach(), 1), home, home, 1)
    latents, words = torch.randn(1, 4, 64, 64), torch.randn(2, 77, 768)

    def call() -> None:
        given = {"hidden_states": latents.clone(), "encoder_hidden_states": words}
        helper.start("transformer", Inputs((), given)).result()

    with torch.no_grad():
        own = median(lambda: module(latents.clone(), words), calls)
        apart = min(median(call, calls) - own for _ in range(batches))
    helper.close(10.0)
    os.waitpid(process, 0)
    return apart


def median(call: Any, calls: int) -> float:
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


# ---- under a launcher ----------------------------------------------------------------------------

LAUNCHED = (  # pipeline, tolerance, how many times sooner two pairs are than two ranks
    ("wan", "balanced", 1.5),
    ("wan", "exact", 1.5),
    ("sd", "balanced", 1.5),
)


def launched(processes: int, split: str, name: str, tolerance: str, options: Any) -> dict[str, Any]:
    """What process 0 tells of the quickest of some calls after the first one."""
    torchrun = "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"
    script = __file__, "--in-group", split, "--wait", str(options.wait), "--repeats"
    command = [sys.executable, *torchrun, *script, str(options.repeats), "--pipelines", name]
    done = subprocess.run(
        [*command, "--tolerance", tolerance],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_group(options: Any) -> None:
    """One process of torchrun's."""
    (name,) = options.pipelines
    case, pipe = tiny.CASES[name], waiting(name, options.wait)
    own = tiny.run(pipe, case.kwargs(steps=STEPS))
    split = int(options.in_group) if options.in_group.isdigit() else options.in_group
    together = parastep.parallelize(pipe, split=split, tolerance=options.tolerance)
    took = [timed(together, case) for _ in range(options.repeats + 1)]
    best = min(took[1:], key=lambda each: each.seconds)
    told = best._asdict() | {"latents": None, "equal": torch.equal(best.latents, own)}
    if torch.distributed.get_rank() == 0:
        sys.stdout.write(json.dumps(told) + "\n")


def compare_launched(options: Any) -> None:
    rows, figures = [], []
    for name, tolerance, target in LAUNCHED:
        half = options.launcher // 2
        two = launched(half, "none", name, tolerance, options)
        four = launched(2 * half, "2", name, tolerance, options)
        ratio = two["seconds"] / four["seconds"]
        words = "met" if ratio >= target else "MISSED"
        rows.append([name, tolerance, f"{two['rounds']}, {four['rounds']}",
                     f"{two['seconds']:.2f}", f"{four['seconds']:.2f}",
                     f"{four['shared']}, {four['whole']}", str(four["equal"]),
                     f"{ratio:.2f}", f"{target}", words])  # fmt: skip
        figures.append({"pipeline": name, "tolerance": tolerance, "two": two, "four": four})
    columns = ["pipeline", "tolerance", "rounds", "ranks s", "pairs s", "shared, whole"]
    columns += ["sequential's bits", "ratio", "target", ""]
    show(f"torchrun: {STEPS} steps, {options.wait * 1e3:.0f} ms an item", columns, rows)
    write(options.json, {"launched": figures})


def main() -> None:
    options = arguments(
        "teams",
        pipelines=list(DENOISERS),
        repeats=3,
        wait=0.1,
        launcher=0,
        in_group="",
        tolerance="balanced",
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.in_group:
        in_group(options)
        return
    if options.launcher:
        compare_launched(options)
        return
    process = hand_over_to_process()  # forks: before there are threads
    seconds = hand_over()
    print(f"hand-over to a helper thread: {seconds * 1e6:.0f} us: {verdict(seconds, HAND_OVER)}")
    words = verdict(process, HAND_OVER_TO_PROCESS)
    print(f"hand-over to a helper process, 64 KB: {process * 1e6:.0f} us: {words}")
    rows, figures = [], []
    for name in options.pipelines:
        own, told = compare(name, options.wait, options.repeats)
        rows, figures = [*rows, *own], [*figures, *told]
    columns = [
        "pipeline",
        "what",
        "calls",
        "rounds",
        "whole s",
        "split s",
        "beside s",
        "shared, whole",
    ]
    columns += ["apart", "ratio", "target", ""]
    show(f"teams: {STEPS} steps, {options.wait * 1e3:.0f} ms an item", columns, rows)
    unequal = [f for f in figures if f["rounds"][0] != f["rounds"][1]]
    print(f"rounds as unsplit: {'met' if not unequal else f'MISSED in {len(unequal)}'}")
    exact = [figure for figure in figures if figure["what"].startswith("exact")]
    bits = all(figure["sequential"] for figure in exact)
    print(f"exact has the untouched pipeline's bits: {'met' if bits else 'MISSED'}")
    write(
        options.json,
        {"teams": figures, "hand_over_us": seconds * 1e6, "to_process_us": process * 1e6},
    )


if __name__ == "__main__":
    main()
