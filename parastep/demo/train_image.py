"""Trains the image model of `parastep.demo.image`: `python -m parastep.demo.train_image`.

The data are the 1797 handwritten digits that come with scikit-learn (8x8), enlarged to 32x32 with
clean edges, moved, turned, sheared and scaled at random, and printed in two random colours. Needs
scikit-learn beside torch and diffusers; takes about half an hour on one CPU core. Everything is
seeded, and the same machine with the same number of threads gives the same weights.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from . import common, image, training


def load_strokes() -> tuple[torch.Tensor, torch.Tensor]:
    """Ink of the digits, (1797, 1, 32, 32) in 0 to 1 with sharp edges, and their classes (1797)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    ink = torch.from_numpy(data.images).float()[:, None] / 16
    ink = functional.interpolate(ink, scale_factor=8, mode="bicubic")
    ink = functional.pad(ink, (16, 16, 16, 16))  # 96x96: the digit with a margin
    return ink, torch.from_numpy(data.target)


def transform(ink: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Digits (B, 1, 96, 96) moved, turned and scaled at random: masks (B, 1, 32, 32) in 0 to 1."""
    count = len(ink)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=rng)

    angle, shear = uniform(-0.2, 0.2), uniform(-0.15, 0.15)
    wide, tall = uniform(0.76, 0.95), uniform(0.76, 0.95)  # of the 96, so under 1 enlarges
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [
        torch.stack([cos * wide, (shear - sin) * wide, uniform(-0.1, 0.1)], 1),
        torch.stack([sin * tall, (shear * sin + cos) * tall, uniform(-0.1, 0.1)], 1),
    ]
    shape = [count, 1, 64, 64]
    where = functional.affine_grid(torch.stack(rows, 1), shape, align_corners=False)
    moved = functional.grid_sample(ink, where, align_corners=False)
    edge = torch.sigmoid((moved - uniform(0.4, 0.54)[:, None, None, None]) * 14)
    return functional.avg_pool2d(edge, 2)


def print_in_colour(mask: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Two-colour prints (B, 3, 32, 32) in -1 to 1 of masks: light ink on a deep background."""
    pairs = []
    for _ in range(len(mask)):
        hue = rng.random()
        paper = colorsys.hsv_to_rgb(hue, rng.uniform(0.65, 0.95), rng.uniform(0.3, 0.55))
        other = (hue + rng.uniform(0.3, 0.7)) % 1
        ink = colorsys.hsv_to_rgb(other, rng.uniform(0.1, 0.6), 1.0)
        pairs.append((paper, ink))
    colours = torch.tensor(pairs, dtype=torch.float32)[:, :, :, None, None]
    return (colours[:, 0] * (1 - mask) + colours[:, 1] * mask) * 2 - 1


def render(
    ink: torch.Tensor, target: torch.Tensor, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A training set: latents (count, 12, 16, 16) and their classes (count)."""
    torch_rng = torch.Generator().manual_seed(seed)
    numpy_rng = np.random.default_rng(seed)
    pick = torch.randint(len(ink), (count,), generator=torch_rng)
    chunks = [
        print_in_colour(transform(ink[part], torch_rng), numpy_rng) for part in pick.split(500)
    ]
    return functional.pixel_unshuffle(torch.cat(chunks), 2), target[pick]


def noise_loss() -> Callable[..., torch.Tensor]:
    """The loss of a noise prediction on the schedule of `image`."""
    scheduler = image.MODEL.make_scheduler("ddpm")

    def loss_of(
        model: common.Conditioned, clean: torch.Tensor, label: torch.Tensor, level: torch.Tensor
    ) -> torch.Tensor:
        times = (level * 1000).long().clamp(max=999)
        noise = torch.randn_like(clean)
        noisy = scheduler.add_noise(clean, noise, times)
        found = image.MODEL.forward(model.network, noisy, times, model.prompts[label])
        # Over alpha^2 the error of the noise is that of the velocity, even over all noise levels.
        error = (found - noise).square().mean((1, 2, 3))
        return (error / scheduler.alphas_cumprod[times].clamp(min=0.01)).mean()

    return loss_of


def main() -> None:
    what = "Train the image model of parastep's demos."
    parser = training.command_line(what, steps=4000, rate=2e-3, out=image.MODEL.weights)
    options = training.read_options(parser)
    examples = functools.partial(render, *load_strokes())
    trained = training.fit(common.Conditioned(image.MODEL), examples, noise_loss(), options)
    training.save(trained, options.out)


if __name__ == "__main__":
    main()
