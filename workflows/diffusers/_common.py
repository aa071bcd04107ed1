"""What the scripts beside this file share: their options, and a call in parallel that is timed."""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch

import parastep
from parastep.tolerance import read


def options(about: str, *, steps: int, warmup: int, out: str, **extra: str) -> argparse.Namespace:
    """Parses the command line; `extra` are options with their defaults, `warmup` the paper's."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--tiny", action="store_true", help="a dry run with tiny random weights")
    parser.add_argument("--devices", help="cuda:0,cuda:1,... (all of the pipe's kind; --tiny: CPU)")
    parser.add_argument("--steps", type=int, default=steps)
    about_tolerance = "a number, or a word: exact, high, balanced, fast"
    parser.add_argument("--tolerance", type=read, default="balanced", help=about_tolerance)
    parser.add_argument("--paper", action="store_true", help=f"the published rule, W = {warmup}")
    parser.add_argument("--compare", action="store_true", help="run sequentially too, and compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=out)
    for name, default in extra.items():
        parser.add_argument(f"--{name}", default=default)
    found = parser.parse_args()
    found.warmup = warmup
    return found


def device(given: argparse.Namespace) -> str:
    """Where the pipeline itself is to be: the leader's device."""
    if given.devices:
        return given.devices.split(",")[0]
    return "cuda" if torch.cuda.is_available() and not given.tiny else "cpu"


def run(pipe: Any, given: argparse.Namespace, arguments: Callable[[], dict[str, Any]]) -> Any:
    """The pipeline's output. `arguments()` makes those of one call, with a fresh generator."""
    devices = given.devices.split(",") if given.devices else None
    if devices is None and given.tiny:
        devices = ["cpu"] * 4
    rule = {"policy": "paper", "warmup": given.warmup} if given.paper else {}
    with parastep.parallelize(pipe, devices, tolerance=given.tolerance, **rule) as parallel:
        output = parallel(num_inference_steps=given.steps, **arguments())
    print(parallel.report)
    if given.compare:
        compare(pipe, given, arguments, output[0], parallel.report)
    return output


def compare(pipe: Any, given: Any, arguments: Any, parallel: Any, report: Any) -> None:
    """The same call without parastep: how long it takes, and how far the result is from it."""
    began = time.perf_counter()
    alone = pipe(num_inference_steps=given.steps, **arguments())[0]
    seconds = time.perf_counter() - began
    a, b = (torch.as_tensor(found).double() for found in (parallel, alone))
    distance = float((a - b).norm() / b.norm())
    print(f"sequential {seconds:.2f} s, parallel {report.seconds:.2f} s, distance {distance:.2g}")


def generator(given: argparse.Namespace) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(given.seed)


def write_frames(frames: Any, path: str, fps: int) -> None:
    """Frames (F, H, W, 3) from 0 to 1 as a GIF, or as a video by what diffusers finds for that."""
    from diffusers.utils import export_to_gif, export_to_video
    from PIL import Image

    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    if path.endswith(".gif"):
        pictures = [Image.fromarray((frame * 255).round().astype("uint8")) for frame in frames]
        export_to_gif(pictures, path, fps=fps)
    else:
        export_to_video(list(frames), path, fps=fps)
    print(f"written: {path}")
