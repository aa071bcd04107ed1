"""The host's own samplers in the tests' process, with and without our patch. Imports the host."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import sys
from typing import Any

import torch
from comfy_server import HERE, PATH


def load_host() -> None:
    """Makes the checkout at COMFYUI_PATH importable, on the CPU."""
    assert PATH is not None
    if PATH in sys.path:
        return
    spec = importlib.util.spec_from_file_location(
        "stand_in_for_vision", HERE / "stand_in" / "sitecustomize.py"
    )
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    sys.path.insert(0, PATH)
    torch.set_num_threads(1)  # those of all lanes would wait for each other, and for the machine
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        importlib.import_module("comfy.options")
        given = importlib.import_module("comfy.cli_args").args
        given.cpu = given.use_pytorch_cross_attention = True
        importlib.import_module("comfy.sample")
    finally:
        sys.argv = arguments


def version() -> str:
    assert PATH is not None
    return (pathlib.Path(PATH) / "comfyui_version.py").read_text().split('"')[-2]


def sample(
    model: Any,
    kind: str,
    sampler: Any = "euler",
    scheduler: str = "normal",
    steps: int = 8,
    cfg: float = 3.0,
    batch: int = 1,
    seed: int = 5,
    **options: Any,
) -> torch.Tensor:
    """What a KSampler node with these inputs gives, without its previews."""
    import comfy.sample
    from tiny_pack import models

    shape = (batch, *models.KINDS[kind].latent)
    latent = options.pop("latent", None)
    latent = torch.zeros(shape) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    positive = options.pop("positive", None) or models.conditioning(kind, 1)
    negative = options.pop("negative", None) or models.conditioning(kind, 2)
    options = {"denoise": 1.0, "disable_pbar": True, "seed": seed, **options}
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, **options
        )


def build(kind: str = "sd15", **given: Any) -> Any:
    """A MODEL of the tests' loader."""
    from tiny_pack import models

    return models.build(kind, **given)


def check_parallel(report: Any) -> None:
    """Every rank was there, and evaluated ahead."""
    assert report.fallback is None and not report.failures, (report.fallback, report.failures)
    assert sum(report.evaluations[1:]) >= report.steps - 1
