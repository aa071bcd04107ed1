"""What every process of a group runs in test_group_teams.py: teams of it, one scene after another.

A scene is "call", or a fault, the process that has it and at which of its forwards: "raise:3:2".
Each process prints a line of JSON for each scene. A split "2,1" is one that processes disagree on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import faults
import tiny
import torch
from group_script import join_by_file, rank, tell
from hosting import set_options

import parastep

STEPS = 6
PARTS = {
    "wan": lambda pipe: (pipe.transformer.blocks[0], "ffn"),
    "sd": lambda pipe: (pipe.unet.mid_block.resnets, "0"),
}


def main(folder: Path, name: str, split: str, tolerance: str, scenes: list[str]) -> None:
    torch.set_num_threads(1)
    if "RENDEZVOUS" in os.environ:
        join_by_file(os.environ["RENDEZVOUS"], int(os.environ["SIZE"]))
    case = tiny.CASES[name]
    pipe = case.build()
    alone = tiny.run(pipe, case.kwargs(steps=STEPS))
    holder, attribute = PARTS[name](pipe)
    setattr(holder, attribute, faults.Faulty(getattr(holder, attribute), folder))
    split = split.split(",")[-1 if rank() else 0]
    try:
        pipe = parastep.parallelize(
            pipe,
            split=int(split) if split.isdigit() else split,
            tolerance=tolerance if tolerance.isalpha() else float(tolerance),
            max_stride=1,
        )
    except parastep.Error as error:
        sys.stdout.write(f"{error}\n")
        return
    for scene in scenes:
        fault, _, at = scene.partition(":")
        kwargs = {}
        if at and rank() == 0:
            who, call = at.split(":")
            faults.order(folder, fault, int(call), int(who))
        if scene == "unguided":
            kwargs["guidance_scale"] = 1.0
        if scene == "other_weights" and rank() == 1:
            with torch.no_grad():
                next(pipe.pipe.transformer.parameters()).mul_(1.5)
        set_options(pipe, deadline=4.0 if fault in ("pause", "stop") else None)
        result, raised = None, None
        try:
            result = tiny.run(pipe, case.kwargs(steps=STEPS, **kwargs))
        except parastep.Error as error:
            raised = str(error)
        far = None if result is None else float((result - alone).norm() / alone.norm())
        same = result is not None and torch.equal(result, alone)
        teams = [team._asdict() for team in pipe.report.teams]
        tell(scene, pipe, equal=same, apart=far, raised=raised, teams=teams)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:5], sys.argv[5:])
