"""Image transformers under flow matching that came after Flux: with guidance of other kinds, other
packing of latents, pictures to edit beside them.
"""

from __future__ import annotations

from typing import Any

import diffusers
from PIL import Image

from .cases import Kwargs, case
from .images import flux_args, flux_parts
from .parts import DIT_GAINS, image_vae, net, picture, tensor, text_args

_ENCODER = {"text_encoder": None, "tokenizer": None}
_DUAL = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}


def _flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def _embeds(name: str, batch: int, cond: int, side: int = 64) -> Kwargs:
    return text_args(name, batch, cond) | {"height": side, "width": side}


def _with_masks(name: str, batch: int, cond: int) -> Kwargs:
    args = text_args(name, batch, cond, mask=True)
    return {key: value.bool() if key.endswith("mask") else value for key, value in args.items()}


def _chroma_args(batch: int, cond: int) -> Kwargs:
    return _with_masks("chroma", batch, cond) | {"height": 64, "width": 64, "guidance_scale": 3.0}


@case("chroma", _chroma_args, more=True, needs="ChromaPipeline")
def chroma() -> Any:
    """Flux with modulations from a network of their own, and guidance in two calls."""
    return diffusers.ChromaPipeline(
        **_ENCODER,
        vae=None,
        scheduler=_flow(),
        transformer=net(
            diffusers.ChromaTransformer2DModel,
            gains=DIT_GAINS,
            in_channels=16,
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
            **_DUAL,
        ),
    )


def _flux_kontext_args(batch: int, cond: int) -> Kwargs:
    edited = picture("kontext", cond, batch, 3, 32, 32)
    return flux_args(batch, cond) | {"image": edited, "max_area": 1024, "_auto_resize": False}


@case("flux_kontext", _flux_kontext_args, more=True, needs="FluxKontextPipeline", decoded="pt")
def flux_kontext() -> Any:
    """A picture's tokens after the latents', whose outputs are cut off."""
    return diffusers.FluxKontextPipeline(**flux_parts())


def _flux_fill_args(batch: int, cond: int) -> Kwargs:
    mask = picture("fill", cond, batch, 1, 32, 32).round()
    return flux_args(batch, cond) | {
        "image": picture("filled", cond, batch, 3, 32, 32),
        "mask_image": mask,
    }


@case("flux_fill", _flux_fill_args, more=True, decoded="pt")
def flux_fill() -> Any:
    """A masked picture and its mask as further channels of every token."""
    return diffusers.FluxFillPipeline(**flux_parts(in_channels=48, out_channels=16))


def _flux2_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt_embeds": tensor("flux2", cond, batch, 8, 32),
        "height": 64,
        "width": 64,
        "guidance_scale": 3.0,
    }


def _flux2_klein_args(batch: int, cond: int) -> Kwargs:
    negative = tensor("flux2-", 0, batch, 8, 32)
    return _flux2_args(batch, cond) | {"negative_prompt_embeds": negative}


def _flux2_edit_args(batch: int, cond: int) -> Kwargs:
    pixels = (255 * picture("flux2", cond, 3, 64, 64)).byte().permute(1, 2, 0).numpy()
    return _flux2_klein_args(batch, cond) | {"image": Image.fromarray(pixels)}


def _flux2_parts(**config: Any) -> Kwargs:
    return _ENCODER | {
        "scheduler": _flow(),
        "vae": net(
            diffusers.AutoencoderKLFlux2,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        ),
        "transformer": net(
            diffusers.Flux2Transformer2DModel,
            gains=DIT_GAINS | {"modulation": 3.0, "add_v_proj": 9.0, "to_out": 3.0},
            in_channels=16,
            timestep_guidance_channels=32,
            **_DUAL | {"axes_dims_rope": (4, 4, 4, 4)},
            **config,
        ),
    }


@case("flux2", _flux2_args, more=True, needs="Flux2Pipeline")
def flux2() -> Any:
    """One call a step with the guidance as an input; one set of modulations for all blocks."""
    return diffusers.Flux2Pipeline(**_flux2_parts())


@case("flux2_klein", _flux2_klein_args, more=True, needs="Flux2KleinPipeline")
def flux2_klein() -> Any:
    """Two calls a step."""
    return diffusers.Flux2KleinPipeline(**_flux2_parts(guidance_embeds=False))


case("flux2_edit", _flux2_edit_args, more=True, needs="Flux2KleinPipeline")(flux2_klein)


