"""Real diffusers pipelines with tiny random weights, built without a network: hosts for the tests.

Every entry of `CASES` builds one pipeline class from its own components, with weights that are the
same at every build, and makes the arguments of a call. Layers that diffusers initialises to zero
are given small random weights, so that the output depends on latents, time and conditioning.
"""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import string
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import numpy as np
import tokenizers
import torch
import transformers
from torch import nn

Kwargs = dict[str, Any]
WORDS = ("a red cat", "blue sea at night", "old town", "green hills", "rain", "two birds")
DENOISERS = ("unet", "transformer", "transformer_2", "controlnet")

# The submodule that runs exactly once in a forward, by the first name that a component has.
_HEARTS = (
    "controlnet_mid_block",
    "conv_out",
    "proj_out",
    "norm_out",
    "visual_projection",
    "text_projection",
    "final_layer_norm",
    "encoder.final_layer_norm",
    "t_embedder",
)


@dataclass(frozen=True)
class Case:
    """One pipeline: how to build it, and the arguments of a call.

    `decoded` is the `output_type` that makes the pipeline decode, None where there is no decoder;
    `share` the part of `steps` that really runs (the strength of img2img).
    """

    name: str
    make: Callable[[], Any]
    args: Callable[[int, int], Kwargs]
    steps: int = 12
    decoded: str | None = None
    share: float = 1.0

    def build(self, *, scheduler: Any = None, dtype: torch.dtype = torch.float32) -> Any:
        """Return a new pipeline, equal in every weight to the one of any other build.

        `scheduler` is an instance, or a class made from the default scheduler's configuration.
        """
        pipe = self.make()
        if isinstance(scheduler, type):
            scheduler = scheduler.from_config(pipe.scheduler.config)
        if scheduler is not None:
            pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                part.eval()
                _mark(name, part)
        return pipe.to(dtype) if dtype != torch.float32 else pipe

    def kwargs(
        self,
        *,
        steps: int | None = None,
        seed: int = 0,
        batch: int = 1,
        cond: int = 0,
        decode: bool = False,
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> Kwargs:
        """Return the arguments of a call, with a generator and tensors of its own.

        `seed` is the generator's, `cond` chooses the conditioning (prompt, image ...), `decode`
        asks for pixels or samples in place of latents, `dtype` is that of embeddings.
        """
        if decode and self.decoded is None:
            raise ValueError(f"{self.name} has no decoder")
        kwargs = self.args(batch, cond)
        for key in [key for key in kwargs if key.endswith("embeds")]:
            value = kwargs[key]
            cast = [item.to(dtype) for item in value]
            kwargs[key] = torch.stack(cast) if torch.is_tensor(value) else cast
        kwargs["num_inference_steps"] = self.steps if steps is None else steps
        kwargs["generator"] = torch.Generator("cpu").manual_seed(seed)
        kwargs["output_type"] = self.decoded if decode else "latent"
        return kwargs | overrides


CASES: dict[str, Case] = {}


def case(
    name: str, args: Callable[[int, int], Kwargs], *, needs: str = "", **fields: Any
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register the decorated builder as the case `name`; `args(batch, cond)` makes a call.

    `needs` is a class of diffusers that older versions lack: without it there is no such case.
    """

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        if not needs or hasattr(diffusers, needs):
            CASES[name] = Case(name, make, args, **fields)
        return make

    return register


def run(pipe: Any, kwargs: Kwargs) -> torch.Tensor:
    """Call the pipe and return its result as one tensor, whatever its output class."""
    return as_tensor(pipe(**kwargs))


def as_tensor(output: Any) -> torch.Tensor:
    """Return the images, frames or sound of a pipeline's output as one tensor.

    Video with sound comes back as (B, elements of both).
    """
    if getattr(output, "audio", None) is not None:
        return torch.cat([output.frames.flatten(1), output.audio.flatten(1)], dim=1)
    for name in ("images", "frames", "videos", "audios"):
        if hasattr(output, name):
            output = getattr(output, name)
            break
    else:
        output = output[0] if isinstance(output, tuple) else output
    if isinstance(output, list):
        output = np.stack([np.asarray(item) for item in output])
    return torch.as_tensor(output)


def denoisers(pipe: Any) -> list[nn.Module]:
    """Return the modules whose forwards are the work of a step, ControlNets among them."""
    parts = (getattr(pipe, name, None) for name in DENOISERS)
    return [part for part in parts if isinstance(part, nn.Module)]


def decoder(pipe: Any) -> nn.Module:
    """Return the module that runs when latents are decoded."""
    return (getattr(pipe, "vae", None) or pipe.movq).decoder


def leaf(output: Any) -> torch.Tensor:
    """Return the first tensor of a model's output, whatever holds it."""
    while not torch.is_tensor(output):
        output = output[0]
    return output


@dataclass
class Count:
    """Forwards that really ran: of the given modules, and of these and their copies."""

    calls: list[bool] = field(default_factory=list)

    @property
    def own(self) -> int:
        return sum(self.calls)

    @property
    def everywhere(self) -> int:
        return len(self.calls)


@contextmanager
def count_forwards(*modules: nn.Module) -> Iterator[Count]:
    """Count the forwards of `modules`, and of deep copies of them, in every thread.

    What is counted is a call of an inner layer, so a `forward` that was replaced on the module
    and does not run the model counts nothing. A module of two builds of one case counts under
    `everywhere` of each other.
    """
    hearts = [_heart(module) for module in modules]
    for heart in hearts:
        heart.__dict__.setdefault("tiny_mark", f"{type(heart).__name__}-{id(heart)}")
    own = {id(heart) for heart in hearts}
    marks = {heart.__dict__["tiny_mark"] for heart in hearts}
    count = Count()

    def note(module: nn.Module, _: Any) -> None:
        if module.__dict__.get("tiny_mark") in marks:
            count.calls.append(id(module) in own)

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield count
    finally:
        handle.remove()


def _heart(module: nn.Module) -> nn.Module:
    for path in _HEARTS:
        try:
            return module.get_submodule(path)
        except AttributeError:
            continue
    return module


def _mark(name: str, part: nn.Module) -> None:
    """Name the layers to count: a deep copy keeps the name."""
    _heart(part).__dict__["tiny_mark"] = name
    for side in ("encoder", "decoder"):
        inner = getattr(part, side, None)
        if name in ("vae", "movq") and isinstance(inner, nn.Module):
            _heart(inner).__dict__["tiny_mark"] = f"{name}.{side}"


# Building blocks


def tensor(name: str, cond: int, *shape: int) -> torch.Tensor:
    """Return normal noise that depends on the name, the conditioning and the shape alone."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()) + 7919 * cond)
    return torch.randn(shape, generator=generator)


def picture(name: str, cond: int, *shape: int) -> torch.Tensor:
    """Return a smooth random picture with values in 0..1."""
    *lead, height, width = shape
    coarse = tensor(name, cond, *lead, 4, 4).reshape(-1, 1, 4, 4)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth.sigmoid().reshape(shape)


def words(batch: int, cond: int) -> list[str]:
    """Return one prompt an item of the batch."""
    return [WORDS[(cond + i) % len(WORDS)] for i in range(batch)]


def net(cls: type, *args: Any, gains: dict[str, float] | None = None, **config: Any) -> Any:
    """Return `cls(*args, **config)` in eval mode with weights that depend on nothing else.

    Weights that are all zero become random. `gains` then multiplies the weights whose name
    contains a key: plain random networks hardly listen to time and text.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = cls(*args, **config).eval()
        for name, weight in module.named_parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(std=weight[0].numel() ** -0.5)
            for key, gain in (gains or {}).items():
                if key in name and weight.ndim > 1:
                    weight.mul_(gain)
    return module


def clip_tokenizer() -> Any:
    """Return a CLIP tokenizer of single letters."""
    tokens = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return _tokenizer(transformers.CLIPTokenizer, tokens)


def _tokenizer(cls: type, tokens: list[str]) -> Any:
    """Return a byte-pair tokenizer without merges; transformers before 5 reads them from files."""
    vocab = {token: i for i, token in enumerate(tokens)}
    if "vocab" in inspect.signature(cls).parameters:
        return cls(vocab=vocab, merges=[], model_max_length=24)
    with tempfile.TemporaryDirectory() as folder:
        words, merges = pathlib.Path(folder, "vocab.json"), pathlib.Path(folder, "merges.txt")
        words.write_text(json.dumps(vocab))
        merges.write_text("#version: 0.2\n")
        return cls(str(words), str(merges), model_max_length=24)


def clip_text(tokenizer: Any, *, projection: bool = False) -> Any:
    """Return a CLIP text encoder of width 32 for the tokenizer above."""
    config = transformers.CLIPTextConfig(
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=tokenizer.model_max_length,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if projection:
        return net(transformers.CLIPTextModelWithProjection, config)
    return net(transformers.CLIPTextModel, config)


def clip_vision(cls: type = transformers.CLIPVisionModelWithProjection) -> Any:
    """Return a CLIP image encoder for 32x32 pictures, embedding width 32."""
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=32,
        patch_size=8,
        initializer_factor=10.0,
    )
    return net(cls, config)


def clip_processor() -> Any:
    """Return the image processor of the encoder above."""
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )


def image_vae(**config: Any) -> Any:
    """Return an image VAE with 4 latent channels that halves height and width."""
    return net(
        diffusers.AutoencoderKL,
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 32,
            **config,
        },
    )


_UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 32,
}
_UNET_GAINS = {"conv_out": 2.0, "time_emb_proj": 6.0, "attn2.to_v": 8.0, "attn2.to_k": 3.0}
_DIT_GAINS = {
    "norm1.linear": 3.0,
    "norm1_context.linear": 3.0,
    "adaln_single.linear": 3.0,
    ".norm.linear": 3.0,
    "text_proj": 3.0,
    "context_embedder": 3.0,
    "to_v": 2.0,
    "add_v_proj": 3.0,
    "attn2.to_v": 4.0,
}
_UNET_UP = ("CrossAttnUpBlock2D", "UpBlock2D")
_SD_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def sd_unet(**config: Any) -> Any:
    """Return a Stable Diffusion UNet for 16x16 latents."""
    return net(
        diffusers.UNet2DConditionModel,
        gains=_UNET_GAINS,
        **{
            **_UNET,
            "sample_size": 16,
            "up_block_types": _UNET_UP,
            "attention_head_dim": 8,
            **config,
        },
    )


# Stable Video Diffusion, CogVideoX, AudioLDM2


def _svd_args(batch: int, cond: int) -> Kwargs:
    return {
        "image": picture("svd", cond, batch, 3, 32, 32),
        "height": 32,
        "width": 32,
        "num_frames": 3,
        "min_guidance_scale": 1.0,
        "max_guidance_scale": 2.5,
    }


