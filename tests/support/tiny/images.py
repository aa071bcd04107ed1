"""Image transformers and flows, and Kandinsky 2.2."""

from __future__ import annotations

from typing import Any

import diffusers

from .cases import Kwargs, case
from .parts import (
    DIT_GAINS,
    SD_NOISE,
    UNET_GAINS,
    ddim,
    image_vae,
    net,
    picture,
    tensor,
    text_args,
)


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
            gains=DIT_GAINS,
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


def flux_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt_embeds": tensor("flux", cond, batch, 12, 32),
        "pooled_prompt_embeds": tensor("fluxp", cond, batch, 32),
        "height": 32,
        "width": 32,
        "guidance_scale": 3.5,
    }


def _flux_cfg_args(batch: int, cond: int) -> Kwargs:
    return flux_args(batch, cond) | {
        "negative_prompt_embeds": tensor("flux-", 0, batch, 12, 32),
        "negative_pooled_prompt_embeds": tensor("fluxp-", 0, batch, 32),
        "true_cfg_scale": 3.0,
    }


def flux_parts(**config: Any) -> Kwargs:
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_image_seq_len=64, max_image_seq_len=256
        ),
        "vae": image_vae(
            scaling_factor=0.36, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False
        ),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "transformer": net(
            diffusers.FluxTransformer2DModel,
            gains=DIT_GAINS,
            num_layers=1,
            **_FLUX_SIZES | config,
        ),
    }


_FLUX_SIZES = {
    "patch_size": 1,
    "in_channels": 16,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}


@case("flux", flux_args, decoded="pt")
def flux() -> Any:
    """Packed latents (B, tokens, 16), one call a step with the guidance as an input."""
    return diffusers.FluxPipeline(**flux_parts())


def _flux_controlnet_args(batch: int, cond: int) -> Kwargs:
    return flux_args(batch, cond) | {"control_image": picture("control", cond, batch, 3, 32, 32)}


@case("flux_controlnet", _flux_controlnet_args, decoded="pt")
def flux_controlnet() -> Any:
    """A ControlNet on packed latents, on a picture that the VAE encodes."""
    controlnet = net(diffusers.FluxControlNetModel, gains=DIT_GAINS, num_layers=1, **_FLUX_SIZES)
    return diffusers.FluxControlNetPipeline(**flux_parts(), controlnet=controlnet)


# True guidance: two calls a step, one an item of conditioning.
case("flux_cfg", _flux_cfg_args, decoded="pt")(flux)


def qwenimage_args(batch: int, cond: int) -> Kwargs:
    args = text_args("qwen", batch, cond, mask=True)
    args = {key.replace("attention_mask", "embeds_mask"): args[key] for key in args}
    return args | {"height": 64, "width": 64, "true_cfg_scale": 3.0}


def qwenimage_parts() -> Kwargs:
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.02, time_shift_type="exponential"
        ),
        "vae": None,
        "text_encoder": None,
        "tokenizer": None,
        "transformer": net(
            diffusers.QwenImageTransformer2DModel,
            gains=DIT_GAINS,
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
    }


@case("qwenimage", qwenimage_args)
def qwenimage() -> Any:
    """Two calls a step, the guided output rescaled to the norm of the conditional one."""
    return diffusers.QwenImagePipeline(**qwenimage_parts())


def _qwenimage_img2img_args(batch: int, cond: int) -> Kwargs:
    image = picture("qwen", cond, batch, 3, 64, 64)
    return qwenimage_args(batch, cond) | {"image": image, "strength": 0.75}


@case("qwenimage_img2img", _qwenimage_img2img_args, steps=16, share=0.75, decoded="pt")
def qwenimage_img2img() -> Any:
    """From a picture with noise, over the later part of the timesteps."""
    return diffusers.QwenImageImg2ImgPipeline(**qwenimage_parts() | {"vae": qwenimage_vae()})


