"""AudioLDM2-large: ten seconds of sound from a prompt.

    python workflows/diffusers/audioldm2.py --prompt "rain on a tin roof" --devices cuda:0,cuda:1
    python workflows/diffusers/audioldm2.py --tiny

The paper's setting is 200 steps with a warm-up of 5 (`--paper` runs its rule).
"""

from __future__ import annotations

import pathlib
import wave
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from _common import device, generator, options, run

MODEL = "cvssp/audioldm2-large"
RATE = 16000  # samples a second


def load(where: str) -> Any:
    kind = torch.float16 if where.startswith("cuda") else torch.float32
    return diffusers.AudioLDM2Pipeline.from_pretrained(MODEL, torch_dtype=kind).to(where)


def tiny() -> Any:
    """The same pipeline with random weights of a few kilobytes, and without what reads a prompt."""
    torch.manual_seed(0)
    text = transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=1
    )
    language = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_head=2, n_layer=1, n_positions=64, bos_token_id=0
    )
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=RATE,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
        initializer_range=0.2,
    )
    return diffusers.AudioLDM2Pipeline(
        vae=diffusers.AutoencoderKL(
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        ),
        text_encoder=None,
        text_encoder_2=transformers.T5EncoderModel(text),
        projection_model=None,
        language_model=transformers.GPT2LMHeadModel(language),
        tokenizer=None,
        tokenizer_2=None,
        feature_extractor=None,
        unet=diffusers.AudioLDM2UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            cross_attention_dim=((None, 16, 32), (None, 16, 32)),
        ),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        vocoder=transformers.SpeechT5HifiGan(vocoder),
    )


def tiny_call() -> dict[str, Any]:
    """Embeddings in place of a prompt, and a length that takes the tiny model no time."""
    random = torch.Generator().manual_seed(1)
    shapes = {"prompt_embeds": (1, 7, 32), "generated_prompt_embeds": (1, 8, 16)}
    call: dict[str, Any] = {"audio_length_in_s": 0.01}
    for name, shape in shapes.items():
        call[name] = torch.randn(shape, generator=random)
        call[f"negative_{name}"] = torch.randn(shape, generator=random)
    return call


def write_sound(samples: np.ndarray, path: str) -> None:
    """Samples from -1 to 1 as a WAV file of 16 bits."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with wave.open(path, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    print(f"written: {path}")


def main() -> None:
    given = options(__doc__, steps=200, warmup=5, out="out/audioldm2.wav", prompt="")
    if not given.prompt and not given.tiny:
        raise SystemExit("--prompt TEXT: what is to be heard")
    pipe = tiny() if given.tiny else load(device(given))

    def arguments() -> dict[str, Any]:
        real = {"prompt": given.prompt, "negative_prompt": "Low quality.", "audio_length_in_s": 10}
        call = tiny_call() if given.tiny else real
        return {**call, "guidance_scale": 3.5, "generator": generator(given)}

    write_sound(run(pipe, given, arguments).audios[0], given.out)


if __name__ == "__main__":
    main()
