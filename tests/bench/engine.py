"""What the engine costs beside the model: wall time over the rounds' own waiting.

The denoiser only waits, so that ranks truly overlap on a machine with few cores. Beside each
figure, in turns within one run, stand the same sleeps behind a bare barrier of Python threads.

    python tests/bench/engine.py
    python tests/bench/engine.py --modes threads processes
"""

from __future__ import annotations

import math
import statistics
import threading
import time
import warnings
from typing import Any

import diffusers
import numpy as np
import torch
from _table import arguments, show, verdict, write
from _waiting import WAIT, Waiting

import parastep

STEPS = 50


def barrier(ranks: int, rounds: int) -> float:
    """Seconds that `ranks` threads need for `rounds` sleeps with a barrier after each."""
    gate = threading.Barrier(ranks)

    def body() -> None:
        for _ in range(rounds):
            time.sleep(WAIT)
            gate.wait()

    threads = [threading.Thread(target=body) for _ in range(ranks - 1)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    body()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def sampled(ranks: int) -> tuple[float, int]:
    """Seconds and rounds of `parastep.sample` with a denoiser that waits."""
    program = parastep.Program.flow_euler(np.linspace(1.0, 0.0, STEPS + 1))
    x = np.random.default_rng(0).standard_normal((1, 16, 32, 32)).astype(np.float32)

    def denoiser(point: Any, step: int, rank: int) -> Any:
        time.sleep(WAIT)
        return point

    began = time.perf_counter()
    _, report = parastep.sample(program, denoiser, x, ranks=ranks, tolerance=math.inf, max_stride=1)
    return time.perf_counter() - began, report.rounds


def waiting_pipeline() -> diffusers.StableDiffusion3Pipeline:
    transformer = Waiting(
        sample_size=32, patch_size=1, in_channels=16, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=16,
    )  # fmt: skip
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3")
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        tokenizer_3=None,
        **dict.fromkeys(names),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any) -> Any:
    return pipe(
        prompt_embeds=torch.zeros(1, 7, 32),
        pooled_prompt_embeds=torch.zeros(1, 64),
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        height=256,
        width=256,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )


def host_alone(pipe: Any) -> float:
    """Milliseconds of an iteration of the untouched pipeline beside its model."""
    began = time.perf_counter()
    call(pipe)
    seconds = time.perf_counter() - began
    return (seconds - barrier(1, STEPS)) / STEPS * 1e3


def piped(parallel: Any) -> tuple[float, int]:
    """Seconds and rounds of a call through `parallelize`."""
    began = time.perf_counter()
    call(parallel)
    return time.perf_counter() - began, parallel.report.rounds


def parallel_pipeline(pipe: Any, ranks: int, mode: str) -> Any:
    """After a first call, which makes the replicas and starts the workers."""
    made = parastep.parallelize(pipe, ["cpu"] * ranks, tolerance=math.inf, max_stride=1, mode=mode)
    call(made)
    return made


def measure(repeats: int, modes: list[str]) -> tuple[list[list[Any]], list[dict[str, Any]]]:
    pipe = waiting_pipeline()
    rows, figures = [], []
    goals = {("sample", p): 1.02 for p in (2, 4, 8)}
    for mode in modes:
        goals |= {(mode, 2): 1.05, (mode, 4): 1.05, (mode, 8): 1.10}
    for (kind, ranks), goal in goals.items():
        parallel = None if kind == "sample" else parallel_pipeline(pipe, ranks, kind)
        ratios, overheads, hosts = [], [], []
        for _ in range(repeats):
            seconds, rounds = sampled(ranks) if parallel is None else piped(parallel)
            bare = barrier(ranks, rounds)
            ratios.append(seconds / bare)
            overheads.append((seconds - bare) / rounds * 1e3)
            hosts.append(host_alone(pipe) * STEPS / rounds if parallel is not None else 0.0)
        if parallel is not None:
            parallel.close()
        ratio = statistics.median(ratios)
        overhead, host = statistics.median(overheads), statistics.median(hosts)
        times = [f"{overhead:.2f}", f"{host:.2f}"]
        kind = kind if parallel is None else f"parallelize, {kind}"
        rows.append([kind, ranks, rounds, f"{ratio:.3f}", *times, goal, verdict(ratio, goal)])
        figures.append({"through": kind, "ranks": ranks, "rounds": rounds, "ratio": ratio,
                        "overhead_ms": overhead, "host_ms": host, "target": goal})  # fmt: skip
    return rows, figures


def main() -> None:
    options = arguments("engine", repeats=5, modes=["threads"])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, figures = measure(options.repeats, options.modes)
    # The last but two: what the untouched pipeline's own iterations of a round take without us.
    columns = ["through", "ranks", "rounds", "wall / bare", "ms more a round", "host's own ms"]
    columns += ["target", ""]
    show(f"engine: {STEPS} steps, a denoiser that waits {WAIT * 1e3:.0f} ms", columns, rows)
    write(options.json, {"engine": figures})


if __name__ == "__main__":
    main()
