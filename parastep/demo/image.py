"""A small trained image model in a real pipeline class, for demos, tests and the fidelity bench.

Class-conditional diffusion of handwritten digits in two colours, 32x32 RGB. It predicts the noise
of the usual 1000-step variance-preserving schedule and is sampled with classifier-free guidance.
There is no autoencoder: the pipeline's latents are the pixels, each 2x2 block of RGB folded into
12 channels, so a latent is (12, 16, 16) and `to_image` unfolds it. The weights beside this file
were made by `python -m parastep.demo.train_image`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from . import common

CHANNELS, SIZE = 12, 16  # a latent; a picture is 3 channels at twice the size
TOKENS, WIDTH = 4, 32  # the "prompt" of a class


def _network() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, 32, 32) of latents (B, 12, 16, 16)."""
    return torch.nn.functional.pixel_shuffle(latents, 2)


MODEL = common.Model(
    weights=pathlib.Path(__file__).with_name("image.safetensors"),
    classes=tuple("0123456789"),
    shape=(CHANNELS, SIZE, SIZE),
    guidance=3.0,
    network=_network,
    forward=common.forward_unet,
    pipeline=common.unet_pipeline,
    decode=decode,
    prompts={"prompts": ("prompt_embeds", (TOKENS, WIDTH))},
    schedulers={
        "ddim": ("DDIMScheduler", {"clip_sample": False}),
        "ddpm": ("DDPMScheduler", {"clip_sample": False}),
        "dpmpp2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        "unipc": ("UniPCMultistepScheduler", {}),
        "euler": ("EulerDiscreteScheduler", {}),
        "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    },
    schedule={
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "timestep_spacing": "trailing",
        "steps_offset": 1,
    },
    # Without an autoencoder the pipeline takes 8 pixels for a latent.
    call={"height": 8 * SIZE, "width": 8 * SIZE},
)


def to_image(latents: torch.Tensor | np.ndarray) -> np.ndarray:
    """Pictures (B, 32, 32, 3), uint8, of latents (B, 12, 16, 16) in -1 to 1."""
    pixels = decode(torch.as_tensor(latents).float().cpu())
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
