"""`parastep check`: what this machine has, and a self-test of a few seconds.

The text is made to be pasted into a bug report: no paths, no names of users or machines.
"""

from __future__ import annotations

import ctypes.util
import getpass
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import _core
from .messages import describe
from .sampling import sample
from .tolerance import REHEARSE

HOSTS = ("diffusers", "transformers", "accelerate", "peft", "safetensors")
OTHERS = ("numpy", "mpi4py", "matplotlib", "tqdm", "nvidia-nccl-cu13", "nvidia-nccl-cu12")
_STEPS, _RANKS = 20, 4


def check(write: Callable[[str], Any] = print) -> bool:
    """Writes what was found and how the self-test went, line by line; returns whether it passed."""
    for name, value in found():
        write(f"{name:<13}{anonymous(value)}")
    passed = True
    for name, test in TESTS.items():
        began = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = test()
        except Skip as reason:
            write(f"{name:<13}skipped: {anonymous(str(reason))}")
            continue
        except Exception as error:
            passed, result = False, f"FAILED: {describe(error)}"
        write(f"{name:<13}{anonymous(result)}, {time.perf_counter() - began:.1f} s")
    write("self-test    " + ("passed" if passed else "FAILED"))
    return passed


def anonymous(text: str) -> str:
    """The text without directories and without the name of the user."""
    text = re.sub(r"(?:[A-Za-z]:)?(?:[/\\][^\s/\\'\":,;]+)+[/\\]", "", text)
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        return text
    return re.sub(rf"\b{re.escape(user)}\b", "user", text) if user != "root" else text


# ---- what was found ------------------------------------------------------------------------------


def found() -> Iterator[tuple[str, str]]:
    """(what, text) in the order of the output."""
    yield "parastep", _core.build_info()["version"]
    free = sysconfig.get_config_var("Py_GIL_DISABLED")
    threading_ = ", free-threaded" if free else ""
    implementation = platform.python_implementation()
    yield "python", f"{platform.python_version()} ({implementation}{threading_})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "platform", f"{platform.platform()}, {cores} cores"
    for name, value in _core.build_info().items():
        if name != "version":
            yield name, _listed(value)
    yield "torch", _torch()
    yield "devices", _devices()
    yield "hosts", _listed({name: version_of(name) for name in HOSTS} | {"ComfyUI": _comfyui()})
    yield "libraries", _listed({name: version_of(name) for name in OTHERS})
    yield "system", _listed({name: _system_library(name) for name in ("cuda", "cublas", "nccl")})


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_listed(v)}" for k, v in value.items() if v is not None) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_listed, value)) or "none"
    return str(value)


def version_of(name: str) -> str | None:
    """The version of an installed distribution, None where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _comfyui() -> str | None:
    """The version of a ComfyUI on the path, which is a checkout as a rule and no distribution.

    `comfy` takes seconds to import: it is only looked for.
    """
    if importlib.util.find_spec("comfy") is None:
        return None
    told = getattr(_import("comfyui_version"), "__version__", None)
    return told or version_of("ComfyUI") or "of an unknown version"


def _system_library(name: str) -> str:
    """Where the loader finds a library of the system; those beside torch are not among them."""
    return ctypes.util.find_library(name) or "not found"


def _torch() -> str:
    torch = _import("torch")
    if torch is None:
        return "not installed"
    parts = [torch.__version__]
    if torch.version.cuda:
        parts.append(f"CUDA {torch.version.cuda}")
    if torch.version.cuda and torch.cuda.is_available():
        parts.append("NCCL " + ".".join(map(str, torch.cuda.nccl.version())))
    return ", ".join(parts)


def _devices() -> str:
    names, torch = ["cpu"], _import("torch")
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            memory = about.total_memory / 2**30
            names.append(f"cuda:{index} {about.name} ({memory:.0f} GiB)")
    return ", ".join(names)


def _import(name: str) -> Any:
    """The module, or None: an installation that is broken is named by its own test."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


# ---- self-test -----------------------------------------------------------------------------------


class Skip(Exception):
    """This machine lacks what a test needs."""


