"""What the demo's runs look and sound like: a picture of all models, a GIF, WAV files."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..report import plot
from . import image, sound, video
from .runs import FEWER, OURS, RANKS, Run, shown

PAUSE = 0.12  # seconds between two words


def label(run: Run, exact: Run) -> str:
    psnr = run.psnr(exact)
    off = "" if psnr == math.inf else f", {psnr:.0f} dB"
    name = run.name if run.rule == FEWER else run.rule
    return f"{name}: {run.rounds} rounds{off}"


def pictures(run: Run) -> np.ndarray:
    """All pictures of the run side by side, (H, W, 3)."""
    return np.concatenate(list(image.to_image(run.latents)), axis=1)


def strip(run: Run) -> np.ndarray:
    """Every second frame of the first two clips side by side, (H, W, 3)."""
    frames = video.to_frames(run.latents)[:2, ::2]
    return np.concatenate(list(frames.reshape(-1, *frames.shape[2:])), axis=1)


def spectrograms(run: Run) -> np.ndarray:
    """The spectrograms side by side, low bands below, (H, W)."""
    return np.concatenate(list(run.pixels.flip(1).clamp(-1, 1).numpy()), axis=1)


def panel(axes: list[Any], title: str, runs: list[Run], draw: Callable[[Run], np.ndarray]) -> None:
    for run, axis in zip(shown(runs), axes):
        axis.imshow(draw(run), interpolation="bicubic", cmap="magma", aspect="equal")
        axis.set_axis_off()
        axis.set_title(label(run, runs[0]), loc="left", fontsize=8)
    first = f"{title}, {RANKS[-1]} ranks\n{axes[0].get_title(loc='left')}"
    axes[0].set_title(first, loc="left", fontsize=8)


def overview(found: dict[str, list[Run]], path: pathlib.Path) -> None:
    """All models side by side, a rule a row, above who evaluated which step when on 4 ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {"image": pictures, "video": strip, "sound": spectrograms}
    figure = pyplot.figure(figsize=(13, 6.4), dpi=100, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[5, 3])
    widths = {"image": 10, "video": 8, "sound": 4}
    columns = top.subfigures(1, len(found), width_ratios=[widths[name] for name in found])
    for part, (name, runs) in zip(np.atleast_1d(columns), found.items()):
        panel(list(part.subplots(len(shown(runs)), 1)), name, runs, kinds[name])
    first = next(iter(found.values()))
    timed = next(run for run in first if run.rule == OURS and run.ranks == 4)
    assert timed.report is not None
    plot.timeline(timed.report, bottom.subplots())
    figure.savefig(path)
    pyplot.close(figure)


def animation(runs: list[Run], path: pathlib.Path, scale: int = 4, gap: int = 6) -> None:
    """A GIF of the clips, a rule a row with its name above."""
    rows = [video.to_frames(run.latents) for run in shown(runs)]  # (clips, frames, H, W, 3) each
    clips, count, height, width = rows[0].shape[:4]
    height, width, line = height * scale, width * scale, 14
    sheets = []
    for frame in range(count):
        size = (clips * (width + gap) + gap, len(rows) * (height + line + gap) + gap)
        sheet = Image.new("RGB", size, (255, 255, 255))
        for row, (run, made) in enumerate(zip(shown(runs), rows)):
            top = gap + row * (height + line + gap)
            ImageDraw.Draw(sheet).text((gap, top), label(run, runs[0]), fill=(0, 0, 0))
            for clip in range(clips):
                tile = Image.fromarray(made[clip, frame])
                tile = tile.resize((width, height), Image.Resampling.BICUBIC)
                sheet.paste(tile, (gap + clip * (width + gap), top + line))
        sheets.append(sheet)
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=120, loop=0)


def voices(runs: list[Run], stem: pathlib.Path) -> list[pathlib.Path]:
    """A WAV file a rule, the words one after the other: STEM_sequential.wav and so on."""
    written = []
    for run in shown(runs):
        words = sound.to_wave(run.latents)
        silence = np.zeros((len(words), int(PAUSE * sound.RATE)), np.float32)
        path = stem.with_name(f"{stem.name}_{run.rule.replace(' ', '_')}.wav")
        sound.save_wave(np.concatenate([words, silence], axis=1).reshape(-1), path)
        written.append(path)
    return written