def qwenimage_vae() -> Any:
    return net(
        diffusers.AutoencoderKLQwenImage,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _pixart_args(batch: int, cond: int) -> Kwargs:
    return text_args("pixart", batch, cond, mask=True) | {
        "negative_prompt": None,
        "height": 32,
        "width": 32,
        "guidance_scale": 4.5,
        "clean_caption": False,
        "use_resolution_binning": False,
    }


@case("pixart", _pixart_args, decoded="pt")
def pixart() -> Any:
    """A learned variance that the pipeline drops; DPM-Solver++; no interrupt."""
    return diffusers.PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=image_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(**SD_NOISE),
        transformer=net(
            diffusers.PixArtTransformer2DModel,
            gains=DIT_GAINS,
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=16,
            patch_size=2,
            norm_num_groups=8,
        ),
    )


def _sana_args(batch: int, cond: int) -> Kwargs:
    return text_args("sana", batch, cond, mask=True) | {
        "negative_prompt": None,
        "height": 32,
        "width": 32,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
    }


@case("sana", _sana_args, decoded="pt")
def sana() -> Any:
    """Linear attention; a flow model under DPM-Solver++."""
    return diffusers.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=net(
            diffusers.AutoencoderDC,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            upsample_block_type="interpolate",
            downsample_block_type="stride_conv",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=net(
            diffusers.SanaTransformer2DModel,
            gains=DIT_GAINS,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=4,
            attention_head_dim=8,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=16,
        ),
    )


def _lumina2_args(batch: int, cond: int) -> Kwargs:
    args = text_args("lumina", batch, cond, mask=True)
    return args | {"height": 64, "width": 64, "guidance_scale": 4.0}


@case("lumina2", _lumina2_args)
def lumina2() -> Any:
    """Two calls a step, rescaled guidance, outputs negated before step."""
    return diffusers.Lumina2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=net(
            diffusers.Lumina2Transformer2DModel,
            gains=DIT_GAINS,
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=16,
            scaling_factor=1.0,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 128, 128),
            cap_feat_dim=32,
        ),
    )


def _z_image_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt_embeds": list(tensor("z", cond, batch, 8, 32)),
        "negative_prompt_embeds": list(tensor("z-", 0, batch, 8, 32)),
        "height": 64,
        "width": 64,
        "guidance_scale": 3.0,
    }


def _z_image_trunc_args(batch: int, cond: int) -> Kwargs:
    return _z_image_args(batch, cond) | {"cfg_truncation": 0.3}


@case("z_image", _z_image_args, needs="ZImagePipeline")
def z_image() -> Any:
    """The transformer takes and returns lists, one tensor an item of the batch."""
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=net(
            diffusers.ZImageTransformer2DModel,
            gains={"adaLN_modulation": 1.5},
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[8, 4, 4],
            axes_lens=[64, 32, 32],
        ),
    )


# Guidance ends in mid-run: the batch of the call halves.
case("z_image_trunc", _z_image_trunc_args, needs="ZImagePipeline")(z_image)


def _kandinsky_args(batch: int, cond: int) -> Kwargs:
    return {
        "image_embeds": tensor("kandinsky", cond, batch, 32),
        "negative_image_embeds": tensor("kandinsky-", 0, batch, 32),
        "height": 32,
        "width": 32,
        "guidance_scale": 4.0,
    }


def _kandinsky(scheduler: Any) -> Any:
    return diffusers.KandinskyV22Pipeline(
        scheduler=scheduler,
        movq=net(
            diffusers.VQModel,
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            norm_num_groups=8,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
        unet=net(
            diffusers.UNet2DConditionModel,
            gains=UNET_GAINS,
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            encoder_hid_dim=32,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=32,
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
        ),
    )


@case("kandinsky", _kandinsky_args, decoded="pt")
def kandinsky() -> Any:
    """Image embeddings as the prompt; DDIM, so that the variance is dropped before step."""
    return _kandinsky(ddim())


@case("kandinsky_ddpm", _kandinsky_args, decoded="pt")
def kandinsky_ddpm() -> Any:
    """As `kandinsky` with DDPM: step gets 2C channels for latents of C, and draws noise."""
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, variance_type="learned_range", clip_sample=False
    )
    return _kandinsky(scheduler)