@case("svd", _svd_args, decoded="pt")
def svd() -> Any:
    """Per-frame guidance, continuous Karras noise levels, v-prediction, image encoder and VAE."""
    return diffusers.StableVideoDiffusionPipeline(
        vae=net(
            diffusers.AutoencoderKLTemporalDecoder,
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            latent_channels=4,
            sample_size=32,
        ),
        image_encoder=clip_vision(),
        unet=net(
            diffusers.UNetSpatioTemporalConditionModel,
            gains=_UNET_GAINS,
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
            **_SD_NOISE,
            prediction_type="v_prediction",
            interpolation_type="linear",
            timestep_spacing="leading",
            timestep_type="continuous",
            steps_offset=1,
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        feature_extractor=clip_processor(),
    )


def _cogvideox_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt_embeds": tensor("cog", cond, batch, 16, 32),
        "negative_prompt_embeds": tensor("cog-", 0, batch, 16, 32),
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
    }


def _cogvideox(scheduler: Any, **config: int) -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=net(
            diffusers.AutoencoderKLCogVideoX,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        transformer=net(
            diffusers.CogVideoXTransformer3DModel,
            gains=_DIT_GAINS,
            num_attention_heads=4,
            attention_head_dim=8,
            time_embed_dim=16,
            text_embed_dim=32,
            num_layers=2,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=16,
            **{"in_channels": 4, "out_channels": 4, **config},
        ),
        scheduler=scheduler,
    )


_COG_NOISE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


@case("cogvideox_ddim", _cogvideox_args, decoded="pt")
def cogvideox_ddim() -> Any:
    """One transformer call a step on unconditional and conditional latents together."""
    return _cogvideox(diffusers.CogVideoXDDIMScheduler(**_COG_NOISE))


@case("cogvideox_dpm", _cogvideox_args, decoded="pt")
def cogvideox_dpm() -> Any:
    """The stochastic solver whose step returns a pair and takes the last clean sample back."""
    return _cogvideox(diffusers.CogVideoXDPMScheduler(**_COG_NOISE))


