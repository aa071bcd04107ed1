"""What every rank of a group runs in test_group.py, which starts it: torchrun, mpirun, or
a process in a network of its own. Prints one line of JSON for each scene, of each rank.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import faults
import tiny
import torch
from hosting import set_options

import parastep

torch.set_num_threads(1)


def rank() -> int:
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
    return int(next(os.environ[name] for name in names if name in os.environ))


def tell(scene: str, pipe: Any, **facts: Any) -> None:
    report = pipe.report.to_dict()
    kept = {name: report[name] for name in ("evaluations", "failures", "fallback", "rounds")}
    # In one write: the ranks share a pipe, and print writes text and line end apart.
    sys.stdout.write(json.dumps({"scene": scene, "rank": rank(), **facts, **kept}) + "\n")
    sys.stdout.flush()


def join_by_file(path: str, size: int = 2) -> None:
    where = {"init_method": f"file://{path}", "rank": rank(), "world_size": size}
    torch.distributed.init_process_group("gloo", **where)


def main(folder: Path, scenes: list[str]) -> None:
    if "RENDEZVOUS" in os.environ:
        join_by_file(os.environ["RENDEZVOUS"])
    case = tiny.CASES["sd"]
    pipe = case.build()
    alone = tiny.run(pipe, case.kwargs(steps=6))
    part = pipe.unet.mid_block.resnets
    part[0] = faults.Faulty(part[0], folder)
    pipe = parastep.parallelize(pipe, tolerance="rehearse")
    for scene in scenes:
        kwargs = case.kwargs(steps=6)
        if scene == "others":  # the leader's arguments count
            kwargs["generator"].manual_seed(rank())
            if rank() == 0:
                kwargs = case.kwargs(steps=6)
        if scene == "error":
            kwargs["height"] = 33
        if scene in ("raise", "pause") and rank() == 0:
            faults.order(folder, scene, 3)
        if scene == "split":  # as diffusers' enable_parallelism leaves it
            pipe.unet._parallel_config = object()
        set_options(pipe, deadline=2.0 if scene == "pause" else None)
        try:
            result, raised = tiny.run(pipe, kwargs), None
        except (ValueError, parastep.Error) as error:
            result, raised = None, str(error)
        pipe.unet._parallel_config = None
        same = result is not None and torch.equal(result, alone)
        tell(scene, pipe, equal=same, raised=raised)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
