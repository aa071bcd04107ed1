"""Trains the image model of `parastep.demo.image`: `python -m parastep.demo.train_image`.

The data are the 1797 handwritten digits that come with scikit-learn (8x8), enlarged to 32x32 with
clean edges, moved, turned, sheared and scaled at random, and printed in two random colours. Needs
scikit-learn beside torch and diffusers; takes about half an hour on one CPU core. Everything is
seeded, and the same machine with the same number of threads gives the same weights.
"""

from __future__ import annotations

import argparse
import colorsys
import copy
import math
import pathlib
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from . import image

Trained = TypeVar("Trained", bound=torch.nn.Module)


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


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over the first 3 %, then a cosine down to 1 % of the peak."""
    if progress < 0.03:
        return peak * progress / 0.03
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


def fit(
    model: Trained,
    loss_of: Callable[[Trained, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    options: argparse.Namespace,
) -> Trained:
    """The averaged model after `options.steps` steps of AdamW on digits.

    `loss_of(model, clean, label, level)` is the loss of one batch of latents (B, 12, 16, 16) with
    classes (B), the last one the empty prompt, at noise levels (B) that are even in 0 to 1.
    """
    ink, target = load_strokes()
    average = copy.deepcopy(model).requires_grad_(False)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01)
    empty, size = len(image.CLASSES), options.batch
    begin, total = time.perf_counter(), 0.0
    for step in range(options.steps):
        if step % 200 == 0:  # a fresh set of pictures now and then: none is seen often
            pictures, classes = render(ink, target, 200 * size, options.seed + step)
        part = slice(step % 200 * size, (step % 200 + 1) * size)
        label = classes[part].clone()
        label[torch.rand(size) < 0.12] = empty
        # Levels are spread evenly over a batch, which takes noise out of the gradient.
        level = (torch.randperm(size) + torch.rand(1)) / size
        loss = loss_of(model, pictures[part], label, level)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / options.steps, options.rate)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - keep)
        total += loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - begin
            print(f"step {step + 1}  loss {total / 100:.4f}  {seconds:.0f} s", flush=True)
            total = 0.0
        if (step + 1) % 500 == 0:
            save(average, options.out)
    return average


def noise_loss() -> Callable[..., torch.Tensor]:
    """The loss of a noise prediction on the schedule of `image`."""
    scheduler = image.make_scheduler("ddpm")

    def loss_of(
        model: image.Conditioned, clean: torch.Tensor, label: torch.Tensor, level: torch.Tensor
    ) -> torch.Tensor:
        times = (level * 1000).long().clamp(max=999)
        noise = torch.randn_like(clean)
        noisy = scheduler.add_noise(clean, noise, times)
        found = model.unet(noisy, times, model.prompts[label], return_dict=False)[0]
        # Over alpha^2 the error of the noise is that of the velocity, even over all noise levels.
        error = (found - noise).square().mean((1, 2, 3))
        return (error / scheduler.alphas_cumprod[times].clamp(min=0.01)).mean()

    return loss_of


def save(model: torch.nn.Module, out: pathlib.Path) -> None:
    """Writes the weights as float16.

    Those of the network are one vector, end to end: their names would take 1 % of the file.
    """
    tensors = dict(model.named_parameters(recurse=False))
    for name, network in model.named_children():
        tensors[name] = torch.nn.utils.parameters_to_vector(network.parameters())
    save_file({name: tensor.detach().half() for name, tensor in tensors.items()}, out)


def read_options(what: str, steps: int, rate: float, out: pathlib.Path) -> argparse.Namespace:
    """The command line of a training script, with its own defaults."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=out)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return options


def main() -> None:
    what = "Train the image model of parastep's demos."
    options = read_options(what, steps=4000, rate=2e-3, out=image.WEIGHTS)
    save(fit(image.Conditioned(), noise_loss(), options), options.out)


if __name__ == "__main__":
    main()
