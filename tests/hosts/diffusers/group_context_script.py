"""What every process of a group runs in test_group_context.py: denoisers split over groups of two
by diffusers' own context parallelism, steps across the groups, one scene after another.

A scene is a tolerance, "strided", or a fault, the process that has it and at which of its forwards:
"raise:3:2"; each process prints a line of JSON for it. Or it is alone, and refused: "cache",
another hook of diffusers, "teams", helpers besides, "late", parallelism after parallelize,
"callback", one that edits weights, "odd", a sequence that cannot be split.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import faults
import tiny
import torch
from diffusers import ContextParallelConfig
from group_script import join_by_file, rank, tell
from hosting import set_options

import parastep

STEPS = 20
# diffusers divides by the number of accelerators, of which a CPU has none.
torch.accelerator.device_count = lambda: 1


def break_in(pipe: Any, folder: Path) -> None:
    """Puts a part that fails on order into its denoiser."""
    blocks = getattr(pipe.transformer, "transformer_blocks", None) or pipe.transformer.blocks
    name = next(name for name in ("ff", "ffn", "img_mlp") if hasattr(blocks[0], name))
    setattr(blocks[0], name, faults.Faulty(getattr(blocks[0], name), folder))


def edit_weights(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Of the leader's process alone, as callbacks are."""
    if step == 3:
        with torch.no_grad():
            next(pipe.transformer.parameters()).mul_(1.5)
    return {}


def refused(pipe: Any, together: Any, case: Any, scene: str) -> None:
    """Prints why a use of it cannot be, and whether the next call is fine where it may be."""
    try:
        if scene == "cache":
            pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        if together is None:
            together = parastep.parallelize(pipe, split=2 if scene == "teams" else None)
        kwargs = {}
        if scene == "callback":
            kwargs["callback_on_step_end"] = edit_weights
        if scene == "odd":
            kwargs |= {"height": 20, "width": 20}
        tiny.run(together, case.kwargs(steps=STEPS, **kwargs))
    except (parastep.Error, AssertionError) as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\n")
    if scene == "odd":
        tiny.run(together, case.kwargs(steps=STEPS))
        sys.stdout.write(f"after it: {together.report.teams[0].split}\n")


class Twice(diffusers.FluxPipeline):
    """Two sampling loops in one call; none of diffusers' own can be split and has several."""

    def __call__(self, latents: Any = None, **given: Any) -> Any:
        first = super().__call__(**given).images
        return super().__call__(**given, latents=first + 0.1)


def main(folder: Path, name: str, size: int, scenes: list[str]) -> None:
    torch.set_num_threads(1)
    if "RENDEZVOUS" in os.environ:
        join_by_file(os.environ["RENDEZVOUS"], int(os.environ["SIZE"]))
    twice, name = name == "flux twice", name.removesuffix(" twice")
    case = tiny.CASES[name]
    pipe = case.build()
    if twice:
        pipe = Twice(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
    if scenes == ["late"]:
        together = parastep.parallelize(pipe, tolerance="rehearse")
    mesh = parastep.node_mesh(size)
    for part in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        if part is not None:
            config = ContextParallelConfig(ulysses_degree=size, mesh=mesh)
            part.enable_parallelism(config=config)
    if scenes[0] in ("late", "teams", "cache", "callback", "odd"):
        refused(pipe, together if scenes == ["late"] else None, case, scenes[0])
        return
    split = tiny.run(pipe, case.kwargs(steps=STEPS))  # as its user has it: all processes run it
    if any(":" in scene for scene in scenes):
        break_in(pipe, folder)
    together = parastep.parallelize(pipe, tolerance=0.0)
    for scene in scenes:
        fault = scene.partition(":")[0] if ":" in scene else None
        if fault and rank() == 0:
            who, call = map(int, scene.split(":")[1:])
            faults.order(folder, fault, call, who)
        word = "rehearse" if fault else scene
        options = {"deadline": 4.0 if fault in ("pause", "hang") else None}
        if word == "strided":
            word, options["max_stride"] = 0.02, None
        tolerance = word if isinstance(word, float) or word.isalpha() else float(word)
        options = {"max_stride": 1, "rehearsed": word == "rehearse", **options}
        set_options(together, tolerance=tolerance, **options)
        began = time.monotonic()
        result, raised = None, None
        try:
            result = tiny.run(together, case.kwargs(steps=STEPS))
        except parastep.Error as error:
            raised = str(error)
        far = None if result is None else float((result - split).norm() / split.norm())
        same = result is not None and torch.equal(result, split)
        seconds = time.monotonic() - began
        teams = [team._asdict() for team in together.report.teams]
        facts = {"equal": same, "apart": far, "raised": raised, "teams": teams}
        tell(scene, together, **facts, seconds=seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
