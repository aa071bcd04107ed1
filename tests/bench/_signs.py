"""The judge: a fourth trained model, which nothing is ever tuned on.

The three models of the demo were at hand when defaults were chosen; this one is of another kind,
and is there to be measured alone. Class-conditional flow matching with a shifted schedule, a Flux
transformer of 16 x 16 tokens in its own pipeline class: ten signs in two colours on a ground that
fades from one colour to another, 32 x 32 pixels. A latent is what FluxPipeline gives for
`output_type="latent"`, 2 x 2 pixels a token, (256, 12), in -1 to 1. The weights beside this file
were made by `python tests/bench/train_signs.py`, in 3000 steps and 2000 more from there, and draw
rough shapes.
"""

from __future__ import annotations

import pathlib
from typing import Any

import diffusers
import torch

from parastep.demo import common

SIDE = 16  # tokens
WORDS, WIDTH = 4, 32  # the "prompt" of a class; its pooled vector is as wide
SHIFT = 3.0  # as Flux and Stable Diffusion 3 are sampled
CLASSES = ("disc", "ring", "square", "diamond", "triangle")
CLASSES += ("cross", "star", "crescent", "heart", "arrow")


def _network() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=12,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def _pipeline(network: Any, scheduler: Any) -> Any:
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    nothing = dict.fromkeys(names)
    return diffusers.FluxPipeline(transformer=network, scheduler=scheduler, **nothing)


def _places() -> torch.Tensor:
    """Where a token is, (256, 3): the first number is for models that edit pictures."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return torch.stack([torch.zeros(SIDE, SIDE), rows, columns], -1).reshape(-1, 3).float()


def _forward(
    network: Any, x: torch.Tensor, times: torch.Tensor, prompts: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    return network(
        hidden_states=x,
        timestep=(times / 1000).to(x.dtype),
        encoder_hidden_states=prompts,
        pooled_projections=pooled,
        img_ids=_places().to(x.device, x.dtype),
        txt_ids=torch.zeros(WORDS, 3, device=x.device, dtype=x.dtype),
        return_dict=False,
    )[0]


def encode(pictures: torch.Tensor) -> torch.Tensor:
    """Latents (B, 256, 12) of pictures (B, 3, 32, 32)."""
    return torch.nn.functional.pixel_unshuffle(pictures, 2).flatten(2).transpose(1, 2)


def decode(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode`."""
    grid = latents.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    return torch.nn.functional.pixel_shuffle(grid, 2)


MODEL = common.Model(
    weights=pathlib.Path(__file__).with_name("signs.safetensors"),
    classes=CLASSES,
    shape=(SIDE * SIDE, 12),
    guidance=3.0,
    network=_network,
    forward=_forward,
    pipeline=_pipeline,
    decode=decode,
    prompts={
        "prompts": ("prompt_embeds", (WORDS, WIDTH)),
        "pooled": ("pooled_prompt_embeds", (WIDTH,)),
    },
    schedulers={
        "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": SHIFT}),
        "heun": ("FlowMatchHeunDiscreteScheduler", {"shift": SHIFT}),
        "dpmpp2m": (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT},
        ),
        "unipc": (
            "UniPCMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT},
        ),
    },
    call={"height": 16 * SIDE, "width": 16 * SIDE},
)
