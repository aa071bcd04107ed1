"""A small trained image model in a real pipeline class, for demos, tests and the fidelity bench.

Class-conditional diffusion of handwritten digits in two colours, 32x32 RGB. It predicts the noise
of the usual 1000-step variance-preserving schedule and is sampled with classifier-free guidance.
There is no autoencoder: the pipeline's latents are the pixels, each 2x2 block of RGB folded into
12 channels, so a latent is (12, 16, 16) and `to_image` unfolds it. The weights beside this file
were made by `python -m parastep.demo.train_image`.
"""

from __future__ import annotations

import copy
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

WEIGHTS = pathlib.Path(__file__).with_name("image.safetensors")
CLASSES = tuple("0123456789")
CHANNELS, SIZE = 12, 16  # a latent; a picture is 3 channels at twice the size
TOKENS, TOKEN_WIDTH = 4, 32  # the "prompt" of a class

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpmpp2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
}


class Conditioned(torch.nn.Module):
    """The denoiser and the learned prompts of its classes, as they are trained and stored.

    `prompts` is (classes + 1, tokens, width); its last row is the empty prompt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unet = diffusers.UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TOKEN_WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        self.prompts = torch.nn.Parameter(torch.randn(len(CLASSES) + 1, TOKENS, TOKEN_WIDTH))


def make_scheduler(name: str = "ddim") -> Any:
    """The scheduler of that name (a key of `SCHEDULERS`) on the schedule of the training."""
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}: one of {', '.join(SCHEDULERS)}")
    kind, extra = SCHEDULERS[name]
    return getattr(diffusers, kind)(**SCHEDULE, **extra)


def load(
    device: str | torch.device = "cpu",
    scheduler: str = "ddim",
    dtype: torch.dtype = torch.float32,
    weights: str | pathlib.Path = WEIGHTS,
) -> diffusers.StableDiffusionPipeline:
    """The pipeline with trained weights, ready to be called with `arguments(...)`."""
    model = Conditioned()
    with safe_open(weights, framework="pt") as file:
        weights_of_unet = file.get_tensor("unet").float()  # end to end, in the order of parameters
    torch.nn.utils.vector_to_parameters(weights_of_unet, model.unet.parameters())
    pipe = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=model.unet.requires_grad_(False).eval().to(dtype=dtype),
        scheduler=make_scheduler(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _prompts(weights: str | pathlib.Path = WEIGHTS) -> torch.Tensor:
    with safe_open(weights, framework="pt") as file:
        return file.get_tensor("prompts").float()


def embed(
    classes: Sequence[int], weights: str | pathlib.Path = WEIGHTS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and negative prompt of each class, (B, tokens, width) each, float32 on the CPU."""
    if not all(0 <= k < len(CLASSES) for k in classes):
        raise ValueError(f"classes are 0 to {len(CLASSES) - 1}, not {list(classes)}")
    rows = _prompts(weights)
    return rows[list(classes)], rows[-1:].repeat(len(classes), 1, 1)


def arguments(
    classes: Sequence[int],
    seed: int = 0,
    steps: int = 50,
    guidance: float = 3.0,
    weights: str | pathlib.Path = WEIGHTS,
) -> dict[str, Any]:
    """Keyword arguments of one call of the pipeline: a picture for each entry of `classes`.

    The call's `.images` is the latents, (B, 12, 16, 16); `to_image` makes pictures of them.
    """
    prompt, negative = embed(classes, weights)
    return {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": torch.Generator().manual_seed(seed),
        "height": 8 * SIZE,  # without an autoencoder the pipeline takes 8 pixels for a latent
        "width": 8 * SIZE,
        "output_type": "latent",
    }


def noise(count: int, seed: int = 0) -> torch.Tensor:
    """The latents (count, 12, 16, 16) that a call with `arguments(..., seed)` starts from.

    Of unit variance: times the scheduler's `init_noise_sigma` it is x_0.
    """
    shape = (count, CHANNELS, SIZE, SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoiser(
    classes: Sequence[int],
    steps: int = 50,
    guidance: float = 3.0,
    scheduler: str = "ddim",
    pipe: diffusers.StableDiffusionPipeline | None = None,
    weights: str | pathlib.Path = WEIGHTS,
) -> Callable[..., Any]:
    """The guided model as a plain function f(x, step) -> noise, for use without a pipeline.

    x is (B, 12, 16, 16) with B = len(classes), a tensor or an array, and the noise is of the same
    kind; `step` is an index from 0 to steps - 1 of the scheduler's own grid. Several steps may be
    stacked in one batch: x (S B, 12, 16, 16) with `step` a sequence of S indices. f keeps no state
    and may be called from several threads.
    """
    pipe = pipe if pipe is not None else load(scheduler=scheduler, weights=weights)
    unet = pipe.unet
    grid_ = make_scheduler(scheduler)
    grid_.set_timesteps(steps)
    times = grid_.timesteps.to(unet.device)
    one = torch.ones(1)
    scales = [float(copy.deepcopy(grid_).scale_model_input(one, t)) for t in grid_.timesteps]
    prompt, negative = (e.to(unet.device, unet.dtype) for e in embed(classes, weights))

    def evaluate(x: Any, step: int | Sequence[int], rank: int = 0) -> Any:
        rows = [step] if isinstance(step, (int, np.integer)) else list(step)
        point = torch.as_tensor(x, device=unet.device)
        if point.shape[0] != len(rows) * len(prompt):
            raise ValueError(f"{len(rows)} steps of {len(prompt)} items, not {point.shape[0]}")
        each = torch.tensor(rows, device=unet.device).repeat_interleave(len(prompt))
        scale = torch.tensor(scales, device=unet.device)[each].to(point.dtype)[:, None, None, None]
        text = torch.cat([negative.repeat(len(rows), 1, 1), prompt.repeat(len(rows), 1, 1)])
        with torch.no_grad():
            both = torch.cat([point * scale] * 2).to(unet.dtype)
            without, with_ = unet(both, times[each].repeat(2), text, return_dict=False)[0].chunk(2)
            guided = (without + guidance * (with_ - without)).to(point.dtype)
        return guided.cpu().numpy() if isinstance(x, np.ndarray) else guided

    return evaluate


def to_image(latents: torch.Tensor | np.ndarray) -> np.ndarray:
    """Pictures (B, 32, 32, 3), uint8, of latents (B, 12, 16, 16) in -1 to 1."""
    pixels = torch.nn.functional.pixel_shuffle(torch.as_tensor(latents).float().cpu(), 2)
    pixels = (pixels.clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def from_image(pictures: np.ndarray) -> torch.Tensor:
    """Latents (B, 12, 16, 16), float32 in -1 to 1, of pictures (B, 32, 32, 3), uint8."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.nn.functional.pixel_unshuffle(pixels, 2)


def grid(
    images: np.ndarray, columns: int | None = None, scale: int = 3, gap: int = 4
) -> Image.Image:
    """One picture of all: (B, H, W, 3) uint8 in rows of `columns`, each enlarged `scale` times."""
    count, height, width = images.shape[:3]
    columns = columns or min(count, 10)
    rows = -(-count // columns)
    height, width = height * scale, width * scale
    sheet = Image.new(
        "RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (255, 255, 255)
    )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        tile = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(tile, (column * (width + gap), row * (height + gap)))
    return sheet
