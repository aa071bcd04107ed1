"""Stable Diffusion and SDXL, with pictures, masks, ControlNets, IP-adapters, LoRAs."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from .cases import Kwargs, case
from .parts import (
    SD_NOISE,
    UNET,
    UNET_GAINS,
    clip_processor,
    clip_text,
    clip_tokenizer,
    clip_vision,
    ddim,
    image_vae,
    net,
    picture,
    sd_unet,
    tensor,
    text_args,
    words,
)


def sd_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt": words(batch, cond),
        "negative_prompt": ["grey"] * batch,
        "height": 32,
        "width": 32,
        "guidance_scale": 5.0,
    }


def sd_parts() -> Kwargs:
    tokenizer = clip_tokenizer()
    return {
        "vae": image_vae(),
        "text_encoder": clip_text(tokenizer),
        "tokenizer": tokenizer,
        "unet": sd_unet(),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@case("sd", sd_args, decoded="pt")
def sd() -> Any:
    """Stable Diffusion: text is encoded and images decoded; any scheduler fits."""
    return diffusers.StableDiffusionPipeline(**sd_parts())


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
            **SD_NOISE, timestep_spacing="leading", steps_offset=1
        ),
        "add_watermarker": False,
    }


@case("sdxl", sd_args, decoded="pt")
def sdxl() -> Any:
    """SDXL: two text encoders, pooled embeddings and sizes as added conditions."""
    return diffusers.StableDiffusionXLPipeline(**_sdxl_parts())


def _img2img_args(batch: int, cond: int) -> Kwargs:
    args = sd_args(batch, cond) | {
        "image": picture("img2img", cond, batch, 3, 32, 32),
        "strength": 0.75,
    }
    del args["height"], args["width"]
    return args


@case("sd_img2img", _img2img_args, steps=16, share=0.75, decoded="pt")
def sd_img2img() -> Any:
    """The loop begins at a quarter of the timesteps, from an encoded picture with noise."""
    return diffusers.StableDiffusionImg2ImgPipeline(**sd_parts())


@case("sdxl_img2img", _img2img_args, steps=16, share=0.75, decoded="pt")
def sdxl_img2img() -> Any:
    """As `sd_img2img`, with noise levels found by `begin_index`."""
    return diffusers.StableDiffusionXLImg2ImgPipeline(**_sdxl_parts())


def _inpaint_args(batch: int, cond: int) -> Kwargs:
    mask = torch.zeros(batch, 1, 32, 32)
    mask[..., 8:28, 4:20] = 1.0
    return sd_args(batch, cond) | {
        "image": picture("inpaint", cond, batch, 3, 32, 32),
        "mask_image": mask,
        "strength": 1.0,
    }


@case("sd_inpaint", _inpaint_args, decoded="pt")
def sd_inpaint() -> Any:
    """Four input channels: after every step the latents outside the mask are replaced."""
    return diffusers.StableDiffusionInpaintPipeline(**sd_parts())


@case("sd_inpaint9", _inpaint_args, decoded="pt")
def sd_inpaint9() -> Any:
    """Nine input channels: mask and masked picture are inputs, the latents stay the loop's own."""
    parts = sd_parts() | {"unet": sd_unet(in_channels=9)}
    return diffusers.StableDiffusionInpaintPipeline(**parts)


def _controlnet_args(batch: int, cond: int) -> Kwargs:
    return sd_args(batch, cond) | {"image": picture("control", cond, batch, 3, 32, 32)}


@case("sd_controlnet", _controlnet_args, decoded="pt")
def sd_controlnet() -> Any:
    """A ControlNet runs before the UNet in every step."""
    controlnet = net(
        diffusers.ControlNetModel,
        gains={**UNET_GAINS, "controlnet_down": 0.3, "controlnet_cond": 2.0},
        **UNET,
        attention_head_dim=8,
        conditioning_embedding_out_channels=(8, 16),
    )
    return diffusers.StableDiffusionControlNetPipeline(**sd_parts(), controlnet=controlnet)


