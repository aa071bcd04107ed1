"""Video under diffusion schedulers."""

from __future__ import annotations

from typing import Any

import diffusers

from .cases import Kwargs, case
from .parts import (
    DIT_GAINS,
    SD_NOISE,
    UNET_GAINS,
    clip_processor,
    clip_vision,
    ddim,
    image_vae,
    net,
    picture,
    tensor,
    text_args,
)
from .stable import sd_args, sd_parts


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
            gains=UNET_GAINS,
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
            **SD_NOISE,
            prediction_type="v_prediction",
            interpolation_type="linear",
            timestep_spacing="leading",
            timestep_type="continuous",
            steps_offset=1,
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        feature_extractor=clip_processor(),
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


def _cogvideox(scheduler: Any, **config: int) -> Any:
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
            gains=DIT_GAINS,
            num_attention_heads=4,
            attention_head_dim=8,
            time_embed_dim=16,
            text_embed_dim=32,
            num_layers=2,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=16,
            **{"in_channels": 4, "out_channels": 4, **config},
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


def _cogvideox_i2v_args(batch: int, cond: int) -> Kwargs:
    return _cogvideox_args(batch, cond) | {"image": picture("cog", cond, batch, 3, 32, 32)}


@case("cogvideox_i2v", _cogvideox_i2v_args, decoded="pt")
def cogvideox_i2v() -> Any:
    """The picture's latents are further channels of the input."""
    pipe = _cogvideox(diffusers.CogVideoXDDIMScheduler(**_COG_NOISE), in_channels=8, out_channels=4)
    return diffusers.CogVideoXImageToVideoPipeline(**pipe.components)


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
            gains=DIT_GAINS,
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
        scheduler=ddim(),
    )


def _allegro_args(batch: int, cond: int) -> Kwargs:
    return text_args("allegro", batch, cond, mask=True) | {
        "negative_prompt": None,
        "height": 32,
        "width": 32,
        "num_frames": 8,
        "guidance_scale": 4.0,
        "clean_caption": False,
    }


@case("allegro", _allegro_args)
def allegro() -> Any:
    """Any diffusion scheduler on a video transformer, one call a step."""
    return diffusers.AllegroPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**SD_NOISE),
        transformer=net(
            diffusers.AllegroTransformer3DModel,
            gains=DIT_GAINS,
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            cross_attention_dim=48,
            caption_channels=32,
            sample_width=4,
            sample_height=4,
            sample_frames=2,
        ),
    )


def animatediff_args(batch: int, cond: int) -> Kwargs:
    return sd_args(batch, cond) | {"num_frames": 3}


@case("animatediff", animatediff_args, decoded="pt")
def animatediff() -> Any:
    """A UNet with motion modules, frames in one batch."""
    adapter = net(
        diffusers.MotionAdapter,
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=4,
    )
    parts = sd_parts()
    del parts["safety_checker"], parts["requires_safety_checker"]
    return diffusers.AnimateDiffPipeline(**parts, motion_adapter=adapter)
