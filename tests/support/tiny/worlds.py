"""Video transformers that came after Wan and HunyuanVideo, and more pipelines around those two."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .cases import Kwargs, case
from .loops import Guardrail
from .parts import DIT_GAINS, net, picture, tensor, text_args
from .video_flows import (
    ltx2_args,
    ltx2_parts,
    wan_args,
    wan_parts,
    wan_transformer,
)

_ENCODERS = {
    "text_encoder": None,
    "tokenizer": None,
    "text_encoder_2": None,
    "tokenizer_2": None,
}


def _kandinsky5_args(batch: int, cond: int) -> Kwargs:
    args: Kwargs = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 4.0}
    for side, number in (("", cond), ("negative_", 0)):
        args[f"{side}prompt_embeds_qwen"] = tensor(f"{side}kandinsky5", number, batch, 8, 32)
        args[f"{side}prompt_embeds_clip"] = tensor(f"{side}kandinsky5c", number, batch, 16)
        args[f"{side}prompt_cu_seqlens"] = torch.arange(batch + 1, dtype=torch.int32) * 8
    return args


def _kandinsky5_i2v_args(batch: int, cond: int) -> Kwargs:
    image = picture("kandinsky5", cond, 1, 3, 32, 32)
    return _kandinsky5_args(batch, cond) | {"image": image, "num_frames": 25}


def _kandinsky5_parts(vae: Any) -> Kwargs:
    return _ENCODERS | {
        "vae": vae,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        "transformer": net(
            diffusers.Kandinsky5Transformer3DModel,
            gains=DIT_GAINS | {"modulation": 3.0},
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=32,
            in_text_dim2=16,
            time_dim=16,
            model_dim=32,
            ff_dim=48,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            visual_cond=True,
        ),
    }


def _hunyuan_vae() -> Any:
    return net(
        diffusers.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


@case("kandinsky5", _kandinsky5_args, more=True, needs="Kandinsky5T2VPipeline")
def kandinsky5() -> Any:
    """Two calls a step; the latents are a view of a tensor with a mask, written in place."""
    return diffusers.Kandinsky5T2VPipeline(**_kandinsky5_parts(_hunyuan_vae()))


@case("kandinsky5_i2v", _kandinsky5_i2v_args, more=True, needs="Kandinsky5I2VPipeline")
def kandinsky5_i2v() -> Any:
    """The picture's latents are the first frame: step gets the other frames only."""
    return diffusers.Kandinsky5I2VPipeline(**_kandinsky5_parts(_hunyuan_vae()))


def _cosmos2_args(batch: int, cond: int) -> Kwargs:
    args = text_args("cosmos2", batch, cond)
    return args | {"height": 32, "width": 32, "guidance_scale": 3.0}


def _cosmos2_v2w_args(batch: int, cond: int) -> Kwargs:
    image = picture("cosmos2", cond, 1, 3, 32, 32)
    return _cosmos2_args(batch, cond) | {"image": image, "num_frames": 5}


def _cosmos2_parts(**config: Any) -> Kwargs:
    parts = wan_parts() | {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        "safety_checker": Guardrail(),
    }
    return parts | {
        "transformer": net(
            diffusers.CosmosTransformer3DModel,
            gains=DIT_GAINS | {"linear_2": 3.0},
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            mlp_ratio=2,
            text_embed_dim=32,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            patch_size=(1, 2, 2),
            rope_scale=(2.0, 1.0, 1.0),
            concat_padding_mask=False,
            extra_pos_embed_type="learnable",
            **{"in_channels": 4, **config},
        ),
    }


@case("cosmos2", _cosmos2_args, more=True, needs="Cosmos2TextToImagePipeline")
def cosmos2() -> Any:
    """Preconditioned within the loop; step gets what makes of a clean sample the flow."""
    return diffusers.Cosmos2TextToImagePipeline(**_cosmos2_parts())


