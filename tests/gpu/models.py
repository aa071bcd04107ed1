"""`end_to_end` of `make gpu`: the paper's three systems as their users run them, on one device.

The pipelines are diffusers' own, denoisers have the published configurations and random weights in
half precision, embeddings are given and latents come back, so that nothing but the loop is timed.
Random weights need not let steps be left out as trained ones do: beside `balanced` there is a run
whose stride is 2 whatever the tolerance, about the share of rounds that trained models take.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from PIL import Image

import parastep


class System(NamedTuple):
    """A pipeline, its call's arguments, and its steps here. Its denoiser is made on the device; the
    rest is small, and schedulers compute with NumPy.
    """

    pipe: Any
    arguments: dict[str, Any]
    steps: int


def _random(home: str, kind: torch.dtype) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, generator=generator).to(home, kind)


def audioldm2(home: str, kind: torch.dtype, small: bool) -> System:
    """Ten seconds: latents of 250 x 16."""
    sizes: dict[str, Any] = {
        "block_out_channels": (128, 256, 384, 640),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        "cross_attention_dim": ((None, 768, 1024, None),) * 4,
        "transformer_layers_per_block": 2,
    }
    if small:
        sizes = {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": ((None, 768, 1024, None),) * 2,
            "norm_num_groups": 8,
            "layers_per_block": 1,
        }
    with torch.device(home):
        unet = diffusers.AudioLDM2UNet2DConditionModel(
            in_channels=8, out_channels=8, attention_head_dim=8, **sizes
        )
    # Their sizes are all that the loop looks at: frames of 64 bands, 4 to a latent's row.
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=64, upsample_initial_channel=8, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]], normalize_before=False,
    )  # fmt: skip
    text = transformers.T5Config(vocab_size=8, d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1)
    language = transformers.GPT2Config(
        vocab_size=8, n_embd=8, n_head=2, n_layer=1, n_positions=8, bos_token_id=0
    )
    pipe = diffusers.AudioLDM2Pipeline(
        vae=diffusers.AutoencoderKL(
            in_channels=1, out_channels=1, block_out_channels=(8,) * 3, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=8,
        ),
        text_encoder=None, text_encoder_2=transformers.T5EncoderModel(text),
        projection_model=None, language_model=transformers.GPT2LMHeadModel(language),
        tokenizer=None, tokenizer_2=None, feature_extractor=None, unet=unet,
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        vocoder=transformers.SpeechT5HifiGan(vocoder),
    )  # fmt: skip
    random = _random(home, kind)
    frames = 40 if small else 1000  # of the vocoder, which makes 4 samples of each
    call: dict[str, Any] = {"audio_length_in_s": frames * 4 / 16000, "guidance_scale": 3.5}
    for sign in ("", "negative_"):
        call[f"{sign}prompt_embeds"] = random(1, 16, 1024)
        call[f"{sign}generated_prompt_embeds"] = random(1, 8, 768)
        call[f"{sign}attention_mask"] = torch.ones(1, 16, dtype=torch.long, device=home)
    return System(pipe, call, 50)


def cogvideox(home: str, kind: torch.dtype, small: bool) -> System:
    """49 frames of 480 x 720: latents of 13 x 60 x 90."""
    sizes: dict[str, Any] = {}
    size, width = {"height": 480, "width": 720, "num_frames": 49}, 4096
    if small:
        sizes = {
            "num_attention_heads": 4, "attention_head_dim": 8, "time_embed_dim": 16,
            "num_layers": 2, "text_embed_dim": 32, "max_text_seq_length": 226,
            "sample_width": 4, "sample_height": 4, "sample_frames": 9,
        }  # fmt: skip
        size, width = {"height": 32, "width": 32, "num_frames": 9}, 32
    with torch.device(home):
        transformer = diffusers.CogVideoXTransformer3DModel(**sizes)
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None,
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=16, layers_per_block=1,
            norm_num_groups=2, temporal_compression_ratio=4,
        ),
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
            prediction_type="v_prediction", rescale_betas_zero_snr=True, set_alpha_to_one=True,
            snr_shift_scale=3.0, timestep_spacing="trailing", clip_sample=False,
        ),
    )  # fmt: skip
    random = _random(home, kind)
    call = {f"{sign}prompt_embeds": random(1, 226, width) for sign in ("", "negative_")}
    return System(pipe, {**call, **size, "guidance_scale": 6.0}, 20)


def svd_xt(home: str, kind: torch.dtype, small: bool) -> System:
    """25 frames of 576 x 1024: latents of 72 x 128."""
    sizes: dict[str, Any] = {
        "num_frames": 25, "num_attention_heads": (5, 10, 20, 20), "sample_size": 96,
    }  # fmt: skip
    frames, rows, columns = 25, 72, 128
    if small:
        sizes = {
            "num_frames": 3, "num_attention_heads": (2, 4), "sample_size": 16,
            "block_out_channels": (32, 64), "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        }  # fmt: skip
        frames, rows, columns = 3, 8, 8
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, projection_dim=1024, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=1, image_size=224, patch_size=56,
    )  # fmt: skip
    with torch.device(home):
        unet = diffusers.UNetSpatioTemporalConditionModel(**sizes)
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
            latent_channels=4, sample_size=32,
        ),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
            prediction_type="v_prediction", interpolation_type="linear",
            timestep_spacing="leading", timestep_type="continuous", steps_offset=1,
            use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
        ),
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
        ),
    )  # fmt: skip
    image = Image.radial_gradient("L").convert("RGB").resize((2 * columns, 2 * rows))
    call = {"image": image, "height": 2 * rows, "width": 2 * columns, "num_frames": frames}
    return System(pipe, call, 20)


SYSTEMS = {
    "AudioLDM2-large": audioldm2,
    "CogVideoX-2b": cogvideox,
    "Stable Video Diffusion XT": svd_xt,
}
# Seconds of the part's that each may take: a way that would not be through by then is left out.
SHARES = {"AudioLDM2-large": 40.0, "CogVideoX-2b": 105.0, "Stable Video Diffusion XT": 75.0}
_LONG = 4.0  # seconds of a call that is not made twice


def ways(home: str) -> dict[str, dict[str, Any]]:
    """How one device is used; the names are the rows'."""
    return {
        "balanced": {"devices": [home]},
        "every second step": {"devices": [home], "tolerance": float("inf"), "max_stride": 2},
        "a batch of 2": {"devices": [home] * 2, "slots": "batch", "max_stride": 1},
        "2 ranks in threads": {"devices": [home] * 2, "max_stride": 1},
        "a pair": {"devices": [(home, home)], "max_stride": 1},
    }


