"""Sound: AudioLDM2 with and without its text encoders, Stable Audio."""

from __future__ import annotations

import inspect
import string
from typing import Any

import diffusers
import tokenizers
import transformers

from .cases import Kwargs, case
from .parts import (
    DIT_GAINS,
    SD_NOISE,
    UNET,
    UNET_GAINS,
    UNET_UP,
    byte_pairs,
    image_vae,
    net,
    t5,
    tensor,
    text_args,
    words,
)


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
    roberta = byte_pairs(transformers.RobertaTokenizer, [*specials, byte_space, *letters])
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
        "tokenizer_2": _unigrams(["<pad>", "</s>", "<unk>"], ["▁", *letters]),
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
        text_encoder_2=t5(),
        language_model=net(transformers.GPT2LMHeadModel, gpt),
        feature_extractor=None,
        unet=net(
            diffusers.AudioLDM2UNet2DConditionModel,
            gains=UNET_GAINS,
            **{
                **UNET,
                "sample_size": 16,
                "up_block_types": UNET_UP,
                "attention_head_dim": 8,
                "cross_attention_dim": ((None, 16, 32), (None, 16, 32)),
            },
        ),
        scheduler=diffusers.DDIMScheduler(
            **SD_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
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


def _stable_audio_args(batch: int, cond: int) -> Kwargs:
    return text_args("audio", batch, cond) | {
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
        text_encoder=t5(),
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
            gains=DIT_GAINS,
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
