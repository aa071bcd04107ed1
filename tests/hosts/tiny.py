"""Real diffusers pipelines with tiny random weights, built without a network: hosts for the tests.

Every entry of `CASES` builds one pipeline class from its own components, with weights that are the
same at every build, and makes the arguments of a call. Layers that diffusers initialises to zero
are given small random weights, so that the output depends on latents, time and conditioning.
"""

from __future__ import annotations

import os
import string
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import numpy as np
import torch
import transformers
from torch import nn

Kwargs = dict[str, Any]
WORDS = ("a red cat", "blue sea at night", "old town", "green hills", "rain", "two birds")
DENOISERS = ("unet", "transformer", "transformer_2", "controlnet")

# The submodule that runs exactly once in a forward, by the first name that a component has.
_HEARTS = (
    "controlnet_mid_block",
    "conv_out",
    "proj_out",
    "norm_out",
    "visual_projection",
    "text_projection",
    "final_layer_norm",
    "encoder.final_layer_norm",
)


@dataclass(frozen=True)
class Case:
    """One pipeline: how to build it, and the arguments of a call.

    `decoded` is the `output_type` that makes the pipeline decode, None where there is no decoder;
    `share` the part of `steps` that really runs (the strength of img2img).
    """

    name: str
    make: Callable[..., Any]
    args: Callable[[int, int], Kwargs]
    steps: int = 12
    decoded: str | None = None
    share: float = 1.0

    def build(
        self, *, scheduler: Any = None, dtype: torch.dtype = torch.float32, **variants: Any
    ) -> Any:
        """Return a new pipeline, equal in every weight to the one of any other build.

        `scheduler` is an instance, or a class made from the default scheduler's configuration;
        `variants` are those of the case's own builder.
        """
        pipe = self.make(**variants)
        if isinstance(scheduler, type):
            scheduler = scheduler.from_config(pipe.scheduler.config)
        if scheduler is not None:
            pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                part.eval()
                _mark(name, part)
        return pipe.to(dtype) if dtype != torch.float32 else pipe

    def kwargs(
        self,
        *,
        steps: int | None = None,
        seed: int = 0,
        batch: int = 1,
        cond: int = 0,
        decode: bool = False,
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> Kwargs:
        """Return the arguments of a call, with a generator and tensors of its own.

        `seed` is the generator's, `cond` chooses the conditioning (prompt, image ...), `decode`
        asks for pixels or samples in place of latents, `dtype` is that of embeddings.
        """
        if decode and self.decoded is None:
            raise ValueError(f"{self.name} has no decoder")
        kwargs = self.args(batch, cond)
        for key, value in kwargs.items():
            if torch.is_tensor(value) and value.is_floating_point() and "embeds" in key:
                kwargs[key] = value.to(dtype)
        kwargs["num_inference_steps"] = self.steps if steps is None else steps
        kwargs["generator"] = torch.Generator("cpu").manual_seed(seed)
        kwargs["output_type"] = self.decoded if decode else "latent"
        return kwargs | overrides


CASES: dict[str, Case] = {}


def case(
    name: str, args: Callable[[int, int], Kwargs], **fields: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated builder as the case `name`; `args(batch, cond)` makes a call."""

    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        CASES[name] = Case(name, make, args, **fields)
        return make

    return register


def run(pipe: Any, kwargs: Kwargs) -> torch.Tensor:
    """Call the pipe and return its result as one tensor, whatever its output class."""
    return as_tensor(pipe(**kwargs))


def as_tensor(output: Any) -> torch.Tensor:
    """Return the images, frames or sound of a pipeline's output as one tensor."""
    for name in ("images", "frames", "videos", "audios"):
        if hasattr(output, name):
            output = getattr(output, name)
            break
    else:
        output = output[0] if isinstance(output, tuple) else output
    if isinstance(output, list):
        output = np.stack([np.asarray(item) for item in output])
    return torch.as_tensor(output)


def denoisers(pipe: Any) -> list[nn.Module]:
    """Return the modules whose forwards are the work of a step, ControlNets among them."""
    parts = (getattr(pipe, name, None) for name in DENOISERS)
    return [part for part in parts if isinstance(part, nn.Module)]


def decoder(pipe: Any) -> nn.Module:
    """Return the module that runs when latents are decoded."""
    return (getattr(pipe, "vae", None) or pipe.movq).decoder


def leaf(output: Any) -> torch.Tensor:
    """Return the first tensor of a model's output, whatever holds it."""
    while not torch.is_tensor(output):
        output = output[0]
    return output


@dataclass
class Count:
    """Forwards that really ran: of the given modules, and of these and their copies."""

    calls: list[bool] = field(default_factory=list)

    @property
    def own(self) -> int:
        return sum(self.calls)

    @property
    def everywhere(self) -> int:
        return len(self.calls)


@contextmanager
def count_forwards(*modules: nn.Module) -> Iterator[Count]:
    """Count the forwards of `modules`, and of deep copies of them, in every thread.

    What is counted is a call of an inner layer, so a `forward` that was replaced on the module
    and does not run the model counts nothing. A module of two builds of one case counts under
    `everywhere` of each other.
    """
    hearts = [_heart(module) for module in modules]
    for heart in hearts:
        heart.__dict__.setdefault("tiny_mark", f"{type(heart).__name__}-{id(heart)}")
    own = {id(heart) for heart in hearts}
    marks = {heart.__dict__["tiny_mark"] for heart in hearts}
    count = Count()

    def note(module: nn.Module, _: Any) -> None:
        if module.__dict__.get("tiny_mark") in marks:
            count.calls.append(id(module) in own)

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield count
    finally:
        handle.remove()


def _heart(module: nn.Module) -> nn.Module:
    for path in _HEARTS:
        try:
            return module.get_submodule(path)
        except AttributeError:
            continue
    return module


def _mark(name: str, part: nn.Module) -> None:
    """Name the layers to count: a deep copy keeps the name."""
    _heart(part).__dict__["tiny_mark"] = name
    for side in ("encoder", "decoder"):
        inner = getattr(part, side, None)
        if name in ("vae", "movq") and isinstance(inner, nn.Module):
            _heart(inner).__dict__["tiny_mark"] = f"{name}.{side}"


# Building blocks


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
    contains a key: plain random networks hardly listen to time and text.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = cls(*args, **config).eval()
        for name, weight in module.named_parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(std=weight[0].numel() ** -0.5)
            for key, gain in (gains or {}).items():
                if key in name and weight.ndim > 1:
                    weight.mul_(gain)
    return module


def clip_tokenizer() -> Any:
    """Return a CLIP tokenizer of single letters."""
    tokens = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)


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


def clip_vision() -> Any:
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
    return net(transformers.CLIPVisionModelWithProjection, config)


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


_UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 32,
}
_UNET_GAINS = {"conv_out": 2.0, "time_emb_proj": 6.0, "attn2.to_v": 8.0, "attn2.to_k": 3.0}
_DIT_GAINS = {
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
_UNET_UP = ("CrossAttnUpBlock2D", "UpBlock2D")
_SD_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def sd_unet(**config: Any) -> Any:
    """Return a Stable Diffusion UNet for 16x16 latents."""
    return net(
        diffusers.UNet2DConditionModel,
        gains=_UNET_GAINS,
        **{
            **_UNET,
            "sample_size": 16,
            "up_block_types": _UNET_UP,
            "attention_head_dim": 8,
            **config,
        },
    )


# Stable Video Diffusion, CogVideoX, AudioLDM2


def _svd_args(batch: int, cond: int) -> Kwargs:
    return {
        "image": picture("svd", cond, batch, 3, 32, 32),
        "height": 32,
        "width": 32,
        "num_frames": 3,
        "min_guidance_scale": 1.0,
        "max_guidance_scale": 2.5,
    }


@case("svd", _svd_args, decoded="pt")
def svd() -> Any:
    """Per-frame guidance, continuous Karras noise levels, v-prediction, image encoder and VAE."""
    return diffusers.StableVideoDiffusionPipeline(
        vae=net(
            diffusers.AutoencoderKLTemporalDecoder,
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            latent_channels=4,
            sample_size=32,
        ),
        image_encoder=clip_vision(),
        unet=net(
            diffusers.UNetSpatioTemporalConditionModel,
            gains=_UNET_GAINS,
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            num_attention_heads=(2, 4),
            num_frames=3,
            cross_attention_dim=32,
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            **_SD_NOISE,
            prediction_type="v_prediction",
            interpolation_type="linear",
            timestep_spacing="leading",
            timestep_type="continuous",
            steps_offset=1,
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    )


def _cogvideox_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt_embeds": tensor("cog", cond, batch, 16, 32),
        "negative_prompt_embeds": tensor("cog-", 0, batch, 16, 32),
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
    }


def _cogvideox(scheduler: Any) -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=net(
            diffusers.AutoencoderKLCogVideoX,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        transformer=net(
            diffusers.CogVideoXTransformer3DModel,
            gains=_DIT_GAINS,
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=32,
            num_layers=2,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=16,
        ),
        scheduler=scheduler,
    )


_COG_NOISE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


@case("cogvideox_ddim", _cogvideox_args, decoded="pt")
def cogvideox_ddim() -> Any:
    """One transformer call a step on unconditional and conditional latents together."""
    return _cogvideox(diffusers.CogVideoXDDIMScheduler(**_COG_NOISE))


@case("cogvideox_dpm", _cogvideox_args, decoded="pt")
def cogvideox_dpm() -> Any:
    """The stochastic solver whose step returns a pair and takes the last clean sample back."""
    return _cogvideox(diffusers.CogVideoXDPMScheduler(**_COG_NOISE))


def _audioldm2_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt_embeds": tensor("t5", cond, batch, 7, 32),
        "negative_prompt_embeds": tensor("t5-", 0, batch, 7, 32),
        "generated_prompt_embeds": tensor("gpt", cond, batch, 8, 16),
        "negative_generated_prompt_embeds": tensor("gpt-", 0, batch, 8, 16),
        "audio_length_in_s": 0.008,
        "guidance_scale": 3.5,
    }


