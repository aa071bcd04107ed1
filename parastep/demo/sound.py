"""A small trained sound model in a real pipeline class, for demos, tests and the fidelity bench.

Class-conditional flow matching of spoken digits: log-mel spectrograms of "zero" to "nine" as a
speech synthesiser says them, 64 bands by 64 frames of 11.6 ms. It predicts the velocity noise -
clean and is sampled with classifier-free guidance. There is no autoencoder: a latent is the
spectrogram itself, (1, 64, 64), in -1 to 1, and `to_wave` makes a sound of it. The weights beside
this file were made by `python -m parastep.demo.train_sound`.
"""

from __future__ import annotations

import functools
import math
import pathlib
import wave
from typing import Any

import diffusers
import numpy as np
import torch

from . import common

SIZE = 64  # mel bands, and frames
TOKENS, WIDTH = 4, 32  # the "prompt" of a class; its pooled vector is as wide
RATE, HOP, WINDOW = 22050, 256, 1024  # samples a second, from frame to frame, and in a frame
LOWEST, HIGHEST = 60.0, 8000.0  # Hz, the edges of the mel bands
QUIET, LOUD = -4.5, 1.5  # log10 of the mel magnitudes that are -1 and 1

MULTISTEP: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def _network() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=4,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=20,
        joint_attention_dim=WIDTH,
        caption_projection_dim=80,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=SIZE // 4,
        qk_norm="rms_norm",
    )


def _pipeline(network: Any, scheduler: Any) -> Any:
    nothing = dict.fromkeys(
        ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
        + ["text_encoder_3", "tokenizer_3"]
    )
    return diffusers.StableDiffusion3Pipeline(transformer=network, scheduler=scheduler, **nothing)


def _forward(
    network: Any, x: torch.Tensor, times: torch.Tensor, prompts: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    return network(
        hidden_states=x,
        timestep=times,
        encoder_hidden_states=prompts,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


def decode(latents: torch.Tensor) -> torch.Tensor:
    """The spectrograms (B, 64, 64) of latents (B, 1, 64, 64)."""
    return latents[:, 0]


MODEL = common.Model(
    weights=pathlib.Path(__file__).with_name("sound.safetensors"),
    classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    shape=(1, SIZE, SIZE),
    guidance=3.0,
    network=_network,
    forward=_forward,
    pipeline=_pipeline,
    decode=decode,
    prompts={
        "prompts": ("prompt_embeds", (TOKENS, WIDTH)),
        "pooled": ("pooled_prompt_embeds", (WIDTH,)),
    },
    schedulers={
        "euler": ("FlowMatchEulerDiscreteScheduler", {}),
        "heun": ("FlowMatchHeunDiscreteScheduler", {}),
        "dpmpp2m": ("DPMSolverMultistepScheduler", MULTISTEP),
        "unipc": ("UniPCMultistepScheduler", MULTISTEP),
    },
    call={"height": 8 * SIZE, "width": 8 * SIZE},
)


@functools.cache
def mel_bands() -> np.ndarray:
    """Triangles (64, WINDOW / 2 + 1) that are even on the mel scale and of equal weight."""
    first, last = (2595 * math.log10(1 + hertz / 700) for hertz in (LOWEST, HIGHEST))
    corners = 700 * (10 ** (np.linspace(first, last, SIZE + 2) / 2595) - 1)
    bins = np.arange(WINDOW // 2 + 1) * RATE / WINDOW
    low, middle, high = (corners[k : k + SIZE, None] for k in range(3))
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return triangles / np.maximum(triangles.sum(1, keepdims=True), 1e-9)


def spectrum(sound: torch.Tensor) -> torch.Tensor:
    """The complex short-time spectrum (..., WINDOW / 2 + 1, frames) of samples (..., count)."""
    window = torch.hann_window(WINDOW)
    return torch.stft(sound, WINDOW, HOP, window=window, return_complex=True)


def from_wave(sound: np.ndarray) -> np.ndarray:
    """Spectrograms (B, 1, 64, frames) in -1 to 1 of sounds (B, samples) in -1 to 1."""
    magnitude = spectrum(torch.as_tensor(sound, dtype=torch.float32)).abs().numpy()
    level = np.log10(np.maximum(mel_bands() @ magnitude, 10**QUIET))
    scaled = (level - QUIET) / (LOUD - QUIET) * 2 - 1
    return scaled[:, None].clip(-1, 1).astype(np.float32)


def _magnitude(latents: np.ndarray) -> np.ndarray:
    """Spectra (B, WINDOW / 2 + 1, frames) whose mel bands are the spectrograms', none negative.

    Multiplicative updates of the least-squares problem: nothing becomes negative, and what no
    band covers stays 0.
    """
    bands = mel_bands()
    scaled = (latents[:, 0].clip(-1, 1).astype(np.float64) + 1) / 2
    mel = 10 ** (QUIET + scaled * (LOUD - QUIET)) - 10**QUIET
    found = bands.T @ mel
    for _ in range(60):
        found *= (bands.T @ mel) / np.maximum(bands.T @ (bands @ found), 1e-12)
    return found


def to_wave(latents: torch.Tensor | np.ndarray, rounds: int = 60, seed: int = 0) -> np.ndarray:
    """Sounds (B, samples), float32 in -1 to 1, of spectrograms (B, 1, 64, 64) by Griffin-Lim.

    Phases start at random from the seed, and each round takes those of the sound that comes nearest
    (Griffin and Lim 1984, with the momentum of Perraudin et al. 2013).
    """
    magnitude = torch.from_numpy(_magnitude(np.asarray(torch.as_tensor(latents).cpu()))).float()
    rng = torch.Generator().manual_seed(seed)
    angle = 2 * torch.pi * torch.rand(magnitude.shape, generator=rng)
    phases, before = torch.polar(torch.ones_like(magnitude), angle), torch.zeros(())
    window, length = torch.hann_window(WINDOW), HOP * (magnitude.shape[-1] - 1)
    for _ in range(rounds):
        sound = torch.istft(magnitude * phases, WINDOW, HOP, window=window, length=length)
        rebuilt = spectrum(sound)
        phases = rebuilt + 0.99 * (rebuilt - before)
        phases, before = phases / phases.abs().clamp(min=1e-9), rebuilt
    sound = torch.istft(magnitude * phases, WINDOW, HOP, window=window, length=length).numpy()
    return sound / np.maximum(np.abs(sound).max(-1, keepdims=True), 1.0)


def save_wave(sound: np.ndarray, path: pathlib.Path) -> None:
    """Writes samples (count) in -1 to 1 as a mono WAV file of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((sound.clip(-1, 1) * 32767).astype("<i2").tobytes())