def _ovis_args(batch: int, cond: int) -> Kwargs:
    return _embeds("ovis", batch, cond) | {"negative_prompt": None, "guidance_scale": 3.0}


@case("ovis_image", _ovis_args, more=True, needs="OvisImagePipeline")
def ovis_image() -> Any:
    """Two calls a step."""
    return diffusers.OvisImagePipeline(
        **_ENCODER,
        vae=None,
        scheduler=_flow(),
        transformer=net(
            diffusers.OvisImageTransformer2DModel,
            gains=DIT_GAINS,
            in_channels=16,
            out_channels=16,
            **_DUAL,
        ),
    )


def _bria_args(batch: int, cond: int) -> Kwargs:
    return _embeds("bria", batch, cond) | {"guidance_scale": 3.0}


@case("bria", _bria_args, more=True, needs="BriaPipeline")
def bria() -> Any:
    """Guidance in one batch; any scheduler of noise or flow."""
    return diffusers.BriaPipeline(
        **_ENCODER,
        vae=image_vae(),
        scheduler=_flow(use_dynamic_shifting=True),
        transformer=net(
            diffusers.BriaTransformer2DModel,
            gains=DIT_GAINS | {"add_v_proj": 20.0, "to_out": 5.0},
            in_channels=16,
            **_DUAL,
        ),
    )


def _prx_args(batch: int, cond: int) -> Kwargs:
    return _with_masks("prx", batch, cond) | {
        "height": 64,
        "width": 64,
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
    }


@case("prx", _prx_args, more=True, needs="PRXPipeline")
def prx() -> Any:
    """Guidance in one batch; the picture's tokens alone are updated."""
    return diffusers.PRXPipeline(
        **_ENCODER,
        vae=None,
        scheduler=_flow(),
        transformer=net(
            diffusers.PRXTransformer2DModel,
            gains=DIT_GAINS | {"modulation": 3.0},
            in_channels=4,
            context_in_dim=32,
            hidden_size=32,
            num_heads=2,
            depth=2,
            axes_dim=(8, 8),
        ),
    )


def _aura_args(batch: int, cond: int) -> Kwargs:
    args = text_args("aura", batch, cond, mask=True)
    return args | {"height": 32, "width": 32, "guidance_scale": 3.0}


@case("auraflow", _aura_args, more=True)
def auraflow() -> Any:
    """Guidance in one batch, sigmas without an end at 0."""
    return diffusers.AuraFlowPipeline(
        **_ENCODER,
        vae=image_vae(),
        scheduler=_flow(),
        transformer=net(
            diffusers.AuraFlowTransformer2DModel,
            gains=DIT_GAINS | {"context_embedder": 30.0, "norm1": 6.0},
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=256,
        ),
    )


def _cogview4_args(batch: int, cond: int) -> Kwargs:
    return _embeds("cogview4", batch, cond) | {"guidance_scale": 3.0}


@case("cogview4", _cogview4_args, more=True)
def cogview4() -> Any:
    """Two calls a step; the size of the picture is a condition."""
    return diffusers.CogView4Pipeline(
        **_ENCODER,
        vae=None,
        scheduler=_flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
        transformer=net(
            diffusers.CogView4Transformer2DModel,
            gains=DIT_GAINS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            text_embed_dim=32,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=16,
            rope_axes_dim=(16, 16),
        ),
    )


def _hidream_args(batch: int, cond: int) -> Kwargs:
    args: Kwargs = {"height": 64, "width": 64, "guidance_scale": 3.0}
    for side, number in (("", cond), ("negative_", 0)):
        args[f"{side}prompt_embeds_t5"] = tensor(side + "hidream", number, batch, 8, 32)
        args[f"{side}prompt_embeds_llama3"] = tensor(side + "hidreaml", number, 2, batch, 8, 16)
        args[f"{side}pooled_prompt_embeds"] = tensor(side + "hidreamp", number, batch, 64)
    return args


@case("hidream", _hidream_args, more=True)
def hidream() -> Any:
    """A mixture of experts, whose routing depends on the latents; outputs negated before step."""
    return diffusers.HiDreamImagePipeline(
        **_ENCODER,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
        text_encoder_4=None,
        tokenizer_4=None,
        vae=image_vae(),
        scheduler=_flow(),
        transformer=net(
            diffusers.HiDreamImageTransformer2DModel,
            gains=DIT_GAINS,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[32, 16],
            text_emb_dim=64,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=(0, 1),
        ),
    )