@case("cosmos2_v2w", _cosmos2_v2w_args, more=True, needs="Cosmos2VideoToWorldPipeline")
def cosmos2_v2w() -> Any:
    """The same from a picture, put in the place of what the model says of its frame."""
    return diffusers.Cosmos2VideoToWorldPipeline(**_cosmos2_parts(in_channels=5))


def _sana_video_args(batch: int, cond: int) -> Kwargs:
    return text_args("sana_video", batch, cond, mask=True) | {
        "negative_prompt": None,
        "height": 32,
        "width": 32,
        "frames": 5,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
    }


@case("sana_video", _sana_video_args, more=True, needs="SanaVideoPipeline")
def sana_video() -> Any:
    """Linear attention over frames; a flow model under DPM-Solver++."""
    parts = wan_parts() | {
        "scheduler": diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "transformer": net(
            diffusers.SanaVideoTransformer3DModel,
            gains=DIT_GAINS,
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=32,
            sample_size=8,
            rope_max_seq_len=32,
        ),
    }
    return diffusers.SanaVideoPipeline(**parts)


def _wan_vace_args(batch: int, cond: int) -> Kwargs:
    video = [picture(f"vace{k}", cond, 3, 32, 32) for k in range(5)]
    return wan_args(batch, cond) | {"video": torch.stack(video)[None]}


# Versions that have no WanAnimate take no embeddings here.
@case("wan_vace", _wan_vace_args, more=True, needs="WanAnimatePipeline")
def wan_vace() -> Any:
    """A video to be edited, through blocks of their own beside the others."""
    transformer = net(
        diffusers.WanVACETransformer3DModel,
        gains=DIT_GAINS,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=72,
    )
    return diffusers.WanVACEPipeline(**wan_parts(), transformer=transformer)


def _wan_v2v_args(batch: int, cond: int) -> Kwargs:
    args = wan_args(batch, cond) | {"strength": 0.75}
    del args["num_frames"]
    return args | {"video": torch.stack([picture(f"v2v{k}", cond, 3, 32, 32) for k in range(5)])}


@case("wan_v2v", _wan_v2v_args, more=True, needs="WanVideoToVideoPipeline", steps=16, share=0.75)
def wan_v2v() -> Any:
    """From a video with noise, over the later part of the timesteps."""
    return diffusers.WanVideoToVideoPipeline(**wan_parts(), transformer=wan_transformer())


def _skyreels_args(batch: int, cond: int) -> Kwargs:
    return wan_args(batch, cond)


@case("skyreels", _skyreels_args, more=True, needs="SkyReelsV2Pipeline")
def skyreels() -> Any:
    """Wan's form, with a flow under UniPC."""
    transformer = net(
        diffusers.SkyReelsV2Transformer3DModel,
        gains=DIT_GAINS,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return diffusers.SkyReelsV2Pipeline(**wan_parts(), transformer=transformer)


def _ltx2_i2v_args(batch: int, cond: int) -> Kwargs:
    return ltx2_args(batch, cond) | {
        "height": 128,
        "width": 128,
        "image": picture("ltx2", cond, batch, 3, 128, 128),
        "image_crf": 0,
    }


@case("ltx2_i2v", _ltx2_i2v_args, more=True, needs="LTX2ImageToVideoPipeline")
def ltx2_i2v() -> Any:
    """From a picture, with sound: the video's step gets the frames after the first."""
    return diffusers.LTX2ImageToVideoPipeline(**ltx2_parts(32))


def _ltx2_condition_args(batch: int, cond: int) -> Kwargs:
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    condition = LTX2VideoCondition(picture("ltx2", cond, 1, 3, 128, 128), crf=0)
    return ltx2_args(batch, cond) | {"height": 128, "width": 128, "conditions": [condition]}


@case("ltx2_condition", _ltx2_condition_args, more=True, needs="LTX2ConditionPipeline")
def ltx2_condition() -> Any:
    """Tokens of pictures beside those of the video, held at their own noise."""
    return diffusers.LTX2ConditionPipeline(**ltx2_parts(32))