@case("audioldm2", _audioldm2_args, decoded="pt")
def audioldm2() -> Any:
    """A UNet with two text streams; its pipeline has neither step callback nor interrupt."""
    t5 = transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=1
    )
    gpt = transformers.GPT2Config(
        vocab_size=64,
        n_embd=16,
        n_head=2,
        n_layer=1,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
        initializer_range=0.2,
    )
    return diffusers.AudioLDM2Pipeline(
        vae=image_vae(in_channels=1, out_channels=1),
        text_encoder=None,
        text_encoder_2=net(transformers.T5EncoderModel, t5),
        projection_model=None,
        language_model=net(transformers.GPT2LMHeadModel, gpt),
        tokenizer=None,
        tokenizer_2=None,
        feature_extractor=None,
        unet=net(
            diffusers.AudioLDM2UNet2DConditionModel,
            gains=_UNET_GAINS,
            **{
                **_UNET,
                "sample_size": 16,
                "up_block_types": _UNET_UP,
                "attention_head_dim": 8,
                "cross_attention_dim": ((None, 16, 32), (None, 16, 32)),
            },
        ),
        scheduler=diffusers.DDIMScheduler(
            **_SD_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        vocoder=net(transformers.SpeechT5HifiGan, vocoder),
    )


# Flow models: Stable Diffusion 3, Flux


def _sd3_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt_embeds": tensor("sd3", cond, batch, 12, 32),
        "negative_prompt_embeds": tensor("sd3-", 0, batch, 12, 32),
        "pooled_prompt_embeds": tensor("sd3p", cond, batch, 64),
        "negative_pooled_prompt_embeds": tensor("sd3p-", 0, batch, 64),
        "height": 32,
        "width": 32,
        "guidance_scale": 4.0,
    }


