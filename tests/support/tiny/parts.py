"""What tiny pipelines are made of: inputs from names, networks, encoders, schedulers."""

from __future__ import annotations

import inspect
import json
import pathlib
import string
import tempfile
import zlib
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from .cases import Kwargs

WORDS = ("a red cat", "blue sea at night", "old town", "green hills", "rain", "two birds")

UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 32,
}
UNET_GAINS = {"conv_out": 2.0, "time_emb_proj": 6.0, "attn2.to_v": 8.0, "attn2.to_k": 3.0}
DIT_GAINS = {
    "norm1.linear": 3.0,
    "norm1_context.linear": 3.0,
    "adaln_single.linear": 3.0,
    ".norm.linear": 3.0,
    "text_proj": 3.0,
    "context_embedder": 3.0,
    "to_v": 2.0,
    "add_v_proj": 3.0,
    "attn2.to_v": 4.0,
}
UNET_UP = ("CrossAttnUpBlock2D", "UpBlock2D")
SD_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tensor(name: str, cond: int, *shape: int) -> torch.Tensor:
    """Return normal noise that depends on the name, the conditioning and the shape alone."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()) + 7919 * cond)
    return torch.randn(shape, generator=generator)


def picture(name: str, cond: int, *shape: int) -> torch.Tensor:
    """Return a smooth random picture with values in 0..1."""
    *lead, height, width = shape
    coarse = tensor(name, cond, *lead, 4, 4).reshape(-1, 1, 4, 4)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth.sigmoid().reshape(shape)


def words(batch: int, cond: int) -> list[str]:
    """Return one prompt an item of the batch."""
    return [WORDS[(cond + i) % len(WORDS)] for i in range(batch)]


def net(cls: type, *args: Any, gains: dict[str, float] | None = None, **config: Any) -> Any:
    """Return `cls(*args, **config)` in eval mode with weights that depend on nothing else.

    Weights that are all zero become random. `gains` then multiplies the weights whose name
    contains a key: plain random networks hardly listen to time and text. Gradients are on while it
    is made, as in `from_pretrained`: what layers compute then (weight_norm) cannot be deep-copied.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = cls(*args, **config).eval()
        with torch.no_grad():
            _enliven(module, gains or {})
    return module


def _enliven(module: Any, gains: dict[str, float]) -> None:
    for name, weight in module.named_parameters():
        if weight.ndim > 1 and not weight.any():
            weight.normal_(std=weight[0].numel() ** -0.5)
        for key, gain in gains.items():
            if key in name and weight.ndim > 1:
                weight.mul_(gain)


def clip_tokenizer() -> Any:
    """Return a CLIP tokenizer of single letters."""
    tokens = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return byte_pairs(transformers.CLIPTokenizer, tokens)


def byte_pairs(cls: type, tokens: list[str]) -> Any:
    """Return a byte-pair tokenizer without merges; transformers before 5 reads them from files."""
    vocab = {token: i for i, token in enumerate(tokens)}
    if "vocab" in inspect.signature(cls).parameters:
        return cls(vocab=vocab, merges=[], model_max_length=24)
    with tempfile.TemporaryDirectory() as folder:
        words, merges = pathlib.Path(folder, "vocab.json"), pathlib.Path(folder, "merges.txt")
        words.write_text(json.dumps(vocab))
        merges.write_text("#version: 0.2\n")
        return cls(str(words), str(merges), model_max_length=24)


def clip_text(tokenizer: Any, *, projection: bool = False) -> Any:
    """Return a CLIP text encoder of width 32 for the tokenizer above."""
    config = transformers.CLIPTextConfig(
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=tokenizer.model_max_length,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if projection:
        return net(transformers.CLIPTextModelWithProjection, config)
    return net(transformers.CLIPTextModel, config)


def clip_vision(cls: type = transformers.CLIPVisionModelWithProjection) -> Any:
    """Return a CLIP image encoder for 32x32 pictures, embedding width 32."""
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=32,
        patch_size=8,
        initializer_factor=10.0,
    )
    return net(cls, config)


def clip_processor() -> Any:
    """Return the image processor of the encoder above."""
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )


def image_vae(**config: Any) -> Any:
    """Return an image VAE with 4 latent channels that halves height and width."""
    return net(
        diffusers.AutoencoderKL,
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 32,
            **config,
        },
    )


def t5() -> Any:
    sizes = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_heads": 4, "num_layers": 1}
    return net(transformers.T5EncoderModel, transformers.T5Config(vocab_size=64, **sizes))


def ddim() -> Any:
    return diffusers.DDIMScheduler(
        **SD_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def text_args(name: str, batch: int, cond: int, *, mask: bool = False, length: int = 8) -> Kwargs:
    args: Kwargs = {}
    for side, number in (("", cond), ("negative_", 0)):
        args[f"{side}prompt_embeds"] = tensor(side + name, number, batch, length, 32)
        if mask:
            ones = torch.ones(batch, length, dtype=torch.long)
            args[f"{side}prompt_attention_mask"] = ones
    return args


def sd_unet(**config: Any) -> Any:
    """Return a Stable Diffusion UNet for 16x16 latents."""
    return net(
        diffusers.UNet2DConditionModel,
        gains=UNET_GAINS,
        **{
            **UNET,
            "sample_size": 16,
            "up_block_types": UNET_UP,
            "attention_head_dim": 8,
            **config,
        },
    )