def _cogvideox_i2v_args(batch: int, cond: int) -> Kwargs:
    return _cogvideox_args(batch, cond) | {"image": picture("cog", cond, batch, 3, 32, 32)}


@case("cogvideox_i2v", _cogvideox_i2v_args, decoded="pt")
def cogvideox_i2v() -> Any:
    """The picture's latents are further channels of the input."""
    pipe = _cogvideox(diffusers.CogVideoXDDIMScheduler(**_COG_NOISE), in_channels=8, out_channels=4)
    return diffusers.CogVideoXImageToVideoPipeline(**pipe.components)


def _audioldm2_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt_embeds": tensor("t5", cond, batch, 7, 32),
        "negative_prompt_embeds": tensor("t5-", 0, batch, 7, 32),
        "generated_prompt_embeds": tensor("gpt", cond, batch, 8, 16),
        "negative_generated_prompt_embeds": tensor("gpt-", 0, batch, 8, 16),
        "audio_length_in_s": 0.008,
        "guidance_scale": 3.5,
    }


def _audioldm2_text_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt": words(batch, cond),
        "negative_prompt": ["grey"] * batch,
        "max_new_tokens": 4,
        "audio_length_in_s": 0.008,
        "guidance_scale": 3.5,
    }


def _t5() -> Any:
    sizes = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_heads": 4, "num_layers": 1}
    return net(transformers.T5EncoderModel, transformers.T5Config(vocab_size=64, **sizes))


def _unigrams(specials: list[str], letters: list[str]) -> Any:
    """Return a T5 tokenizer of single letters, the unknown one the last of the specials."""
    vocab = [(token, 0.0) for token in specials] + [(letter, -2.0) for letter in letters]
    if "vocab" in inspect.signature(transformers.T5Tokenizer).parameters:
        return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=24)
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=len(specials) - 1))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    end = ("</s>", specials.index("</s>"))
    model.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[end])
    return transformers.T5TokenizerFast(tokenizer_object=model, extra_ids=0, model_max_length=24)


def _audioldm2_text_parts() -> Kwargs:
    """Return what turns a prompt into embeddings: CLAP, T5, a projection, and GPT-2 with them."""
    letters = list(string.ascii_lowercase)
    byte_space = "\u0120"  # how byte-level tokenizers write a space
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    roberta = _tokenizer(transformers.RobertaTokenizer, [*specials, byte_space, *letters])
    t5 = _unigrams(["<pad>", "</s>", "<unk>"], ["▁", *letters])
    clap = transformers.ClapConfig(
        text_config={
            "vocab_size": len(roberta),
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 37,
            "max_position_embeddings": 32,
            "projection_dim": 16,
        },
        audio_config={
            "spec_size": 8,
            "window_size": 4,
            "num_mel_bins": 8,
            "patch_embeds_hidden_size": 8,
            "hidden_size": 16,
            "depths": [1, 1],
            "num_attention_heads": [1, 1],
            "num_hidden_layers": 2,
            "projection_dim": 16,
        },
        projection_dim=16,
    )
    return {
        "text_encoder": net(transformers.ClapModel, clap, gains={"text_": 4.0}),
        "tokenizer": roberta,
        "tokenizer_2": t5,
        "projection_model": net(
            diffusers.AudioLDM2ProjectionModel,
            text_encoder_dim=16,
            text_encoder_1_dim=32,
            langauge_model_dim=16,
        ),
    }


