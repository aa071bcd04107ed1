"""The parts of `make gpu` that need torch; run.py runs each in a process of its own.

    python tests/gpu/parts.py PART DEVICES [--dry]

A part prints one JSON object a line and fails by raising.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits on every stream

import numpy as np
import torch

import parastep
from parastep import _core
from parastep.sampling import serve
from parastep.stacking import Stacking
from parastep.threads import HostContext

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(pathlib.Path(__file__).parent))  # not there by itself in a safe path
DRY = "--dry" in sys.argv
HOME = "cpu" if DRY else "cuda:0"
if DRY:
    torch.set_num_threads(1)  # ranks are threads already


def show(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def wait() -> None:
    if not DRY:
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


def timed(body: Callable[[], Any], repeats: int) -> float:
    """Seconds, the median, after one run that does not count; dry: of one run alone."""
    seconds = []
    if not DRY:
        body()
    for _ in range(1 if DRY else repeats):
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


EXACT = ("sd", "flux", "sdxl", "svd", "cogvideox_ddim", "audioldm2", "wan")


def places(ranks: int, count: int) -> list[str]:
    """One rank a device, round and round."""
    return ["cpu"] * ranks if DRY else [f"cuda:{rank % count}" for rank in range(ranks)]


def exact(count: int) -> None:
    """Tolerance 0 against the untouched pipeline, bit for bit, on one device and on all."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import tiny

    about(count)
    torch.use_deterministic_algorithms(True, warn_only=True)
    wrong = []
    for name in EXACT:
        case = tiny.CASES[name]
        pipe, steps = case.build().to(HOME), 3 if DRY else None

        def kwargs(case: Any = case, steps: Any = steps) -> Any:
            return _moved(case.kwargs(steps=steps))

        own, again = tiny.run(pipe, kwargs()), tiny.run(pipe, kwargs())
        for where in sorted({1, max(count, 1)}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parallel = parastep.parallelize(pipe, places(4, where), tolerance="rehearse")
                result = tiny.run(parallel, kwargs())
                report = parallel.report
                parallel.close()
            same = torch.equal(own, result)
            lost = [line.text for line in report.failures]
            show(case=name, devices=where, same=same, host_repeats_itself=torch.equal(own, again),
                 lost=lost, fallback=report.fallback)  # fmt: skip
            if lost or (not same and torch.equal(own, again)):
                wrong.append(name)
    if not _replays_alone(tiny):
        wrong.append("a part that replays a CUDA graph")
    torch.use_deterministic_algorithms(False)
    if wrong:
        raise SystemExit(f"not exact, or followers lost: {sorted(set(wrong))}")


def _replays_alone(tiny: Any) -> bool:
    """A pipeline with a part that torch has captured runs serially, with its own result."""
    case, steps = tiny.CASES["sd"], 3 if DRY else None
    pipe = case.build().to(HOME)
    if DRY:
        import graphs

        graphs.replay(pipe.unet.conv_in)
    else:
        pipe.unet.requires_grad_(False)
        seen: list[Any] = []
        hook = pipe.unet.conv_in.register_forward_pre_hook(lambda part, given: seen.append(given))
        tiny.run(pipe, _moved(case.kwargs(steps=3)))
        hook.remove()
        sample = tuple(torch.randn_like(tensor) for tensor in seen[0])
        torch.cuda.make_graphed_callables(pipe.unet.conv_in, sample)
    own = tiny.run(pipe, _moved(case.kwargs(steps=steps)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with parastep.parallelize(pipe, places(4, 1)) as parallel:
            result = tiny.run(parallel, _moved(case.kwargs(steps=steps)))
        fallback = parallel.report.fallback
    same = torch.equal(own, result)
    show(case="sd, its first part as a CUDA graph", same=same, fallback=fallback)
    return same and "replays a CUDA graph" in (fallback or "")


def _moved(value: Any) -> Any:
    """A call's tensors on the device; generators stay on the CPU, which pipelines allow."""
    if isinstance(value, torch.Tensor):
        return value.to(HOME)
    if isinstance(value, dict):
        return {key: _moved(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item) for item in value)
    return value


# ---- what the host does around its own forward ---------------------------------------------------


class Replayed:
    """In place of a graph where there is none: what was captured is done again, in its memory."""

    def __init__(self, net: Any, x: torch.Tensor, m: torch.Tensor) -> None:
        self.net, self.x, self.m = net, x, m

    def replay(self) -> None:
        self.m.copy_(self.net(self.x))


class Graphed:
    """A network whose forward was captured as a CUDA graph, with memory of its own."""

    def __init__(self, net: Any, like: torch.Tensor) -> None:
        self.x = like.clone()
        if DRY:
            self.m = net(self.x)
            self.graph: Any = Replayed(net, self.x, self.m)
        else:
            self._capture(net)

    def _capture(self, net: Any) -> None:
        here = torch.cuda.current_stream()
        aside = torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(3):
                net(self.x)
        here.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.m = net(self.x)
        # The next one would be captured with the same workspace, and they are replayed at once.
        torch._C._cuda_clearCublasWorkspaces()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.x.copy_(x)
        self.graph.replay()
        return self.m.clone()


def _greedy(net: Any) -> Callable[..., torch.Tensor]:
    """Takes and gives back memory of many sizes around every forward, and the cache now and then.

    What a run still reads would be overwritten if it were given back too early.
    """

    def denoiser(x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
        sizes = [1 << (10 + (step + k) % 6) for k in range(8)]
        junk = [torch.full((size,), math.nan, device=x.device, dtype=x.dtype) for size in sizes]
        m: torch.Tensor = net(x)
        del junk
        if step % 7 == 3 and not DRY:
            torch.cuda.empty_cache()
        return m

    return denoiser


def _refused_while_capturing(x: torch.Tensor) -> bool:
    """Whether a run says no where a graph is being captured; on a stream it would be in it."""
    refused = False
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        try:
            _core.copy(x)
        except parastep.Error:
            refused = True
        x + 1  # a graph of nothing is a warning
    return refused


def _held(name: str, denoiser: Any, alone: Any, x: torch.Tensor, **extra: Any) -> list[str]:
    """Runs on 4 ranks of one device: the bits of one rank at tolerance 0, fewer rounds above."""
    steps = 24
    program = parastep.Program.euler(np.linspace(10.0, 0.0, steps + 1))
    own, _ = parastep.sample(program, alone, x, ranks=1, tolerance=0)
    result, exactly = parastep.sample(program, denoiser, x, ranks=4, tolerance="rehearse")
    _, loosely = parastep.sample(program, denoiser, x, ranks=4, tolerance=0.5)
    same = torch.equal(own, result)
    lost = [line.text for line in exactly.failures + loosely.failures]
    show(host=name, same=same, rounds=loosely.rounds, steps=steps, lost=lost, **extra)
    return [] if same and not lost and loosely.rounds < steps else [name]


@torch.no_grad()
def hosts(count: int) -> None:
    """Under torch's caching allocator, on a stream of the host's, with CUDA graphs that it captured
    around its own forward, and with a compiled denoiser.
    """
    torch.manual_seed(0)
    kind = torch.float32 if DRY else torch.float16
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.SiLU(), torch.nn.Linear(256, 64))
    net = net.to(HOME, kind).eval().requires_grad_(False)
    x = torch.randn(1, 4, 64, 64, device=HOME).to(kind) * 10

    def plain(x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
        m: torch.Tensor = net(x)
        return m

    failed = _held("caching allocator", _greedy(net), plain, x)
    with contextlib.nullcontext() if DRY else torch.cuda.stream(torch.cuda.Stream()):
        failed += _held("a stream of its own", plain, plain, x)
        halves = lambda x, step, rank: torch.cat((net(x), x), dim=1).chunk(2, dim=1)[0]  # noqa: E731
        failed += _held("an output that is not contiguous", halves, plain, x)
    graphs = [Graphed(net, x) for _ in range(4)]
    if DRY:
        failed += _held("CUDA graphs", lambda x, step, rank: graphs[rank](x), plain, x)
    else:
        refused = _refused_while_capturing(x)
        failed += _held("CUDA graphs", lambda x, step, rank: graphs[rank](x), plain, x,
                        refused_while_capturing=refused)  # fmt: skip
        failed += [] if refused else ["a capture that was not refused"]
    compiled = torch.compile(net, dynamic=False, backend="eager" if DRY else "inductor")

    def fast(x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
        m: torch.Tensor = compiled(x)
        return m

    fast(x, 0, 0)
    failed += _held("torch.compile", fast, fast, x)
    if failed:
        raise SystemExit(f"not as on its own: {failed}")


# ---- rounds --------------------------------------------------------------------------------------


def _ask_us(x: torch.Tensor) -> float:
    """Microseconds of an ask that is answered, from Python: drift, rebase and read-back, median."""
    steps, ranks = (20, 4) if DRY else (400, 8)
    program = parastep.Program.euler(np.linspace(10.0, 0.0, steps + 1))
    leader = _core.Leader(program, x, ranks=ranks, tolerance=math.inf, max_stride=1)
    lanes, times, half_of = HostContext(), [], Stacking(lambda x, step, rank: x * 0.5)
    for rank in range(1, ranks):
        body = partial(serve, leader.follower(rank), half_of)
        lanes.start(body, f"rank-{rank}", device=x.device)
    try:
        for step in range(steps):
            m = leader.output()
            wait()
            began = time.perf_counter()
            answered = leader.ask(step, x, m)
            times += [time.perf_counter() - began] if answered else []
            if not answered:
                leader.submit(x * 0.5)
    finally:
        leader.finish()
    return 1e6 * statistics.median(times)


def rounds(count: int) -> None:
    """Wall time a round of `sample` with a denoiser that does nearly nothing, and an ask's."""
    steps = 40
    program = parastep.Program.euler(np.linspace(10.0, 0.0, steps + 1))
    shape = (1, 4, 32, 32) if DRY else (1, 4, 512, 256)
    for kind in (torch.float32, torch.float16):
        x = torch.randn(shape, device=HOME).to(kind) * 10
        for ranks in (1, 2, 4, 8):
            options: Any = {"ranks": ranks, "tolerance": "rehearse", "max_stride": 1}

            def run(x: Any = x, options: Any = options) -> Any:
                return parastep.sample(program, lambda x, step, rank: x * 0.5, x, **options)

            _, report = run()
            seconds = timed(run, 5)
            show(
                dtype=str(kind),
                MB=x.nbytes / 2**20,
                ranks=ranks,
                rounds=report.rounds,
                us_a_round=1e6 * seconds / report.rounds,
                failures=len(report.failures),
            )
        show(dtype=str(kind), MB=x.nbytes / 2**20, us_an_ask_from_python=_ask_us(x))
    _engine(program)


def _engine(program: Any) -> None:
    """A denoiser that only waits, on the device itself: wall time over rounds times that."""
    x = torch.randn((1, 4, 32, 32), device=HOME)
    wait_ms = 2.0 if DRY else 20.0
    cycles = 0 if DRY else int(wait_ms * _cycles_a_ms())

    def waits(x: Any, step: int, rank: int) -> Any:
        time.sleep(wait_ms / 1e3) if DRY else torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        return x * 0.5

    for ranks in (1, 2, 4):
        options: Any = {"ranks": ranks, "tolerance": "rehearse", "max_stride": 1}

        def run(options: Any = options) -> Any:
            return parastep.sample(program, waits, x, **options)

        _, report = run()
        seconds = timed(run, 3)
        ideal = report.rounds * wait_ms / 1e3
        show(ranks=ranks, rounds=report.rounds, forward_ms=wait_ms,
             wall_over_rounds=seconds / ideal, failures=len(report.failures))  # fmt: skip


def _cycles_a_ms() -> float:
    torch.cuda._sleep(1000000)
    wait()
    began = time.perf_counter()
    torch.cuda._sleep(20000000)
    wait()
    return 20000000 / (1e3 * (time.perf_counter() - began))


# ---- fidelity in half precision ------------------------------------------------------------------


def _decibels(own: torch.Tensor, result: torch.Tensor) -> float:
    """PSNR of what people see, peak to peak 2."""
    squared = (result.double() - own.double()).pow(2).mean()
    return 10 * math.log10(4 / max(float(squared), 1e-30))


@torch.no_grad()
def half(count: int) -> None:
    """The demo's trained models in fp16 and bf16: rounds and PSNR to the sequential result of the
    same dtype at the default tolerance, beside what the dtype itself is away from fp32.
    """
    from parastep import demo

    seeds, steps = (1, 3) if DRY else (4, 50)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    for name in demo.NAMES:
        model = demo.load(name)
        program = parastep.trace(model.make_scheduler(), steps)
        single: dict[int, torch.Tensor] = {}
        for kind in kinds:
            pipe = model.load(HOME, dtype=kind)
            scale = getattr(pipe.scheduler, "init_noise_sigma", 1.0)  # flow schedulers have none
            found: dict[int, list[tuple[int, float]]] = {}
            floor = []
            for seed in range(400, 400 + seeds):
                x = (model.noise(1, seed) * scale).to(HOME, kind)
                f = model.denoiser([seed % 10], steps, pipe=pipe)
                own, _ = parastep.sample(program, f, x, ranks=1, tolerance=0)
                seen = model.decode(own.float().cpu())
                single.setdefault(seed, seen)
                floor.append(_decibels(single[seed], seen))
                for ranks in () if kind == kinds[0] else (4,) if DRY else (1, 2, 4, 8):
                    result, report = parastep.sample(program, f, x, ranks=ranks)
                    decibels = _decibels(seen, model.decode(result.float().cpu()))
                    found.setdefault(ranks, []).append((report.rounds, decibels))
            for ranks, runs in found.items():
                show(
                    model=name,
                    dtype=str(kind),
                    ranks=ranks,
                    steps=steps,
                    rounds=statistics.mean(count for count, _ in runs),
                    dB=-10 * math.log10(statistics.mean(10 ** (-dB / 10) for _, dB in runs)),
                    worst_dB=min(dB for _, dB in runs),
                    dtype_to_fp32_dB=min(floor),
                )


# ---- several ranks on one device -----------------------------------------------------------------


def _half_idle() -> Any:
    """A pipeline whose forward is too small for the device: one latent of 32 x 32."""
    import diffusers

    torch.manual_seed(0)
    size, width = (8, (32, 32)) if DRY else (32, (320, 640))
    unet = diffusers.UNet2DModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        block_out_channels=width,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet = unet.to(HOME, torch.float32 if DRY else torch.float16).eval()
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def one_gpu(count: int) -> None:
    """A denoiser that leaves the device half idle: ranks as threads and steps in one batch on one
    device, and ranks on all, against one alone.
    """
    pipe, steps = _half_idle(), 8 if DRY else 50

    def call(which: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return which(batch_size=1, num_inference_steps=steps, generator=generator,
                     output_type="np")  # fmt: skip

    alone = timed(lambda: call(pipe), 3)
    show(ranks=1, seconds=alone)
    for ranks in (2, 4, 8):
        ways = [("auto", where) for where in sorted({1, max(count, 1)})] + [("batch", 1)]
        for slots, where in ways:
            row: dict[str, Any] = {"ranks": ranks, "devices": where, "slots": slots}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    parallel = parastep.parallelize(pipe, places(ranks, where), slots=slots)
                except parastep.UnsupportedError as error:
                    show(**row, not_there=str(error))
                    continue
                seconds = timed(lambda parallel=parallel: call(parallel), 3)
            report = parallel.report
            show(**row, rounds=report.rounds, seconds=seconds, of_one=seconds / alone,
                 forwards=report.forwards, unbatched=report.unbatched,
                 failures=[line.text for line in report.failures],
                 fallback=report.fallback)  # fmt: skip
            parallel.close()


# ---- memory --------------------------------------------------------------------------------------


def _reserved() -> float:
    """GiB that torch holds on all devices; dry: none."""
    counts = range(0 if DRY else torch.cuda.device_count())
    return sum(torch.cuda.memory_reserved(k) for k in counts) / 2**30


def memory(count: int) -> None:
    """What is held after the first, the second and the eighth call: it must not grow."""
    pipe, steps = _half_idle(), 16 if DRY else 20

    def call(which: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return which(batch_size=2, num_inference_steps=steps, generator=generator,
                     output_type="np")  # fmt: skip

    call(pipe)
    ways: dict[str, Any] = {
        "a lane": {"devices": [HOME]},
        "ranks in threads": {"devices": [HOME] * 2, "max_stride": 1},
        "a batch": {"devices": [HOME] * 2, "slots": "batch"},
    }
    if count > 1:
        ways["threads on all devices"] = {"devices": places(count, count), "mode": "threads"}
    for name, options in ways.items():
        held = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with parastep.parallelize(pipe, **options) as parallel:
                for number in range(1, 9):
                    call(parallel)
                    held += [_reserved()] if number in (1, 2, 8) else []
        growth = held[2] / held[1] if held[1] else 1.0
        show(ranks=name, reserved_GiB=held, after_calls=[1, 2, 8], growth=growth,
             fallback=parallel.report.fallback)  # fmt: skip


def end_to_end(count: int) -> None:
    """The three systems' own pipelines with denoisers of full size: see models.py."""
    import models

    models.measure(show, timed_call, HOME, DRY)


def timed_call(body: Callable[[], Any]) -> float:
    """Seconds of one call, with all that it has given to the devices."""
    wait()
    began = time.perf_counter()
    body()
    wait()
    return time.perf_counter() - began


# ---- the paper's denoisers -----------------------------------------------------------------------


def _forward(name: str, make: Callable[[], Any], inputs: Callable[[Any], Any], latent: Any,
             billions: float) -> None:  # fmt: skip
    """One forward with random weights at the published setting: time, memory, bytes a round.

    Dry: on the meta device, which computes shapes alone.
    """
    kind, where = torch.float16, "meta" if DRY else HOME
    with torch.device("meta"):
        model = make().to(kind).eval()
    parameters = sum(p.numel() for p in model.parameters())
    if abs(parameters / 1e9 - billions) > 0.01 * billions:
        raise AssertionError(f"{parameters} parameters, not the {billions} billion of the model")
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
        parameters=parameters,
        ms=seconds * 1e3,
        GiB=0.0 if DRY else torch.cuda.max_memory_allocated() / 2**30,
        latent_bytes=bytes_of,
        bytes_a_round_8_ranks=2 * 7 * bytes_of,
    )
    del model
    if not DRY:
        torch.cuda.empty_cache()


def _time_of(model: Any, given: dict[str, Any]) -> float:
    return timed(lambda: model(**given), 5)


def _audioldm2_large() -> Any:
    import diffusers

    return diffusers.AudioLDM2UNet2DConditionModel(
        in_channels=8,
        out_channels=8,
        block_out_channels=(128, 256, 384, 640),
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=((None, 768, 1024, None),) * 4,
        transformer_layers_per_block=2,
    )


def denoisers(count: int) -> None:
    """Stable Video Diffusion XT (25 frames of 576 x 1024), CogVideoX-2b (49 of 480 x 720),
    AudioLDM2-large (10 s), with classifier-free guidance in the batch, fp16.
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
        "AudioLDM2-large",
        _audioldm2_large,
        lambda random: {
            "sample": random(2, 8, 250, 16),
            "timestep": time_of,
            "encoder_hidden_states": random(2, 8, 768),
            "encoder_hidden_states_1": random(2, 16, 1024),
        },
        (1, 8, 250, 16),
        0.718,
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
        1.694,
    )
    measure(
        "Stable Video Diffusion XT",
        lambda: diffusers.UNetSpatioTemporalConditionModel(
            num_frames=25, num_attention_heads=(5, 10, 20, 20), sample_size=96
        ),
        lambda random: {
            "sample": random(2, 25, 8, 72, 128),
            "timestep": time_of,
            "encoder_hidden_states": random(2, 1, 1024),
            "added_time_ids": random(2, 3),
        },
        (1, 25, 4, 72, 128),
        1.525,
    )
    if failed:
        raise SystemExit("\n".join(failed))


PARTS = {"exact": exact, "hosts": hosts, "rounds": rounds, "one_gpu": one_gpu, "half": half,
         "denoisers": denoisers, "memory": memory, "end_to_end": end_to_end}  # fmt: skip

if __name__ == "__main__":
    PARTS[sys.argv[1]](int(sys.argv[2]))
