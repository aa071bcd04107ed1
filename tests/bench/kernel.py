"""How fast linear combinations run: against memcpy, and against a scheduler's own steps.

A round's guesses are one lincomb of K outputs from J inputs. Its bytes a second, read and written
ones together, stand beside those of a memcpy made right before it; its time beside seven calls of
`scheduler.step`, which is what rolling out seven guesses through the host would take. That roll-out
knows x and two outputs, hence the target at 3 inputs; 17 are those of a round on 8 ranks that
carries the last one's points and outputs, which no scheduler could do. Everything runs on one
thread and is timed in that thread's own CPU time.

    python tests/bench/kernel.py
"""

from __future__ import annotations

import ctypes
import pathlib
import statistics
import subprocess
import tempfile
import time
from typing import Any

import diffusers
import torch
from _table import arguments, show, verdict, write

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = ["tests/bench/kernel_c.c", "csrc/backend/cpu.c", "csrc/core/status.c"]

DTYPES = {"fp32": (1, 4), "fp16": (2, 2), "bf16": (3, 2)}  # value of ps_dtype, bytes
MEGABYTES = 64  # of inputs and outputs together, and of memcpy's source and destination
LATENT = (1, 4, 256, 256)  # 1 MB in fp32
GUESSES = 7  # of a round on 8 ranks
APART = 320  # bytes between vectors: without them, latents of 2^k bytes compete for the same sets
SCHEDULERS = {
    "UniPC": diffusers.UniPCMultistepScheduler,
    "DPM++ 2M": diffusers.DPMSolverMultistepScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "DDIM": diffusers.DDIMScheduler,
}


def build(folder: str, compiler: str) -> ctypes.CDLL:
    """The C side as a shared library, compiled with the flags of the package."""
    library = pathlib.Path(folder) / "kernel.so"
    flags = ["@compile_flags.txt", "-O3", "-fPIC", "-shared", "-o", str(library)]
    subprocess.run([compiler, *flags, *SOURCES], cwd=ROOT, check=True)
    return ctypes.CDLL(str(library))


def pairs(
    library: ctypes.CDLL, dtype: str, outs: int, terms: int, elements: int, gap: int, repeats: int
) -> list[tuple[float, float]]:
    """Seconds of a memcpy of MEGABYTES in all and of the lincomb after it, `repeats` times."""
    times = (ctypes.c_double * (2 * repeats))()
    copied = ctypes.c_size_t(MEGABYTES * 2**20 // 2)
    shape = (ctypes.c_size_t(elements), outs, terms, DTYPES[dtype][0], ctypes.c_size_t(gap))
    if library.bench_lincomb(*shape, copied, repeats, times):
        raise RuntimeError("the bench's lincomb failed")
    return list(zip(times[::2], times[1::2]))


def throughput(library: ctypes.CDLL, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for dtype, outs, target in [
        ("fp32", 1, 0.9),
        ("fp32", 7, 0.6),
        ("fp16", 7, None),
        ("bf16", 7, None),
    ]:
        terms = 8
        elements = MEGABYTES * 2**20 // DTYPES[dtype][1] // (outs + terms)
        moved = elements * DTYPES[dtype][1] * (outs + terms)
        measured = pairs(library, dtype, outs, terms, elements, APART, repeats)
        copies = [MEGABYTES * 2**20 / copy for copy, _ in measured]
        rates = [moved / combined for _, combined in measured]
        ratio = statistics.median(rate / copy for rate, copy in zip(rates, copies))
        rows.append(
            {
                "dtype": dtype,
                "outputs": outs,
                "inputs": terms,
                "memcpy_gb_s": statistics.median(copies) / 1e9,
                "lincomb_gb_s": statistics.median(rates) / 1e9,
                "ratio": ratio,
                "target": target,
                "verdict": verdict(ratio, target, least=True) if target else "",
            }
        )
    return rows


def latency(library: ctypes.CDLL, terms: int, gap: int, repeats: int) -> float:
    """Seconds of one round's guesses from latents that no cache holds."""
    elements = torch.Size(LATENT).numel()
    return statistics.median(
        combined for _, combined in pairs(library, "fp32", GUESSES, terms, elements, gap, repeats)
    )


def ask(library: ctypes.CDLL, gap: int, repeats: int) -> float:
    """Seconds of one ask: drift, rebase and what is kept, for latents in the cache."""
    times = (ctypes.c_double * repeats)()
    elements = ctypes.c_size_t(torch.Size(LATENT).numel())
    if library.bench_sweep(elements, DTYPES["fp32"][0], ctypes.c_size_t(gap), repeats, times):
        raise RuntimeError("the bench's sweep failed")
    return statistics.median(times)


def rollout(scheduler: Any, evict: torch.Tensor) -> float:
    """Seconds of GUESSES steps amid a trajectory, where multistep solvers have a past."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(50)
    x, *outputs = (torch.randn(LATENT, generator=generator) for _ in range(3))
    for i, timestep in enumerate(scheduler.timesteps[: 10 + GUESSES]):
        if i == 10:
            # As a model's forward does: no latent is in the cache, as none is for lincomb.
            evict.add_(1)
            began = time.thread_time()
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, timestep)
        x = scheduler.step(outputs[i % 2], timestep, x).prev_sample
    return time.thread_time() - began


def against_hosts(library: ctypes.CDLL, repeats: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    evict = torch.zeros(MEGABYTES * 2**20 // 4)
    rows = []
    for name, kind in SCHEDULERS.items():
        steps, ratios = [], {3: [], 17: []}
        for _ in range(repeats):
            steps.append(rollout(kind(), evict))
            for terms, measured in ratios.items():
                measured.append(steps[-1] / latency(library, terms, APART, 5))
        ratio = {terms: statistics.median(measured) for terms, measured in ratios.items()}
        target = 10.0 if name in ("UniPC", "DPM++ 2M") else None
        rows.append(
            {
                "scheduler": name,
                "seven_steps_us": statistics.median(steps) * 1e6,
                "ratio_3_inputs": ratio[3],
                "ratio_17_inputs": ratio[17],
                "target": target,
                "verdict": verdict(ratio[3], target, least=True) if target else "",
            }
        )
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> None:
    show(title, list(rows[0]), [["-" if v is None else v for v in row.values()] for row in rows])


def main() -> None:
    options = arguments("kernel", repeats=41, cc="cc")
    with tempfile.TemporaryDirectory() as folder:
        library = build(folder, options.cc)
        figures: dict[str, Any] = {
            "throughput": throughput(library, options.repeats),
            "round": [
                {
                    "outputs": GUESSES,
                    "inputs": terms,
                    "bytes_between": gap,
                    "us": latency(library, terms, gap, options.repeats) * 1e6,
                }
                for terms in (3, 17)
                for gap in (APART, 0)
            ],
            "ask_us": ask(library, APART, options.repeats) * 1e6,
            "schedulers": against_hosts(library, 15),
        }
    table(f"lincomb against memcpy, {MEGABYTES} MB in all", figures["throughput"])
    table("a round's guesses, 1 MB latents in fp32", figures["round"])
    print(f"\nan ask on 1 MB latents in fp32: {figures['ask_us']:.3g} us")
    table("the same through the host's scheduler, 7 steps", figures["schedulers"])
    write(options.json, figures)


if __name__ == "__main__":
    main()
