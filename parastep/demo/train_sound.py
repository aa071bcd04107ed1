"""Trains the sound model of `parastep.demo.sound`: `python -m parastep.demo.train_sound`.

The data are the words "zero" to "nine" as the speech synthesiser eSpeak NG says them, in many
voices, accents, pitches and speeds. Needs the program `espeak-ng` beside torch and diffusers; takes
about a quarter of an hour on one CPU core.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import wave

import numpy as np
import torch
from torch.nn import functional

from . import common, sound, training

ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland")
VOICES = ("m1", "m2", "m3", "m4", "m5", "m7", "f1", "f2", "f3", "f4")
RECORDINGS = 2000
ROOM = 8  # frames of silence at most before a word begins


def say(word: str, accent: str, voice: str, pitch: int, speed: int) -> np.ndarray:
    """The word as samples in -1 to 1 at 22050 Hz, without the silence around it."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise SystemExit(
            "train_sound needs the speech synthesiser eSpeak NG: install `espeak-ng` "
            "(Debian, Ubuntu: apt install espeak-ng)"
        )
    voice_of = ["-v", f"{accent}+{voice}", "-p", str(pitch), "-s", str(speed)]
    spoken = subprocess.run([program, *voice_of, "--stdout", word], check=True, capture_output=True)
    with wave.open(io.BytesIO(spoken.stdout)) as file:
        if file.getframerate() != sound.RATE:
            raise SystemExit(f"espeak-ng speaks at {file.getframerate()} Hz, not {sound.RATE}")
        samples = np.frombuffer(file.readframes(1 << 30), "<i2").astype(np.float32) / 32768
    heard = np.flatnonzero(np.abs(samples) > 0.01)
    return samples[heard[0] : heard[-1] + 1]


def record(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Spectrograms (count, 1, 64, 64 + ROOM) with the word ROOM frames in, and their classes."""
    rng = np.random.default_rng(seed)
    longest = sound.HOP * (sound.SIZE + sound.SIZE)
    sounds, classes = (
        np.zeros((count, longest), np.float32),
        np.arange(count) % len(sound.MODEL.classes),
    )
    for row, target in zip(sounds, classes):
        samples = say(
            sound.MODEL.classes[target],
            str(rng.choice(ACCENTS)),
            str(rng.choice(VOICES)),
            int(rng.integers(25, 76)),
            int(rng.integers(125, 181)),
        )
        samples = 0.5 * samples / np.abs(samples).max()
        begin = ROOM * sound.HOP
        samples = samples[: longest - begin]
        row[begin : begin + len(samples)] = samples
    made = [sound.from_wave(part) for part in np.split(sounds, range(200, count, 200))]
    return torch.from_numpy(np.concatenate(made)[..., : sound.SIZE + ROOM]), torch.from_numpy(
        classes
    )


class Examples:
    """Recordings, each a little earlier or later and louder or softer every time it is taken."""

    def __init__(self, count: int = RECORDINGS, seed: int = 0) -> None:
        self.spectra, self.classes = record(count, seed)

    def __call__(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = torch.Generator().manual_seed(seed)
        pick = torch.randint(len(self.spectra), (count,), generator=rng)
        begin = torch.randint(1, ROOM + 1, (count,), generator=rng)
        gain = 0.08 * (2 * torch.rand(count, generator=rng) - 1)
        frames = begin[:, None] + torch.arange(sound.SIZE)
        index = frames[:, None, None].expand(-1, 1, sound.SIZE, -1)
        clean = torch.gather(self.spectra[pick], 3, index)
        louder = (clean + gain[:, None, None, None]).clamp(-1, 1)
        return torch.where(clean > -1, louder, clean), self.classes[pick]


def velocity_loss(
    model: common.Conditioned, clean: torch.Tensor, label: torch.Tensor, level: torch.Tensor
) -> torch.Tensor:
    """The error of the velocity noise - clean at (1 - level) clean + level noise."""
    noise = torch.randn_like(clean)
    noisy = torch.lerp(clean, noise, level[:, None, None, None])
    prompts, pooled = model.prompts[label], model.pooled[label]
    found = sound.MODEL.forward(model.network, noisy, level * 1000, prompts, pooled)
    return functional.mse_loss(found, noise - clean)


def main() -> None:
    what = "Train the sound model of parastep's demos."
    parser = training.command_line(what, steps=2000, rate=2e-3, out=sound.MODEL.weights, batch=16)
    options = training.read_options(parser)
    trained = training.fit(common.Conditioned(sound.MODEL), Examples(), velocity_loss, options)
    training.save(trained, options.out)


if __name__ == "__main__":
    main()
