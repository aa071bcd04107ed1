"""The parts of `make gpu` with a process for each rank; run.py runs each in a process of its own.

    python tests/gpu/processes.py workers|group|pairs DEVICES [--dry]

Tolerance 0 against the untouched pipeline, bit for bit, twice; and what took the latents there.
Pairs share out the forwards of a guided call, to rounding.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
import warnings
from typing import Any

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # not there by itself in a safe path

from parts import DRY, HOME, ROOT, places, show

import parastep

CASE = "sd"


def workers(count: int) -> None:
    """Followers in processes of ours: on one device through the host, on several by NCCL."""
    for where in sorted({1, max(count, 1)}):
        ranks = places(max(where, 2), where)
        exactly(HOME, ranks, apart=where > 1, mode="processes")


def group(count: int) -> None:
    """The same script on every rank, under torchrun: a rank a device, two on one."""
    launched("member", count)


def member(count: int) -> None:
    """A rank of `group`."""
    exactly(own_device(count), None, apart=count > 1)


def pairs(count: int) -> None:
    """A rank of two devices: a head and a worker of ours, and two processes of torchrun."""
    nearly(HOME, [tuple(places(2, max(count, 1)))], mode="processes")
    launched("half", count)


def half(count: int) -> None:
    """One of the two processes."""
    nearly(own_device(count), None, split=2)


def launched(part: str, count: int) -> None:
    """On every rank, under torchrun; names of machines need not resolve here."""
    lo = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    ranks = 2 if part == "half" else max(count, 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    command += [__file__, part, str(count), *(["--dry"] if DRY else [])]
    subprocess.run(command, check=True, env={**lo, **os.environ})


def own_device(count: int) -> str:
    return "cpu" if DRY else f"cuda:{int(os.environ['LOCAL_RANK']) % count}"


def nearly(home: str, devices: Any, **options: Any) -> None:
    """Forwards that are shared out give the untouched pipeline's result, to rounding."""
    tiny, case, pipe = made(home)
    own = tiny.run(pipe, moved(case.kwargs(), home)).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with parastep.parallelize(pipe, devices, max_stride=1, **options) as parallel:
            result = tiny.run(parallel, moved(case.kwargs(), home)).float()
        report = parallel.report
    away = float((result - own).norm() / own.norm())
    shared = sum(team.shared for team in report.teams)
    lost = [line.text for line in report.failures]
    show(case=CASE, home=home, away=away, shared=shared, lost=lost, fallback=report.fallback,
         teams=[f"{' + '.join(team.devices)}: {team.split or team.unsplit}"
                for team in report.teams])  # fmt: skip
    if not away < 1e-2 or lost or report.fallback is not None or shared == 0:
        raise SystemExit("forwards were not shared out, or not rightly")


def made(home: str) -> Any:
    """(the tiny pipelines, the case, its pipeline)"""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import tiny

    torch.use_deterministic_algorithms(True, warn_only=True)
    case = tiny.CASES[CASE]
    return tiny, case, case.build().to(home)


def exactly(home: str, devices: list[str] | None, apart: bool, **options: Any) -> None:
    """`apart`: every rank has a device of its own, and NCCL is there."""
    tiny, case, pipe = made(home)
    own = tiny.run(pipe, moved(case.kwargs(), home))
    same, seconds = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel = parastep.parallelize(pipe, devices, tolerance="rehearse", **options)
        for _ in range(2):
            began = time.perf_counter()
            same.append(torch.equal(own, tiny.run(parallel, moved(case.kwargs(), home))))
            seconds.append(time.perf_counter() - began)
        report = parallel.report
        parallel.close()
    lost = [line.text for line in report.failures]
    show(case=CASE, home=home, same=same, transports=report.transports, lost=lost,
         fallback=report.fallback, first_s=seconds[0], second_s=seconds[1])  # fmt: skip
    if not all(same) or lost or report.fallback is not None:
        raise SystemExit("not exact, or followers lost")
    if apart and "nccl" not in report.transports:
        raise SystemExit("every rank has a device of its own, and NCCL was not used")


def moved(value: Any, home: str) -> Any:
    """A call's tensors on the device; generators stay on the CPU, which pipelines allow."""
    if isinstance(value, torch.Tensor):
        return value.to(home)
    if isinstance(value, dict):
        return {key: moved(item, home) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, home) for item in value)
    return value


if __name__ == "__main__":
    parts = {part.__name__: part for part in (workers, group, member, pairs, half)}
    parts[sys.argv[1]](int(sys.argv[2]))
