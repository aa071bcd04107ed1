"""Stable Video Diffusion: a video from one picture.

    python workflows/diffusers/svd.py --image boat.png --devices cuda:0,cuda:1,cuda:2,cuda:3
    python workflows/diffusers/svd.py --tiny

The paper's setting is 50 steps with a warm-up of 5 (`--paper` runs its rule).
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from _common import device, generator, options, run, write_frames
from diffusers.utils import load_image
from PIL import Image

MODEL = "stabilityai/stable-video-diffusion-img2vid-xt"


def load(where: str) -> Any:
    kind = torch.float16 if where.startswith("cuda") else torch.float32
    variant = "fp16" if kind == torch.float16 else None
    pipe = diffusers.StableVideoDiffusionPipeline.from_pretrained(
        MODEL, torch_dtype=kind, variant=variant
    )
    return pipe.to(where)


def tiny() -> Any:
    """The same pipeline with random weights of a few kilobytes."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=224,
        patch_size=56,
    )
    return diffusers.StableVideoDiffusionPipeline(
        vae=diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            latent_channels=4,
            sample_size=32,
        ),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        unet=diffusers.UNetSpatioTemporalConditionModel(
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
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
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


def main() -> None:
    given = options(__doc__, steps=50, warmup=5, out="out/svd.gif", image="")
    if not given.image and not given.tiny:
        raise SystemExit("--image FILE: the picture that the video begins with")
    size = {"height": 32, "width": 32} if given.tiny else {"height": 576, "width": 1024}
    image = Image.radial_gradient("L").convert("RGB")
    if given.image:
        image = load_image(given.image)
    image = image.resize((size["width"], size["height"]))
    pipe = tiny() if given.tiny else load(device(given))

    def arguments() -> dict[str, Any]:
        frames = {"num_frames": 3} if given.tiny else {"decode_chunk_size": 8}
        call = {"image": image, "generator": generator(given), "output_type": "np"}
        return {**call, **size, **frames}

    write_frames(run(pipe, given, arguments).frames[0], given.out, fps=7)


if __name__ == "__main__":
    main()
