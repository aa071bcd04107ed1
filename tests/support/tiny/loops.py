"""Loops of other shapes: several steps in an iteration, or several loops in a call."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .cases import Kwargs, case
from .parts import DIT_GAINS, net, picture, text_args
from .video_flows import wan_parts


class Guardrail(diffusers.ModelMixin, diffusers.ConfigMixin):
    """Cosmos has to have one; latents are not shown to it."""

    config_name = "guardrail"

    def __init__(self) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        return True


def _cosmos_args(batch: int, cond: int) -> Kwargs:
    return text_args("cosmos", batch, cond) | {
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "guidance_scale": 3.0,
    }


def _cosmos_v2w_args(batch: int, cond: int) -> Kwargs:
    return _cosmos_args(batch, cond) | {"image": picture("cosmos", cond, 1, 3, 32, 32)}


def _cosmos_parts(**config: Any) -> Kwargs:
    return {
        "text_encoder": None,
        "tokenizer": None,
        "safety_checker": Guardrail(),
        "scheduler": diffusers.EDMEulerScheduler(
            sigma_min=0.002,
            sigma_max=80.0,
            sigma_data=0.5,
            sigma_schedule="karras",
            num_train_timesteps=1000,
            prediction_type="epsilon",
            rho=7.0,
            final_sigmas_type="sigma_min",
        ),
        "vae": net(
            diffusers.AutoencoderKLCosmos,
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=64,
            num_layers=2,
            patch_size=4,
            patch_type="haar",
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
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


@case("cosmos", _cosmos_args, needs="CosmosTextToWorldPipeline")
def cosmos() -> Any:
    """Two calls of step an iteration: the first for the clean sample alone, of both branches."""
    return diffusers.CosmosTextToWorldPipeline(**_cosmos_parts())


@case("cosmos_v2w", _cosmos_v2w_args, needs="CosmosVideoToWorldPipeline")
def cosmos_v2w() -> Any:
    """The same with a picture, which is noised anew before every call of the transformer."""
    return diffusers.CosmosVideoToWorldPipeline(**_cosmos_parts(in_channels=5))


def _skyreels_args(batch: int, cond: int) -> Kwargs:
    return text_args("skyreels", batch, cond) | {
        "prompt": None,
        "height": 16,
        "width": 16,
        "num_frames": 9,
        "base_num_frames": 9,
        "guidance_scale": 4.0,
    }


def _skyreels_long_args(batch: int, cond: int) -> Kwargs:
    return _skyreels_args(batch, cond) | {"num_frames": 17, "overlap_history": 5}


def _skyreels_in_turn_args(batch: int, cond: int) -> Kwargs:
    return _skyreels_args(batch, cond) | {"ar_step": 2, "causal_block_size": 1}


@case("skyreels_df", _skyreels_args, needs="SkyReelsV2DiffusionForcingPipeline")
def skyreels_df() -> Any:
    """A copy of the scheduler for every frame, all of which step in every iteration."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    return diffusers.SkyReelsV2DiffusionForcingPipeline(
        **wan_parts() | {"scheduler": scheduler},
        transformer=net(
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
        ),
    )


_NEEDS = "SkyReelsV2DiffusionForcingPipeline"
case("skyreels_df_long", _skyreels_long_args, needs=_NEEDS, loops=3)(skyreels_df)
case("skyreels_df_turns", _skyreels_in_turn_args, needs=_NEEDS)(skyreels_df)


def _anyflow_args(batch: int, cond: int) -> Kwargs:
    return text_args("anyflow", batch, cond) | {
        "height": 16,
        "width": 16,
        "num_frames": 9,
        "guidance_scale": 2.0,
    }


def _anyflow_transformer(cls: Any, **config: Any) -> Any:
    return net(
        cls,
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
        **config,
    )


@case("anyflow", _anyflow_args, needs="AnyFlowPipeline")
def anyflow() -> Any:
    return diffusers.AnyFlowPipeline(
        **wan_parts() | {"scheduler": diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)},
        transformer=_anyflow_transformer(diffusers.AnyFlowTransformer3DModel),
    )


@case("anyflow_far", _anyflow_args, needs="AnyFlowFARPipeline", loops=2)
def anyflow_far() -> Any:
    """A loop for each chunk of frames, and a call of the transformer after it that fills a cache
    for the next ones.
    """
    transformer = _anyflow_transformer(
        diffusers.AnyFlowFARTransformer3DModel, chunk_partition=(1, 2), full_chunk_limit=3
    )
    return diffusers.AnyFlowFARPipeline(
        **wan_parts() | {"scheduler": diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)},
        transformer=transformer,
    )