def _sd3_slg_args(batch: int, cond: int) -> Kwargs:
    return _sd3_args(batch, cond) | {
        "skip_guidance_layers": [0],
        "skip_layer_guidance_start": 0.2,
        "skip_layer_guidance_stop": 0.6,
    }


@case("sd3", _sd3_args, decoded="pt")
def sd3() -> Any:
    """Flow matching, guidance in one batch."""
    return diffusers.StableDiffusion3Pipeline(
        transformer=net(
            diffusers.SD3Transformer2DModel,
            gains=_DIT_GAINS,
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


case("sd3_slg", _sd3_slg_args, decoded="pt")(sd3)


def _flux_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt_embeds": tensor("flux", cond, batch, 12, 32),
        "pooled_prompt_embeds": tensor("fluxp", cond, batch, 32),
        "height": 32,
        "width": 32,
        "guidance_scale": 3.5,
    }


def _flux_cfg_args(batch: int, cond: int) -> Kwargs:
    return _flux_args(batch, cond) | {
        "negative_prompt_embeds": tensor("flux-", 0, batch, 12, 32),
        "negative_pooled_prompt_embeds": tensor("fluxp-", 0, batch, 32),
        "true_cfg_scale": 3.0,
    }


@case("flux", _flux_args, decoded="pt")
def flux() -> Any:
    """Packed latents (B, tokens, 16), one call a step with the guidance as an input."""
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_image_seq_len=64, max_image_seq_len=256
        ),
        vae=image_vae(
            scaling_factor=0.36, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=net(
            diffusers.FluxTransformer2DModel,
            gains=_DIT_GAINS,
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
    )


# True guidance: two calls a step, one an item of conditioning.
case("flux_cfg", _flux_cfg_args, decoded="pt")(flux)


# Latte


def _latte_args(batch: int, cond: int) -> Kwargs:
    return {
        "negative_prompt": None,
        "prompt_embeds": tensor("latte", cond, batch, 8, 32),
        "negative_prompt_embeds": tensor("latte-", 0, batch, 8, 32),
        "height": 16,
        "width": 16,
        "video_length": 2,
        "guidance_scale": 4.0,
        "clean_caption": False,
    }


@case("latte", _latte_args, decoded="pt")
def latte() -> Any:
    """The transformer gives 2C channels for latents of C: the learned variance is dropped."""
    return diffusers.LattePipeline(
        tokenizer=None,
        text_encoder=None,
        vae=image_vae(),
        transformer=net(
            diffusers.LatteTransformer3DModel,
            gains=_DIT_GAINS,
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=32,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=32,
            video_length=2,
        ),
        scheduler=_sd_scheduler(),
    )


# Stable Diffusion and SDXL, with text encoders of their own


def _sd_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt": words(batch, cond),
        "negative_prompt": ["grey"] * batch,
        "height": 32,
        "width": 32,
        "guidance_scale": 5.0,
    }


