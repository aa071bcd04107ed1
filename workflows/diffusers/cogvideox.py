"""CogVideoX-2b: a video from a prompt.

    python workflows/diffusers/cogvideox.py --prompt "a boat on a lake" --devices cuda:0,cuda:1
    python workflows/diffusers/cogvideox.py --tiny

The paper's setting is 50 steps with a warm-up of 13 (`--paper` runs its rule).
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from _common import device, generator, options, run, write_frames

MODEL = "THUDM/CogVideoX-2b"


def load(where: str) -> Any:
    kind = torch.float16 if where.startswith("cuda") else torch.float32
    pipe = diffusers.CogVideoXPipeline.from_pretrained(MODEL, torch_dtype=kind).to(where)
    pipe.vae.enable_tiling()
    return pipe


def tiny() -> Any:
    """The same pipeline with random weights of a few kilobytes, and without a text encoder."""
    torch.manual_seed(0)
    return diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
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
        scheduler=diffusers.CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            set_alpha_to_one=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    )


def tiny_call() -> dict[str, Any]:
    """Embeddings in place of a prompt, and a size that the tiny model can make."""
    random = torch.Generator().manual_seed(1)
    return {
        "prompt_embeds": torch.randn(1, 16, 32, generator=random),
        "negative_prompt_embeds": torch.randn(1, 16, 32, generator=random),
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "max_sequence_length": 16,
    }


def main() -> None:
    given = options(__doc__, steps=50, warmup=13, out="out/cogvideox.gif", prompt="")
    if not given.prompt and not given.tiny:
        raise SystemExit("--prompt TEXT: what the video is to show")
    pipe = tiny() if given.tiny else load(device(given))

    def arguments() -> dict[str, Any]:
        call = tiny_call() if given.tiny else {"prompt": given.prompt, "num_frames": 49}
        own = {"guidance_scale": 6.0, "generator": generator(given), "output_type": "np"}
        return {**call, **own}

    write_frames(run(pipe, given, arguments).frames[0], given.out, fps=8)


if __name__ == "__main__":
    main()
