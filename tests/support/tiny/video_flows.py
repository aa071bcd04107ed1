"""Video under flow matching, with a picture to begin with, with sound."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

from .cases import Kwargs, case
from .parts import (
    DIT_GAINS,
    clip_processor,
    clip_vision,
    net,
    picture,
    tensor,
    text_args,
)


def wan_args(batch: int, cond: int) -> Kwargs:
    return text_args("wan", batch, cond) | {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "guidance_scale": 4.0,
    }


def wan_transformer(gain: float = 1.0, **config: Any) -> Any:
    return net(
        diffusers.WanTransformer3DModel,
        gains=DIT_GAINS | {"proj_out": gain},
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **{"in_channels": 4, "out_channels": 4, **config},
    )


def wan_parts() -> Kwargs:
    return {
        "tokenizer": None,
        "text_encoder": None,
        "vae": net(
            diffusers.AutoencoderKLWan,
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


@case("wan", wan_args, decoded="pt")
def wan() -> Any:
    """Wan 2.1: two calls a step, latents in fp32."""
    return diffusers.WanPipeline(**wan_parts(), transformer=wan_transformer())


@case("wan22", wan_args, decoded="pt")
def wan22() -> Any:
    """Wan 2.2 A14B: a second transformer below the boundary."""
    models = {"transformer": wan_transformer(), "transformer_2": wan_transformer(1.2)}
    return diffusers.WanPipeline(**wan_parts(), **models, boundary_ratio=0.875)


@case("wan22_5b", wan_args, decoded="pt")
def wan22_5b() -> Any:
    """Wan 2.2 5B: a timestep for every token."""
    parts = wan_parts() | {"transformer": wan_transformer()}
    return diffusers.WanPipeline(**parts, expand_timesteps=True)


def _wan_i2v_args(batch: int, cond: int) -> Kwargs:
    return wan_args(batch, cond) | {"image": picture("wan", cond, 1, 3, 32, 32)}


@case("wan_i2v", _wan_i2v_args, decoded="pt")
def wan_i2v() -> Any:
    """Wan 2.1 from a picture: its latents as further channels, its embeddings beside the text."""
    parts = wan_parts() | {
        "image_encoder": clip_vision(transformers.CLIPVisionModel),
        "image_processor": clip_processor(),
        "transformer": wan_transformer(in_channels=12, image_dim=32, added_kv_proj_dim=24),
    }
    return diffusers.WanImageToVideoPipeline(**parts)


@case("wan22_i2v", _wan_i2v_args, decoded="pt")
def wan22_i2v() -> Any:
    """Wan 2.2 A14B from a picture: two transformers."""
    models = {
        "transformer": wan_transformer(in_channels=12),
        "transformer_2": wan_transformer(1.2, in_channels=12),
    }
    return diffusers.WanImageToVideoPipeline(**wan_parts(), **models, boundary_ratio=0.875)


@case("wan22_5b_i2v", _wan_i2v_args, decoded="pt")
def wan22_5b_i2v() -> Any:
    """Wan 2.2 5B from a picture: the input's first frame is the picture's, the latents' is not."""
    parts = wan_parts() | {"transformer": wan_transformer()}
    return diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)


def _hunyuanvideo_args(batch: int, cond: int) -> Kwargs:
    args = text_args("hunyuan", batch, cond, mask=True)
    return {key: value for key, value in args.items() if "negative" not in key} | {
        "pooled_prompt_embeds": tensor("hunyuanp", cond, batch, 8),
        "height": 32,
        "width": 32,
        "num_frames": 5,
    }


def _hunyuanvideo_cfg_args(batch: int, cond: int) -> Kwargs:
    args = _hunyuanvideo_args(batch, cond) | text_args("hunyuan", batch, cond, mask=True)
    negative = tensor("hunyuanp-", 0, batch, 8)
    return args | {"negative_pooled_prompt_embeds": negative, "true_cfg_scale": 3.0}


def _hunyuanvideo_parts(**config: Any) -> Kwargs:
    return {
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "vae": None,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        "transformer": net(
            diffusers.HunyuanVideoTransformer3DModel,
            gains=DIT_GAINS,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=32,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
            **{"in_channels": 4, "out_channels": 4, "guidance_embeds": True, **config},
        ),
    }


@case("hunyuanvideo", _hunyuanvideo_args)
def hunyuanvideo() -> Any:
    """One call a step, guidance as an input; latents are cast to the model's dtype."""
    return diffusers.HunyuanVideoPipeline(**_hunyuanvideo_parts())


case("hunyuanvideo_cfg", _hunyuanvideo_cfg_args)(hunyuanvideo)


def _hunyuanvideo_i2v_args(batch: int, cond: int) -> Kwargs:
    image = picture("hunyuan", cond, batch, 3, 32, 32)
    return _hunyuanvideo_args(batch, cond) | {"image": image, "num_frames": 9}


def _hunyuanvideo_i2v(**config: Any) -> Any:
    parts = _hunyuanvideo_parts(guidance_embeds=False, **config) | {
        "image_processor": None,
        "vae": net(
            diffusers.AutoencoderKLHunyuanVideo,
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ),
    }
    return diffusers.HunyuanVideoImageToVideoPipeline(**parts)


@case("hunyuanvideo_i2v", _hunyuanvideo_i2v_args, decoded="pt")
def hunyuanvideo_i2v() -> Any:
    """The picture's latents and a mask as further channels."""
    return _hunyuanvideo_i2v(in_channels=9, image_condition_type="latent_concat")