def _must(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def _problem() -> tuple[_core.Program, np.ndarray]:
    """DDIM on a cosine schedule, and a latent of two items."""
    angle = np.linspace(1.5, 0.02, _STEPS + 1)
    x = np.random.default_rng(0).standard_normal((2, 4, 16, 16)).astype(np.float32)
    return _core.Program.ddim(np.cos(angle), np.sin(angle)), x


def _noise_in(x: Any, step: int, rank: int) -> Any:
    """The noise of data of unit variance around a constant: a denoiser in closed form, not linear
    in x as that would be guessed without error.
    """
    return (x - 0.3) * (1.0 + 0.1 * step / _STEPS) - 0.05 * x * x * x / (1.0 + x * x)


def _exact() -> str:
    program, x = _problem()
    alone, _ = sample(program, _noise_in, x, ranks=1, tolerance=0)
    together, report = sample(program, _noise_in, x, ranks=_RANKS, tolerance=REHEARSE)
    _must(bool(np.isfinite(alone).all()), "the sequential result is not finite")
    _must(np.array_equal(alone, together), "rounds differ though no answer was used")
    _must(report.rounds == _STEPS and not report.failures, f"{report}")
    return f"ok, rounds on {_RANKS} ranks without an answer used have the sequential bits"


def _rounds() -> str:
    """Every full round waits until all its ranks are in the denoiser at once."""
    program, x = _problem()
    meeting = threading.Barrier(_RANKS)

    def denoiser(x: Any, step: int, rank: int) -> Any:
        if step == 0 or step < 1 + (_STEPS - 1) // _RANKS * _RANKS:
            meeting.wait(timeout=20.0)
        return _noise_in(x, step, rank)

    _, report = sample(program, denoiser, x, ranks=_RANKS, tolerance=math.inf, max_stride=1)
    _must(not report.failures, f"{report.failures}")
    _must(report.rounds == 1 + math.ceil((_STEPS - 1) / _RANKS), f"{report}")
    return f"ok, {report.steps} steps in {report.rounds} rounds of {_RANKS} ranks at the same time"


def _tolerance() -> str:
    program, x = _problem()
    alone, _ = sample(program, _noise_in, x, ranks=1, tolerance=0)
    near, report = sample(program, _noise_in, x, ranks=_RANKS)
    distance = float(np.linalg.norm(near - alone) / np.linalg.norm(alone))
    _must(distance < 0.05, f"the default tolerance is {distance:.2g} away")
    _must(report.rounds < _STEPS, f"nothing was accepted: {report}")
    return f"ok, {report.rounds} rounds, relative distance {distance:.1g}"


def _lost() -> str:
    program, x = _problem()
    alone, _ = sample(program, _noise_in, x, ranks=1, tolerance=0)

    def denoiser(x: Any, step: int, rank: int) -> Any:
        if rank == 1 and step > _STEPS // 2:
            raise RuntimeError("a failure on purpose")
        return _noise_in(x, step, rank)

    together, report = sample(program, denoiser, x, ranks=_RANKS, tolerance=REHEARSE)
    _must([line.rank for line in report.failures] == [1], f"{report.failures}")
    _must(np.array_equal(alone, together), "the result differs once a rank is lost")
    return "ok, the result without rank 1 is the same"


def _tensors() -> str:
    torch = _import("torch")
    if torch is None:
        raise Skip("torch is not installed")
    program, x = _problem()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        y = torch.from_numpy(x).to(dtype)
        alone, _ = sample(program, _noise_in, y, ranks=1, tolerance=0)
        together, _ = sample(program, _noise_in, y, ranks=_RANKS, tolerance=REHEARSE)
        _must(together.dtype == dtype and torch.equal(alone, together), f"{dtype} differs")
    return "ok, torch tensors in float32, float16 and bfloat16"


def _pipeline() -> str:
    """A pipeline in a few lines: those of diffusers take longer to import than the test may."""
    for name in ("torch", "diffusers"):
        if version_of(name) is None:
            raise Skip(f"{name} is not installed")
    import torch
    from diffusers import DDIMScheduler

    from .diffusers.pipeline import parallelize

    class Denoiser(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x * (0.9 + 1e-4 * t) - 0.05 * torch.tanh(x)

    class Pipeline:
        def __init__(self) -> None:
            self.denoiser = Denoiser()
            self.scheduler = DDIMScheduler(clip_sample=False)

        @torch.no_grad()
        def __call__(self) -> torch.Tensor:
            x = torch.from_numpy(_problem()[1])
            self.scheduler.set_timesteps(_STEPS)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.denoiser(x, t), t, x).prev_sample
            return x

    pipe = Pipeline()
    alone = pipe()
    with parallelize(pipe, ["cpu"] * _RANKS, tolerance=REHEARSE) as parallel:
        together = parallel()
    report = parallel.report
    _must(report is not None and report.fallback is None and not report.failures, f"{report}")
    _must(torch.equal(alone, together), "the result differs from the untouched pipeline's")
    return f"ok, a pipeline on {_RANKS} ranks has the bits of the untouched one"


TESTS: dict[str, Callable[[], str]] = {
    "exact": _exact,
    "rounds": _rounds,
    "tolerance": _tolerance,
    "lost rank": _lost,
    "tensors": _tensors,
    "diffusers": _pipeline,
}