def _audioldm2(**parts: Any) -> Any:
    gpt = transformers.GPT2Config(
        vocab_size=64,
        n_embd=16,
        n_head=2,
        n_layer=1,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
        initializer_range=0.2,
    )
    return diffusers.AudioLDM2Pipeline(
        vae=image_vae(in_channels=1, out_channels=1),
        text_encoder_2=_t5(),
        language_model=net(transformers.GPT2LMHeadModel, gpt),
        feature_extractor=None,
        unet=net(
            diffusers.AudioLDM2UNet2DConditionModel,
            gains=_UNET_GAINS,
            **{
                **_UNET,
                "sample_size": 16,
                "up_block_types": _UNET_UP,
                "attention_head_dim": 8,
                "cross_attention_dim": ((None, 16, 32), (None, 16, 32)),
            },
        ),
        scheduler=diffusers.DDIMScheduler(
            **_SD_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        vocoder=net(transformers.SpeechT5HifiGan, vocoder),
        **parts,
    )


@case("audioldm2", _audioldm2_args, decoded="pt")
def audioldm2() -> Any:
    """A UNet with two text streams; its pipeline has neither step callback nor interrupt."""
    return _audioldm2(text_encoder=None, tokenizer=None, tokenizer_2=None, projection_model=None)


@case("audioldm2_text", _audioldm2_text_args, decoded="pt")
def audioldm2_text() -> Any:
    """As `audioldm2`, from a prompt: CLAP, T5 and a language model called once a new token."""
    return _audioldm2(**_audioldm2_text_parts())


# Flow models: Stable Diffusion 3, Flux


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
            gains=_DIT_GAINS,
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


def _flux_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt_embeds": tensor("flux", cond, batch, 12, 32),
        "pooled_prompt_embeds": tensor("fluxp", cond, batch, 32),
        "height": 32,
        "width": 32,
        "guidance_scale": 3.5,
    }


def _flux_cfg_args(batch: int, cond: int) -> Kwargs:
    return _flux_args(batch, cond) | {
        "negative_prompt_embeds": tensor("flux-", 0, batch, 12, 32),
        "negative_pooled_prompt_embeds": tensor("fluxp-", 0, batch, 32),
        "true_cfg_scale": 3.0,
    }