@case("hunyuanvideo_i2v_replace", _hunyuanvideo_i2v_args, decoded="pt")
def hunyuanvideo_i2v_replace() -> Any:
    """The picture's latents are the first frame: step gets the other frames only."""
    return _hunyuanvideo_i2v(image_condition_type="token_replace")


def _hunyuanvideo15_args(batch: int, cond: int) -> Kwargs:
    args: Kwargs = {"height": 32, "width": 32, "num_frames": 5}
    for side, number in (("", cond), ("negative_", 0)):
        for encoder in ("", "_2"):
            text = tensor(f"{side}hunyuan15{encoder}", number, batch, 8, 32)
            args[f"{side}prompt_embeds{encoder}"] = text
            args[f"{side}prompt_embeds_mask{encoder}"] = torch.ones(batch, 8)
    return args


@case("hunyuanvideo15", _hunyuanvideo15_args, needs="HunyuanVideo15Pipeline", decoded="pt")
def hunyuanvideo15() -> Any:
    """A guider calls the transformer twice a step; a mask and an empty picture as channels."""
    return diffusers.HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=net(
            diffusers.AutoencoderKLHunyuanVideo15,
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8, 8),
            layers_per_block=1,
        ),
        transformer=net(
            diffusers.HunyuanVideo15Transformer3DModel,
            gains=DIT_GAINS,
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=32,
            text_embed_2_dim=32,
            image_embed_dim=12,
            rope_axes_dim=(4, 6, 6),
            task_type="t2v",
        ),
    )


def _ltx_args(batch: int, cond: int) -> Kwargs:
    return text_args("ltx", batch, cond, mask=True) | {
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "guidance_scale": 3.0,
        "decode_timestep": 0.05,
        "decode_noise_scale": 0.025,
    }


def _ltx_i2v_args(batch: int, cond: int) -> Kwargs:
    return _ltx_args(batch, cond) | {"image": picture("ltx", cond, batch, 3, 32, 32)}


def _ltx_condition_args(batch: int, cond: int) -> Kwargs:
    return _ltx_args(batch, cond) | {
        "image": [picture("ltx", cond, batch, 3, 32, 32)],
        "frame_index": [0],
        "strength": [1.0],
    }


def _ltx_parts(**vae: Any) -> Kwargs:
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": net(
            diffusers.AutoencoderKLLTXVideo,
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
            patch_size_t=1,
            **vae,
        ),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": net(
            diffusers.LTXVideoTransformer3DModel,
            gains=DIT_GAINS,
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=32,
        ),
    }


@case("ltx", _ltx_args, decoded="pt")
def ltx() -> Any:
    """Packed latents in fp32, guidance in one batch; decoding draws noise after the loop."""
    return diffusers.LTXPipeline(**_ltx_parts(timestep_conditioning=True))


@case("ltx_i2v", _ltx_i2v_args, decoded="pt")
def ltx_i2v() -> Any:
    """The first frame is kept: step gets the other frames only."""
    return diffusers.LTXImageToVideoPipeline(**_ltx_parts())


@case("ltx_condition", _ltx_condition_args, decoded="pt")
def ltx_condition() -> Any:
    """A timestep for every token, and noise added to the condition's latents in every step."""
    return diffusers.LTXConditionPipeline(**_ltx_parts())


def _mochi_args(batch: int, cond: int) -> Kwargs:
    args = text_args("mochi", batch, cond, mask=True)
    return args | {"height": 32, "width": 32, "num_frames": 7, "guidance_scale": 2.5}


@case("mochi", _mochi_args)
def mochi() -> Any:
    """Guidance and step in fp32, time running backwards."""
    return diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=net(
            diffusers.MochiTransformer3DModel,
            gains=DIT_GAINS,
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=32,
            time_embed_dim=16,
            max_sequence_length=16,
        ),
    )


def ltx2_args(batch: int, cond: int) -> Kwargs:
    args = text_args("ltx2", batch, cond, mask=True)
    for side in ("", "negative_"):
        args[f"{side}prompt_embeds"] = torch.cat([args[f"{side}prompt_embeds"]] * 2, dim=-1)
    return args | {
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "frame_rate": 25.0,
        "guidance_scale": 3.0,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_guidance_scale": 3.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "guidance_rescale": 0.0,
    }


@case("ltx2", ltx2_args, needs="LTX2Pipeline")
def ltx2() -> Any:
    """Video and sound: two schedulers step in every iteration, one of them a deep copy."""
    return diffusers.LTX2Pipeline(**ltx2_parts())


def ltx2_parts(compression: int = 8) -> Kwargs:
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": net(
            diffusers.AutoencoderKLLTX2Video,
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatial_compression_ratio=compression,
            temporal_compression_ratio=8,
        ),
        "audio_vae": net(
            diffusers.AutoencoderKLLTX2Audio,
            base_channels=8,
            ch_mult=(1, 1, 1),
            num_res_blocks=1,
            latent_channels=2,
            mel_bins=16,
            resolution=32,
        ),
        "text_encoder": None,
        "tokenizer": None,
        "vocoder": None,
        "connectors": net(
            diffusers.pipelines.ltx2.LTX2TextConnectors,
            caption_channels=32,
            text_proj_in_factor=2,
            video_connector_num_attention_heads=4,
            video_connector_attention_head_dim=8,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=4,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
            connector_rope_base_seq_len=32,
        ),
        "transformer": net(
            diffusers.LTX2VideoTransformer3DModel,
            gains=DIT_GAINS,
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=4,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=32,
            num_layers=1,
            caption_channels=32,
        ),
    }
