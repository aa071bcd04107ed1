"""ComfyUI's samplers on the trained demo model: rounds and distance, and what one rank costs.

    COMFYUI_PATH=... python tests/bench/comfyui.py [--seeds 2] [--steps 20 30 50] [--ranks 2 4 8]
        [--max-stride 1]

Distance is the relative L2 distance of the final latents to the untouched sampler's, guidance 3,
karras schedule. Runs in the host's own code in this process, on the CPU.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "hosts" / "comfy"))

SAMPLERS = ("euler", "dpmpp_2m", "dpmpp_2m_sde", "heun", "uni_pc", "euler_ancestral")


def compare(steps: int, ranks: int, seeds: int, tolerance: float, max_stride: int | None) -> None:
    import inprocess
    from tiny_pack import models

    from parastep.comfy import of_model, patch

    model = models.build("demo")
    for sampler in SAMPLERS:
        calls, rounds, distances = 0, [], []
        for seed in range(seeds):
            given = {
                "sampler": sampler,
                "scheduler": "karras",
                "steps": steps,
                "seed": seed,
                "positive": models.conditioning("demo", seed % 10),
                "negative": models.conditioning("demo", -1),
            }
            own = inprocess.sample(model, "demo", **given)
            ours = patch(model, ["cpu"] * ranks, tolerance=tolerance, max_stride=max_stride)
            found = inprocess.sample(ours, "demo", **given)
            report = of_model(ours).report
            calls = report.steps
            rounds.append(report.rounds)
            distances.append(float((found - own).norm() / own.norm()))
        mean = statistics.mean(distances)
        print(
            f"| {sampler} | {steps} | {ranks} | {calls} | {statistics.mean(rounds):.1f} "
            f"| {mean:.1e} |",
            flush=True,
        )


def cost_of_one_rank(repeats: int = 5) -> None:
    """Seconds with the node over seconds without, one rank, a denoiser that waits 20 ms."""
    import inprocess
    from tiny_pack import models

    from parastep.comfy import patch

    model = models.build("eps", slow_ms=20.0)
    with_node, ratios = patch(model, ["cpu"], max_stride=1), []
    for _ in range(repeats):
        seconds = []
        for each in (model, with_node):
            began = time.perf_counter()
            inprocess.sample(each, "eps", steps=20)
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[1] / seconds[0])
    print(f"one rank, 20 steps of 20 ms: {statistics.median(ratios):.4f} of the time without")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 30, 50])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--max-stride", type=int, help="1: every step is evaluated by some rank")
    given = parser.parse_args()

    import comfy_server
    import torch

    if comfy_server.PATH is None:
        print("left out: COMFYUI_PATH names no checkout of ComfyUI")
        return
    torch.set_num_threads(1)
    import inprocess

    from parastep import demo

    # Before there are stand-ins for missing packages, of which transformers would take notice.
    demo.load("image").load()
    inprocess.load_host()
    logging.disable(logging.INFO)
    print(f"ComfyUI {inprocess.version()}, tolerance {given.tolerance}")
    cost_of_one_rank()
    print(
        "| sampler | steps | ranks | model calls | rounds | distance |\n|---|---|---|---|---|---|"
    )
    for steps in given.steps:
        for ranks in given.ranks:
            compare(steps, ranks, given.seeds, given.tolerance, given.max_stride)


if __name__ == "__main__":
    main()