@case("flux", _flux_args, decoded="pt")
def flux() -> Any:
    """Packed latents (B, tokens, 16), one call a step with the guidance as an input."""
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_image_seq_len=64, max_image_seq_len=256
        ),
        vae=image_vae(
            scaling_factor=0.36, shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=net(
            diffusers.FluxTransformer2DModel,
            gains=_DIT_GAINS,
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
    )


# True guidance: two calls a step, one an item of conditioning.
case("flux_cfg", _flux_cfg_args, decoded="pt")(flux)


# Latte


def _latte_args(batch: int, cond: int) -> Kwargs:
    return {
        "negative_prompt": None,
        "prompt_embeds": tensor("latte", cond, batch, 8, 32),
        "negative_prompt_embeds": tensor("latte-", 0, batch, 8, 32),
        "height": 16,
        "width": 16,
        "video_length": 2,
        "guidance_scale": 4.0,
        "clean_caption": False,
    }


@case("latte", _latte_args, decoded="pt")
def latte() -> Any:
    """The transformer gives 2C channels for latents of C: the learned variance is dropped."""
    return diffusers.LattePipeline(
        tokenizer=None,
        text_encoder=None,
        vae=image_vae(),
        transformer=net(
            diffusers.LatteTransformer3DModel,
            gains=_DIT_GAINS,
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=32,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=32,
            video_length=2,
        ),
        scheduler=_sd_scheduler(),
    )


# Stable Diffusion and SDXL, with text encoders of their own


def _sd_args(batch: int, cond: int) -> Kwargs:
    return {
        "prompt": words(batch, cond),
        "negative_prompt": ["grey"] * batch,
        "height": 32,
        "width": 32,
        "guidance_scale": 5.0,
    }


def _sd_scheduler() -> Any:
    return diffusers.DDIMScheduler(
        **_SD_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def _sd_parts() -> Kwargs:
    tokenizer = clip_tokenizer()
    return {
        "vae": image_vae(),
        "text_encoder": clip_text(tokenizer),
        "tokenizer": tokenizer,
        "unet": sd_unet(),
        "scheduler": _sd_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@case("sd", _sd_args, decoded="pt")
def sd() -> Any:
    """Stable Diffusion: text is encoded and images decoded; any scheduler fits."""
    return diffusers.StableDiffusionPipeline(**_sd_parts())


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
            **_SD_NOISE, timestep_spacing="leading", steps_offset=1
        ),
        "add_watermarker": False,
    }


@case("sdxl", _sd_args, decoded="pt")
def sdxl() -> Any:
    """SDXL: two text encoders, pooled embeddings and sizes as added conditions."""
    return diffusers.StableDiffusionXLPipeline(**_sdxl_parts())


# Stable Diffusion with an image, a mask, a ControlNet, an IP-adapter, a LoRA


def _img2img_args(batch: int, cond: int) -> Kwargs:
    args = _sd_args(batch, cond) | {
        "image": picture("img2img", cond, batch, 3, 32, 32),
        "strength": 0.75,
    }
    del args["height"], args["width"]
    return args


@case("sd_img2img", _img2img_args, steps=16, share=0.75, decoded="pt")
def sd_img2img() -> Any:
    """The loop begins at a quarter of the timesteps, from an encoded picture with noise."""
    return diffusers.StableDiffusionImg2ImgPipeline(**_sd_parts())


@case("sdxl_img2img", _img2img_args, steps=16, share=0.75, decoded="pt")
def sdxl_img2img() -> Any:
    """As `sd_img2img`, with noise levels found by `begin_index`."""
    return diffusers.StableDiffusionXLImg2ImgPipeline(**_sdxl_parts())


def _inpaint_args(batch: int, cond: int) -> Kwargs:
    mask = torch.zeros(batch, 1, 32, 32)
    mask[..., 8:28, 4:20] = 1.0
    return _sd_args(batch, cond) | {
        "image": picture("inpaint", cond, batch, 3, 32, 32),
        "mask_image": mask,
        "strength": 1.0,
    }


@case("sd_inpaint", _inpaint_args, decoded="pt")
def sd_inpaint() -> Any:
    """Four input channels: after every step the latents outside the mask are replaced."""
    return diffusers.StableDiffusionInpaintPipeline(**_sd_parts())


@case("sd_inpaint9", _inpaint_args, decoded="pt")
def sd_inpaint9() -> Any:
    """Nine input channels: mask and masked picture are inputs, the latents stay the loop's own."""
    parts = _sd_parts() | {"unet": sd_unet(in_channels=9)}
    return diffusers.StableDiffusionInpaintPipeline(**parts)


def _controlnet_args(batch: int, cond: int) -> Kwargs:
    return _sd_args(batch, cond) | {"image": picture("control", cond, batch, 3, 32, 32)}


@case("sd_controlnet", _controlnet_args, decoded="pt")
def sd_controlnet() -> Any:
    """A ControlNet runs before the UNet in every step."""
    controlnet = net(
        diffusers.ControlNetModel,
        gains={**_UNET_GAINS, "controlnet_down": 0.3, "controlnet_cond": 2.0},
        **_UNET,
        attention_head_dim=8,
        conditioning_embedding_out_channels=(8, 16),
    )
    return diffusers.StableDiffusionControlNetPipeline(**_sd_parts(), controlnet=controlnet)


def _ip_adapter_args(batch: int, cond: int) -> Kwargs:
    return _sd_args(batch, cond) | {"ip_adapter_image": picture("ip", cond, batch, 3, 32, 32)}


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
    parts = _sd_parts() | {
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


@case("sd_lora", _sd_args, decoded="pt")
def sd_lora() -> Any:
    """Stable Diffusion with a LoRA loaded."""
    pipe = sd()
    add_lora(pipe)
    return pipe


# Video transformers


def _text_args(name: str, batch: int, cond: int, *, mask: bool = False, length: int = 8) -> Kwargs:
    args: Kwargs = {}
    for side, number in (("", cond), ("negative_", 0)):
        args[f"{side}prompt_embeds"] = tensor(side + name, number, batch, length, 32)
        if mask:
            ones = torch.ones(batch, length, dtype=torch.long)
            args[f"{side}prompt_attention_mask"] = ones
    return args


def _wan_args(batch: int, cond: int) -> Kwargs:
    return _text_args("wan", batch, cond) | {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "guidance_scale": 4.0,
    }


def _wan_transformer(gain: float = 1.0, **config: Any) -> Any:
    return net(
        diffusers.WanTransformer3DModel,
        gains=_DIT_GAINS | {"proj_out": gain},
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


def _wan_parts() -> Kwargs:
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


@case("wan", _wan_args, decoded="pt")
def wan() -> Any:
    """Wan 2.1: two calls a step, latents in fp32."""
    return diffusers.WanPipeline(**_wan_parts(), transformer=_wan_transformer())


@case("wan22", _wan_args, decoded="pt")
def wan22() -> Any:
    """Wan 2.2 A14B: a second transformer below the boundary."""
    models = {"transformer": _wan_transformer(), "transformer_2": _wan_transformer(1.2)}
    return diffusers.WanPipeline(**_wan_parts(), **models, boundary_ratio=0.875)


@case("wan22_5b", _wan_args, decoded="pt")
def wan22_5b() -> Any:
    """Wan 2.2 5B: a timestep for every token."""
    parts = _wan_parts() | {"transformer": _wan_transformer()}
    return diffusers.WanPipeline(**parts, expand_timesteps=True)


def _wan_i2v_args(batch: int, cond: int) -> Kwargs:
    return _wan_args(batch, cond) | {"image": picture("wan", cond, 1, 3, 32, 32)}


@case("wan_i2v", _wan_i2v_args, decoded="pt")
def wan_i2v() -> Any:
    """Wan 2.1 from a picture: its latents as further channels, its embeddings beside the text."""
    parts = _wan_parts() | {
        "image_encoder": clip_vision(transformers.CLIPVisionModel),
        "image_processor": clip_processor(),
        "transformer": _wan_transformer(in_channels=12, image_dim=32, added_kv_proj_dim=24),
    }
    return diffusers.WanImageToVideoPipeline(**parts)


@case("wan22_i2v", _wan_i2v_args, decoded="pt")
def wan22_i2v() -> Any:
    """Wan 2.2 A14B from a picture: two transformers."""
    models = {
        "transformer": _wan_transformer(in_channels=12),
        "transformer_2": _wan_transformer(1.2, in_channels=12),
    }
    return diffusers.WanImageToVideoPipeline(**_wan_parts(), **models, boundary_ratio=0.875)


@case("wan22_5b_i2v", _wan_i2v_args, decoded="pt")
def wan22_5b_i2v() -> Any:
    """Wan 2.2 5B from a picture: the input's first frame is the picture's, the latents' is not."""
    parts = _wan_parts() | {"transformer": _wan_transformer()}
    return diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)


def _hunyuanvideo_args(batch: int, cond: int) -> Kwargs:
    args = _text_args("hunyuan", batch, cond, mask=True)
    return {key: value for key, value in args.items() if "negative" not in key} | {
        "pooled_prompt_embeds": tensor("hunyuanp", cond, batch, 8),
        "height": 32,
        "width": 32,
        "num_frames": 5,
    }


def _hunyuanvideo_cfg_args(batch: int, cond: int) -> Kwargs:
    args = _hunyuanvideo_args(batch, cond) | _text_args("hunyuan", batch, cond, mask=True)
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
            gains=_DIT_GAINS,
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
            gains=_DIT_GAINS,
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
    return _text_args("ltx", batch, cond, mask=True) | {
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
            gains=_DIT_GAINS,
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
    args = _text_args("mochi", batch, cond, mask=True)
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
            gains=_DIT_GAINS,
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


def _allegro_args(batch: int, cond: int) -> Kwargs:
    return _text_args("allegro", batch, cond, mask=True) | {
        "negative_prompt": None,
        "height": 32,
        "width": 32,
        "num_frames": 8,
        "guidance_scale": 4.0,
        "clean_caption": False,
    }


@case("allegro", _allegro_args)
def allegro() -> Any:
    """Any diffusion scheduler on a video transformer, one call a step."""
    return diffusers.AllegroPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**_SD_NOISE),
        transformer=net(
            diffusers.AllegroTransformer3DModel,
            gains=_DIT_GAINS,
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            cross_attention_dim=48,
            caption_channels=32,
            sample_width=4,
            sample_height=4,
            sample_frames=2,
        ),
    )


def _animatediff_args(batch: int, cond: int) -> Kwargs:
    return _sd_args(batch, cond) | {"num_frames": 3}


@case("animatediff", _animatediff_args, decoded="pt")
def animatediff() -> Any:
    """A UNet with motion modules, frames in one batch."""
    adapter = net(
        diffusers.MotionAdapter,
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=4,
    )
    parts = _sd_parts()
    del parts["safety_checker"], parts["requires_safety_checker"]
    return diffusers.AnimateDiffPipeline(**parts, motion_adapter=adapter)


# Image transformers


def _qwenimage_args(batch: int, cond: int) -> Kwargs:
    args = _text_args("qwen", batch, cond, mask=True)
    args = {key.replace("attention_mask", "embeds_mask"): args[key] for key in args}
    return args | {"height": 64, "width": 64, "true_cfg_scale": 3.0}


def _qwenimage_parts() -> Kwargs:
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.02, time_shift_type="exponential"
        ),
        "vae": None,
        "text_encoder": None,
        "tokenizer": None,
        "transformer": net(
            diffusers.QwenImageTransformer2DModel,
            gains=_DIT_GAINS,
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


@case("qwenimage", _qwenimage_args)
def qwenimage() -> Any:
    """Two calls a step, the guided output rescaled to the norm of the conditional one."""
    return diffusers.QwenImagePipeline(**_qwenimage_parts())


def _qwenimage_img2img_args(batch: int, cond: int) -> Kwargs:
    image = picture("qwen", cond, batch, 3, 64, 64)
    return _qwenimage_args(batch, cond) | {"image": image, "strength": 0.75}


@case("qwenimage_img2img", _qwenimage_img2img_args, steps=16, share=0.75, decoded="pt")
def qwenimage_img2img() -> Any:
    """From a picture with noise, over the later part of the timesteps."""
    vae = net(
        diffusers.AutoencoderKLQwenImage,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return diffusers.QwenImageImg2ImgPipeline(**_qwenimage_parts() | {"vae": vae})


def _pixart_args(batch: int, cond: int) -> Kwargs:
    return _text_args("pixart", batch, cond, mask=True) | {
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
        scheduler=diffusers.DPMSolverMultistepScheduler(**_SD_NOISE),
        transformer=net(
            diffusers.PixArtTransformer2DModel,
            gains=_DIT_GAINS,
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
    return _text_args("sana", batch, cond, mask=True) | {
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
            gains=_DIT_GAINS,
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
    args = _text_args("lumina", batch, cond, mask=True)
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
            gains=_DIT_GAINS,
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


# Kandinsky 2.2, Stable Audio, LTX-2


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
            gains=_UNET_GAINS,
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
    return _kandinsky(_sd_scheduler())


@case("kandinsky_ddpm", _kandinsky_args, decoded="pt")
def kandinsky_ddpm() -> Any:
    """As `kandinsky` with DDPM: step gets 2C channels for latents of C, and draws noise."""
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, variance_type="learned_range", clip_sample=False
    )
    return _kandinsky(scheduler)


def _stable_audio_args(batch: int, cond: int) -> Kwargs:
    return _text_args("audio", batch, cond) | {
        "audio_end_in_s": 2.0,
        "guidance_scale": 4.0,
    }


@case("stable_audio", _stable_audio_args, decoded="pt")
def stable_audio() -> Any:
    """Long one-dimensional latents; no callback on steps, no interrupt."""
    return diffusers.StableAudioPipeline(
        vae=net(
            diffusers.AutoencoderOobleck,
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            channel_multiples=[2, 4],
            decoder_channels=3,
            decoder_input_channels=4,
            audio_channels=2,
            sampling_rate=16,
        ),
        text_encoder=_t5(),
        projection_model=net(
            diffusers.StableAudioProjectionModel,
            text_encoder_dim=32,
            conditioning_dim=32,
            min_value=0,
            max_value=32,
        ),
        tokenizer=None,
        transformer=net(
            diffusers.StableAudioDiTModel,
            gains=_DIT_GAINS,
            sample_size=32,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            cross_attention_dim=32,
            cross_attention_input_dim=32,
            time_proj_dim=16,
            global_states_input_dim=64,
        ),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_min=0.3, sigma_max=500.0
        ),
    )


def _ltx2_args(batch: int, cond: int) -> Kwargs:
    args = _text_args("ltx2", batch, cond, mask=True)
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


@case("ltx2", _ltx2_args, needs="LTX2Pipeline")
def ltx2() -> Any:
    """Video and sound: two schedulers step in every iteration, one of them a deep copy."""
    return diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=net(
            diffusers.AutoencoderKLLTX2Video,
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatial_compression_ratio=8,
            temporal_compression_ratio=8,
        ),
        audio_vae=net(
            diffusers.AutoencoderKLLTX2Audio,
            base_channels=8,
            ch_mult=(1, 1, 1),
            num_res_blocks=1,
            latent_channels=2,
            mel_bins=16,
            resolution=32,
        ),
        text_encoder=None,
        tokenizer=None,
        vocoder=None,
        connectors=net(
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
        transformer=net(
            diffusers.LTX2VideoTransformer3DModel,
            gains=_DIT_GAINS,
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
    )
