"""The parts of `make gpu` with a process for each rank; run.py runs each in a process of its own.

    python tests/gpu/processes.py workers|group DEVICES [--dry]

Tolerance 0 against the untouched pipeline, bit for bit, twice; and what took the latents there.
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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(max(count, 2)), __file__, "member", str(count)]
    subprocess.run(command + (["--dry"] if DRY else []), check=True)


def member(count: int) -> None:
    """A rank of `group`."""
    home = "cpu" if DRY else f"cuda:{int(os.environ['LOCAL_RANK']) % count}"
    exactly(home, None, apart=count > 1)


def exactly(home: str, devices: list[str] | None, apart: bool, **options: Any) -> None:
    """`apart`: every rank has a device of its own, and NCCL is there."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import tiny

    torch.use_deterministic_algorithms(True, warn_only=True)
    case = tiny.CASES[CASE]
    pipe = case.build().to(home)
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
    {part.__name__: part for part in (workers, group, member)}[sys.argv[1]](int(sys.argv[2]))
