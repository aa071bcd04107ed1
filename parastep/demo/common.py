"""What the trained models of the demos share: weights in a file, prompts of classes, guidance.

`image`, `video` and `sound` each describe one `Model`; its methods load a pipeline, give the
arguments of a call, and the same denoiser as a plain function. A file of weights holds the network
as one float16 vector, its parameters end to end, and beside it what was learned for the classes.
"""

from __future__ import annotations

import copy
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors import safe_open

Pair = tuple[torch.Tensor, torch.Tensor]


@functools.cache
def read(weights: pathlib.Path) -> dict[str, torch.Tensor]:
    """All tensors of the file, float32."""
    with safe_open(weights, framework="pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}


@dataclass(frozen=True, eq=False)
class Model:
    """A class-conditional diffusion model in a real pipeline without an autoencoder.

    `network()` is the untrained denoiser and `forward(network, x, t, *prompts)` a call of it;
    `pipeline(network, scheduler)` is the pipeline around it, `call` holds what every call of that
    is given, and `decode` makes of its latents what people look at, in -1 to 1. `prompts` maps each
    learned table, a row for each class and a last one for none, to the pipeline's argument for its
    rows and a row's shape. `schedulers` maps names to classes of diffusers with their own settings
    beside `schedule`; the first is the default.
    """

    weights: pathlib.Path
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    guidance: float
    network: Callable[[], Any]
    forward: Callable[..., torch.Tensor]
    pipeline: Callable[[Any, Any], Any]
    decode: Callable[[torch.Tensor], torch.Tensor]
    prompts: Mapping[str, tuple[str, tuple[int, ...]]]
    schedulers: Mapping[str, tuple[str, dict[str, Any]]]
    schedule: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)

    def make_scheduler(self, name: str | None = None) -> Any:
        """The scheduler of that name on the schedule of the training."""
        name = name or next(iter(self.schedulers))
        if name not in self.schedulers:
            raise ValueError(f"unknown scheduler {name!r}: one of {', '.join(self.schedulers)}")
        kind, extra = self.schedulers[name]
        return getattr(diffusers, kind)(**{**self.schedule, **extra})

    def load(
        self,
        device: str | torch.device = "cpu",
        scheduler: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """The pipeline with trained weights, ready to be called with `arguments(...)`."""
        network = self.network().requires_grad_(False).eval()
        torch.nn.utils.vector_to_parameters(read(self.weights)["network"], network.parameters())
        pipe = self.pipeline(network, self.make_scheduler(scheduler)).to(device)
        if dtype != torch.float32:  # which some classes warn of, whatever the present one is
            pipe.to(dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def rows(self, table: str, classes: Sequence[int]) -> Pair:
        """Rows of a learned table for each class, and as often its last one, float32 on the CPU."""
        if not all(0 <= k < len(self.classes) for k in classes):
            raise ValueError(f"classes are 0 to {len(self.classes) - 1}, not {list(classes)}")
        rows = read(self.weights)[table]
        return rows[list(classes)], rows[[-1] * len(classes)]

    def arguments(
        self, classes: Sequence[int], seed: int = 0, steps: int = 50, guidance: float | None = None
    ) -> dict[str, Any]:
        """Keyword arguments of one call of the pipeline: a sample for each entry of `classes`.

        The first item of what the call returns is the latents, (B, *shape).
        """
        given: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": self.guidance if guidance is None else guidance,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            **self.call,
        }
        for table, (name, _) in self.prompts.items():
            given[name], given[f"negative_{name}"] = self.rows(table, classes)
        return given

    def noise(self, count: int, seed: int = 0) -> torch.Tensor:
        """The latents (count, *shape) that a call with `arguments(..., seed)` starts from.

        Of unit variance: times the scheduler's `init_noise_sigma`, if it has one, it is x_0.
        """
        return torch.randn((count, *self.shape), generator=torch.Generator().manual_seed(seed))

    def denoiser(
        self,
        classes: Sequence[int],
        steps: int = 50,
        guidance: float | None = None,
        scheduler: str | None = None,
        pipe: Any = None,
    ) -> Callable[..., Any]:
        """The guided model as a plain function f(x, step) -> output, for use without a pipeline.

        x is (B, *shape) with B = len(classes), a tensor or an array, and the output is of the same
        kind; `step` is an index from 0 to steps - 1 of the scheduler's own grid. Several steps may
        be stacked in one batch: x (S B, *shape) with `step` a sequence of S indices. f keeps no
        state and may be called from several threads.
        """
        pipe = pipe if pipe is not None else self.load(scheduler=scheduler)
        network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        pairs = [self.rows(table, classes) for table in self.prompts]
        grid = self.make_scheduler(scheduler)
        grid.set_timesteps(steps)
        guidance = self.guidance if guidance is None else guidance
        return _guided(functools.partial(self.forward, network), network, pairs, grid, guidance)


def unet_pipeline(network: Any, scheduler: Any) -> Any:
    """A Stable Diffusion pipeline around a UNet2DConditionModel and nothing else."""
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def forward_unet(
    network: Any, x: torch.Tensor, times: torch.Tensor, prompts: torch.Tensor
) -> torch.Tensor:
    """A call of a UNet2DConditionModel."""
    return network(x, times, prompts, return_dict=False)[0]


class Conditioned(torch.nn.Module):
    """The denoiser of a model and the learned tables of its classes, as trained and stored."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network = model.network()
        for table, (_, shape) in model.prompts.items():
            rows = torch.randn(len(model.classes) + 1, *shape)
            self.register_parameter(table, torch.nn.Parameter(rows))


def _guided(
    forward: Callable[..., torch.Tensor],
    network: Any,
    pairs: Sequence[Pair],
    grid: Any,
    guidance: float,
) -> Callable[..., Any]:
    device, dtype = network.device, network.dtype
    pairs = [(own.to(device, dtype), none.to(device, dtype)) for own, none in pairs]
    times, items, one = grid.timesteps.to(device), len(pairs[0][0]), torch.ones(1)
    scales = torch.ones(len(times), device=device)
    if hasattr(grid, "scale_model_input"):
        scaled = [float(copy.deepcopy(grid).scale_model_input(one, t)) for t in grid.timesteps]
        scales = torch.tensor(scaled, device=device)

    def evaluate(x: Any, step: int | Sequence[int], rank: int = 0) -> Any:
        rows = [step] if isinstance(step, (int, np.integer)) else list(step)
        point = torch.as_tensor(x, device=device)
        if point.shape[0] != len(rows) * items:
            raise ValueError(f"{len(rows)} steps of {items} items, not {point.shape[0]}")
        each = torch.tensor(rows, device=device).repeat_interleave(items)
        scale = scales[each].to(point.dtype).view(-1, *[1] * (point.dim() - 1))
        prompts = [torch.cat([none] * len(rows) + [own] * len(rows)) for own, none in pairs]
        with torch.no_grad():
            both = torch.cat([point * scale] * 2).to(dtype)
            without, with_ = forward(both, times[each].repeat(2), *prompts).chunk(2)
            guided = (without + guidance * (with_ - without)).to(point.dtype)
        return guided.cpu().numpy() if isinstance(x, np.ndarray) else guided

    return evaluate
