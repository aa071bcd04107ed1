"""The parts of `make gpu` that need torch; run.py runs each in a process of its own.

    python tests/gpu/parts.py PART DEVICES [--dry]

A part prints one JSON object a line and fails by raising.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import parastep

ROOT = pathlib.Path(__file__).resolve().parents[2]
DRY = "--dry" in sys.argv
HOME = "cpu" if DRY else "cuda:0"


def show(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def wait() -> None:
    if not DRY:
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


def timed(body: Callable[[], Any], repeats: int) -> float:
    """Seconds, the median, after one run that does not count."""
    body()
    seconds = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        body()
        wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def about(count: int) -> None:
    if DRY:
        show(torch=torch.__version__, device="cpu", dry=True)
        return
    for index in range(count):
        found = torch.cuda.get_device_properties(index)
        memory = round(found.total_memory / 2**30)
        show(device=f"cuda:{index}", name=found.name, GiB=memory, torch=torch.__version__)
    show(**parastep.build_info()["backends"])


# ---- exactness -----------------------------------------------------------------------------------


def places(ranks: int, count: int) -> list[str]:
    """One rank a device, round and round."""
    return ["cpu"] * ranks if DRY else [f"cuda:{rank % count}" for rank in range(ranks)]


def exact(count: int) -> None:
    """Tolerance 0 against the untouched pipeline, bit for bit, on one device and on all."""
    sys.path.insert(0, str(ROOT / "tests" / "hosts"))
    import tiny

    about(count)
    torch.use_deterministic_algorithms(True, warn_only=True)
    wrong = []
    for name in ("sd", "sdxl", "flux") if DRY else sorted(tiny.CASES):
        case = tiny.CASES[name]
        pipe = case.build().to(HOME)
        own = tiny.run(pipe, _moved(case.kwargs()))
        for where in {1, max(count, 1)}:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parallel = parastep.parallelize(pipe, places(4, where), tolerance=0)
                result = tiny.run(parallel, _moved(case.kwargs()))
                report = parallel.report
                parallel.close()
            same = torch.equal(own, result)
            lost = [line.text for line in report.failures]
            show(case=name, devices=where, same=same, lost=lost, fallback=report.fallback)
            if not same or lost:
                wrong.append(name)
    if wrong:
        raise SystemExit(f"not exact, or followers lost: {sorted(set(wrong))}")


def _moved(value: Any) -> Any:
    """A call's tensors on the device; generators stay on the CPU, which pipelines allow."""
    if isinstance(value, torch.Tensor):
        return value.to(HOME)
    if isinstance(value, dict):
        return {key: _moved(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item) for item in value)
    return value


# ---- rounds --------------------------------------------------------------------------------------


def rounds(count: int) -> None:
    """Wall time a round of `sample` with a denoiser that does nearly nothing."""
    steps = 40
    program = parastep.Program.euler(np.linspace(10.0, 0.0, steps + 1))
    for kind in (torch.float32, torch.float16):
        x = torch.randn(1, 4, 512, 256, device=HOME).to(kind) * 10
        for ranks in (1, 2, 4, 8):
            options: Any = {"ranks": ranks, "tolerance": 0.0, "max_stride": 1}

            def run(x: Any = x, options: Any = options) -> Any:
                return parastep.sample(program, lambda x, step, rank: x * 0.5, x, **options)

            _, report = run()
            seconds = timed(run, 5)
            show(
                dtype=str(kind),
                ranks=ranks,
                rounds=report.rounds,
                us_a_round=1e6 * seconds / report.rounds,
                failures=len(report.failures),
            )


# ---- several ranks on one device -----------------------------------------------------------------