def measure(
    show: Callable[..., None],
    timed_call: Callable[[Callable[[], Any]], float],
    home: str,
    dry: bool,
) -> None:
    failed = []
    for name, make in SYSTEMS.items():
        try:
            _measure(name, make, show, timed_call, home, dry)
        except Exception as error:  # one that does not fit leaves the others
            failed.append(f"{name}: {type(error).__name__}: {error}")
        _reset(dry)
    if failed:
        raise SystemExit("\n".join(failed))


def made(make: Any, home: str, dry: bool) -> System:
    """On its device, in half precision: random weights may be too much for float16's range."""
    for kind in (torch.float32,) if dry else (torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        system: System = make(home, kind, dry)
        system.pipe.to(home, kind)
        system.pipe.set_progress_bar_config(disable=True)
        if bool(torch.isfinite(torch.as_tensor(_call(system, system.pipe, 2)[0])).all()):
            break
    return system


def _call(system: System, which: Any, steps: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return which(**system.arguments, num_inference_steps=steps, generator=generator,
                 output_type="latent")  # fmt: skip


def _measure(
    name: str, make: Any, show: Callable[..., None], timed_call: Any, home: str, dry: bool
) -> None:
    until = time.monotonic() + SHARES[name]
    system = made(make, home, dry)
    pipe, steps = system.pipe, 16 if dry else system.steps
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    row = {"model": name, "dtype": str(denoiser.dtype), "steps": steps}

    def call(which: Any, steps: int = steps) -> Any:
        return _call(system, which, steps)

    _reset(dry)
    alone = timed_call(lambda: call(pipe))
    show(**row, way="sequential", seconds=alone, ms_a_step=1e3 * alone / steps, **_peak(dry))
    long = alone > _LONG
    for way, options in ways(home).items():
        if not dry and time.monotonic() + (1.3 if long else 2.5) * alone > until:
            show(**row, way=way, not_there="no time left")
            continue
        _reset(dry)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                parallel = parastep.parallelize(pipe, **options)
            except (parastep.Error, TypeError) as error:
                show(**row, way=way, not_there=str(error))
                continue
            with parallel:
                before = 3 if long else steps  # replicas are made, and plans
                first = timed_call(lambda parallel=parallel, k=before: call(parallel, k))
                seconds = timed_call(lambda parallel=parallel: call(parallel))
        report = parallel.report
        over = 1e3 * (seconds - report.rounds * alone / steps) / steps
        show(**row, way=way, seconds=seconds, first_seconds=first, first_steps=before,
             of_sequential=seconds / alone, rounds=report.rounds, forwards=report.forwards,
             unbatched=report.unbatched, shared=sum(team.shared for team in report.teams),
             ms_over_rounds_a_step=over, failures=[line.text for line in report.failures],
             fallback=report.fallback, **_peak(dry))  # fmt: skip


def _reset(dry: bool) -> None:
    if not dry:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(dry: bool) -> dict[str, float]:
    return {} if dry else {"peak_GiB": torch.cuda.max_memory_allocated() / 2**30}
