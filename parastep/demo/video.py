"""A small trained video model in a real pipeline class, for demos, tests and the fidelity bench.

Class-conditional diffusion of clips in which a handwritten digit drifts across a coloured ground:
8 frames of 24x24. It predicts the velocity of a variance-preserving schedule that ends in pure
noise and is sampled with classifier-free guidance. A clip is one of finitely many: the class leaves
open which of eight hands wrote it, where it drifts, one of eight directions, and one of eight pairs
of colours. There is no trained autoencoder: `encode` stores colour at half the size and half the
rate, as video files do, and folds all frames and 2x2 blocks into 40 channels, so a latent is
(40, 12, 12). The weights beside this file were made by `python -m parastep.demo.train_video`.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch.nn import functional

from . import common

FRAMES, CHANNELS, SIZE = 8, 40, 12  # a clip is twice as high and wide as a latent
TOKENS, WIDTH = 4, 32  # the "prompt" of a class
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601
CHROMA = torch.tensor([1.772, 1.402])  # blue and red less luma, over these, are within -1 to 1


SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}


@functools.cache
def levels() -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (1000, 1, 1, 1) of the clean clip and of the noise at each time of the training."""
    kept = diffusers.DDIMScheduler(**SCHEDULE).alphas_cumprod.double()
    alpha, sigma = kept.sqrt().float(), (1 - kept).sqrt().float()
    return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


class VelocityUNet(diffusers.UNet2DConditionModel):
    """A UNet that finds the clean clip inside and gives the velocity alpha noise - sigma clean.

    Noise has as many directions as a latent has channels, nearly as many as the network is wide;
    clean clips have few, so that it learns them sooner.
    """

    def forward(
        self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **given: Any
    ) -> Any:
        clean = super().forward(
            sample, timestep, encoder_hidden_states, **{**given, "return_dict": False}
        )[0]
        times = torch.as_tensor(timestep, device=sample.device).long().reshape(-1)
        alpha, sigma = (scale.to(sample)[times] for scale in levels())
        velocity = (alpha * sample - clean) / sigma
        return (
            (velocity,) if not given.get("return_dict", True) else UNet2DConditionOutput(velocity)
        )


def _network() -> Any:
    return VelocityUNet(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(48, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """Latents (B, 40, 12, 12) of clips (B, 8, 3, 24, 24) of RGB from -1 to 1."""
    luma = torch.einsum("c,bfchw->bfhw", torch.tensor(LUMA), pixels)
    colour = (pixels[:, :, [2, 0]] - luma[:, :, None]) / CHROMA[:, None, None]
    slow = colour.unflatten(1, (-1, 2)).mean(2).flatten(1, 2)
    return torch.cat([functional.pixel_unshuffle(luma, 2), functional.avg_pool2d(slow, 2)], 1)


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Clips (B, 8, 3, 24, 24) of RGB, mostly from -1 to 1, of latents (B, 40, 12, 12)."""
    luma = functional.pixel_shuffle(latents[:, : 4 * FRAMES], 2)
    colour = latents[:, 4 * FRAMES :].unflatten(1, (-1, 2)).repeat_interleave(2, 1)
    colour = colour.repeat_interleave(2, -1).repeat_interleave(2, -2)
    blue, red = (colour * CHROMA[:, None, None] + luma[:, :, None]).unbind(2)
    green = (luma - LUMA[0] * red - LUMA[2] * blue) / LUMA[1]
    return torch.stack([red, green, blue], 2)


MODEL = common.Model(
    weights=pathlib.Path(__file__).with_name("video.safetensors"),
    classes=tuple("0123456789"),
    shape=(CHANNELS, SIZE, SIZE),
    guidance=4.0,
    network=_network,
    forward=common.forward_unet,
    pipeline=common.unet_pipeline,
    decode=decode,
    prompts={"prompts": ("prompt_embeds", (TOKENS, WIDTH))},
    schedulers={
        "ddim": ("DDIMScheduler", {"clip_sample": False}),
        "dpmpp2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        "unipc": ("UniPCMultistepScheduler", {}),
    },
    schedule=SCHEDULE,
    call={"height": 8 * SIZE, "width": 8 * SIZE},
)


def to_frames(latents: torch.Tensor | np.ndarray) -> np.ndarray:
    """Clips (B, 8, 24, 24, 3), uint8, of latents (B, 40, 12, 12)."""
    pixels = decode(torch.as_tensor(latents).float().cpu())
    pixels = (pixels.clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous().numpy()