def one_gpu(count: int) -> None:
    """A denoiser that leaves the device half idle: ranks on one device, and on all, against one."""
    import diffusers

    torch.manual_seed(0)
    size, width = (8, (32, 64)) if DRY else (32, (320, 640))
    unet = diffusers.UNet2DModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        block_out_channels=width,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    kind = torch.float32 if DRY else torch.float16
    unet = unet.to(HOME, kind).eval()
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    steps = 4 if DRY else 50

    def call(which: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return which(batch_size=1, num_inference_steps=steps, generator=generator,
                     output_type="np")  # fmt: skip

    alone = timed(lambda: call(pipe), 3)
    show(ranks=1, seconds=alone)
    for ranks in (2, 4):
        for where in sorted({1, max(count, 1)}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parallel = parastep.parallelize(pipe, places(ranks, where))
                seconds = timed(lambda parallel=parallel: call(parallel), 3)
            show(ranks=ranks, devices=where, rounds=parallel.report.rounds, seconds=seconds,
                 of_one=seconds / alone, failures=len(parallel.report.failures))  # fmt: skip
            parallel.close()


# ---- the paper's denoisers -----------------------------------------------------------------------


def _forward(name: str, make: Callable[[], Any], inputs: Callable[[Any], Any], latent: Any) -> None:
    """One forward with random weights at the published setting: time, memory, bytes a round.

    Dry: on the meta device, which computes shapes alone.
    """
    kind, where = torch.float16, "meta" if DRY else HOME
    with torch.device("meta"):
        model = make().to(kind).eval()
    if DRY:
        model = model.to(where)  # some parameters do not heed the device they are made on
    else:
        model = model.to_empty(device=where)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.02)
        for buffer in model.buffers():
            buffer.zero_()
        torch.cuda.reset_peak_memory_stats()
    given = inputs(lambda *shape: torch.randn(*shape, device=where, dtype=kind))
    with torch.inference_mode(), torch.device(where):
        seconds = _time_of(model, given)
    bytes_of = 2 * int(np.prod(latent))
    show(
        model=name,
        parameters=sum(p.numel() for p in model.parameters()),
        ms=seconds * 1e3,
        GiB=0.0 if DRY else torch.cuda.max_memory_allocated() / 2**30,
        latent_bytes=bytes_of,
        bytes_a_round_8_ranks=2 * 7 * bytes_of,
    )
    del model
    if not DRY:
        torch.cuda.empty_cache()


def _time_of(model: Any, given: dict[str, Any]) -> float:
    return timed(lambda: model(**given), 1 if DRY else 3)


def denoisers(count: int) -> None:
    """Stable Video Diffusion (25 frames of 576 x 1024), CogVideoX-2b (49 of 480 x 720), AudioLDM2
    (10 s), with classifier-free guidance in the batch, fp16.
    """
    import diffusers

    time_of = torch.tensor(500, device="meta" if DRY else HOME)
    failed = []

    def measure(name: str, *rest: Any) -> None:
        try:
            _forward(name, *rest)
        except Exception as error:  # one model that does not fit leaves the others
            failed.append(f"{name}: {type(error).__name__}: {error}")

    measure(
        "Stable Video Diffusion",
        diffusers.UNetSpatioTemporalConditionModel,
        lambda random: {
            "sample": random(2, 25, 8, 72, 128),
            "timestep": time_of,
            "encoder_hidden_states": random(2, 1, 1024),
            "added_time_ids": random(2, 3),
        },
        (1, 25, 4, 72, 128),
    )
    measure(
        "CogVideoX-2b",
        diffusers.CogVideoXTransformer3DModel,
        lambda random: {
            "hidden_states": random(2, 13, 16, 60, 90),
            "encoder_hidden_states": random(2, 226, 4096),
            "timestep": time_of.expand(2),
        },
        (1, 13, 16, 60, 90),
    )
    measure(
        "AudioLDM2 (its small UNet's shape)",
        lambda: diffusers.AudioLDM2UNet2DConditionModel(
            in_channels=8,
            out_channels=8,
            block_out_channels=(128, 256, 384, 640),
            attention_head_dim=32,
            cross_attention_dim=((None, 768, 1024),) * 4,
        ),
        lambda random: {
            "sample": random(2, 8, 250, 16),
            "timestep": time_of,
            "encoder_hidden_states": random(2, 8, 768),
            "encoder_hidden_states_1": random(2, 16, 1024),
        },
        (1, 8, 250, 16),
    )
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    {"exact": exact, "rounds": rounds, "one_gpu": one_gpu, "denoisers": denoisers}[sys.argv[1]](
        int(sys.argv[2])
    )