def _sd_scheduler() -> Any:
    return diffusers.DDIMScheduler(
        **_SD_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def _sd_parts() -> Kwargs:
    tokenizer = clip_tokenizer()
    return {
        "vae": image_vae(),
        "text_encoder": clip_text(tokenizer),
        "tokenizer": tokenizer,
        "unet": sd_unet(),
        "scheduler": _sd_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@case("sd", _sd_args, decoded="pt")
def sd() -> Any:
    """Stable Diffusion: text is encoded and images decoded; any scheduler fits."""
    return diffusers.StableDiffusionPipeline(**_sd_parts())


def _sdxl_parts() -> Kwargs:
    tokenizer = clip_tokenizer()
    return {
        "vae": image_vae(),
        "text_encoder": clip_text(tokenizer),
        "text_encoder_2": clip_text(tokenizer, projection=True),
        "tokenizer": tokenizer,
        "tokenizer_2": clip_tokenizer(),
        "unet": sd_unet(
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
        ),
        "scheduler": diffusers.EulerDiscreteScheduler(
            **_SD_NOISE, timestep_spacing="leading", steps_offset=1
        ),
        "add_watermarker": False,
    }


@case("sdxl", _sd_args, decoded="pt")
def sdxl() -> Any:
    """SDXL: two text encoders, pooled embeddings and sizes as added conditions."""
    return diffusers.StableDiffusionXLPipeline(**_sdxl_parts())