@case("sdxl_controlnet", _controlnet_args, decoded="pt")
def sdxl_controlnet() -> Any:
    """As `sd_controlnet`, with SDXL's added conditions in both networks."""
    controlnet = net(
        diffusers.ControlNetModel,
        gains={**UNET_GAINS, "controlnet_down": 0.3, "controlnet_cond": 2.0},
        **{**UNET, "cross_attention_dim": 64},
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        conditioning_embedding_out_channels=(8, 16),
    )
    return diffusers.StableDiffusionXLControlNetPipeline(**_sdxl_parts(), controlnet=controlnet)


def _pag_args(batch: int, cond: int) -> Kwargs:
    return sd_args(batch, cond) | {"pag_scale": 3.0}


@case("sd_pag", _pag_args, decoded="pt")
def sd_pag() -> Any:
    """Perturbed attention: three items of a batch, and processors of its own for a call's time."""
    return diffusers.StableDiffusionPAGPipeline(**sd_parts(), pag_applied_layers=["mid", "up"])


@case("sdxl_pag", _pag_args, decoded="pt")
def sdxl_pag() -> Any:
    return diffusers.StableDiffusionXLPAGPipeline(**_sdxl_parts(), pag_applied_layers=["mid"])


def _if_args(batch: int, cond: int) -> Kwargs:
    args = text_args("if", batch, cond)
    return args | {"height": 32, "width": 32, "guidance_scale": 5.0}


@case("deepfloyd_if", _if_args)
def deepfloyd_if() -> Any:
    """Pixels in place of latents; the network tells the noise and its variance, six channels."""
    return diffusers.IFPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=sd_unet(in_channels=3, out_channels=6, sample_size=32),
        scheduler=diffusers.DDPMScheduler(
            variance_type="learned_range",
            prediction_type="epsilon",
            beta_schedule="squaredcos_cap_v2",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def _ip_adapter_args(batch: int, cond: int) -> Kwargs:
    return sd_args(batch, cond) | {"ip_adapter_image": picture("ip", cond, batch, 3, 32, 32)}


def add_ip_adapter(pipe: Any, scale: float = 1.0) -> None:
    """Load an IP-adapter with random weights into a pipe whose UNet has not got one."""
    unet = pipe.unet
    width, tokens = unet.config.cross_attention_dim, 4
    sides = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    hidden = [unet.get_submodule(name.removesuffix(".processor")).inner_dim for name in sides]
    layers = {}
    for i, size in enumerate(hidden):
        for side in ("k", "v"):
            weight = tensor(f"ip{i}{side}", 0, size, width) * (2.0 if side == "k" else 4.0)
            layers[f"{2 * i + 1}.to_{side}_ip.weight"] = weight / width**0.5
    projection = {
        "proj.weight": tensor("ip-proj", 0, tokens * width, 32) / 32**0.5,
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    state = {"image_proj": projection, "ip_adapter": layers}
    pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(scale)


@case("sd_ip_adapter", _ip_adapter_args, decoded="pt")
def sd_ip_adapter() -> Any:
    """A picture as a second prompt, through an image encoder and attention processors."""
    parts = sd_parts() | {
        "image_encoder": clip_vision(),
        "feature_extractor": clip_processor(),
    }
    pipe = diffusers.StableDiffusionPipeline(**parts)
    add_ip_adapter(pipe)
    return pipe


def lora_state(module: nn.Module, prefix: str, seed: int = 0, rank: int = 4) -> Kwargs:
    """Return random LoRA weights for every attention projection of the module."""
    state = {}
    for path, layer in module.named_modules():
        name = path.removesuffix(".base_layer")
        if isinstance(layer, nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            key = f"{prefix}.{name}"
            down = tensor(key, seed, rank, layer.in_features) / layer.in_features**0.5
            up = tensor(key + "-up", seed, layer.out_features, rank) / rank**0.5
            state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = down, up
    return state


def add_lora(pipe: Any, name: str = "tiny", seed: int = 0) -> None:
    """Load a LoRA with random weights for the pipe's denoiser under the adapter's name."""
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    pipe.load_lora_weights(lora_state(getattr(pipe, part), part, seed), adapter_name=name)


@case("sd_lora", sd_args, decoded="pt")
def sd_lora() -> Any:
    """Stable Diffusion with a LoRA loaded."""
    pipe = sd()
    add_lora(pipe)
    return pipe
