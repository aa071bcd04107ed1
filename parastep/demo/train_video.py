"""Trains the video model of `parastep.demo.video`: `python -m parastep.demo.train_video`.

A clip is one of eight typical ones of each handwritten digit that comes with scikit-learn, and
drifts in one of eight directions over a ground of its own colour. Needs scikit-learn beside torch
and diffusers; takes about a quarter of an hour on one CPU core. The weights there went on from
their own first 3000 steps: `--start ... --seed 3000 --steps 1800`.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.nn import functional

from . import common, training, video
from .train_image import load_strokes

# Ground and ink, RGB from 0 to 1.
PALETTE = torch.tensor(
    [
        [[0.05, 0.10, 0.45], [1.00, 0.85, 0.20]],  # navy and gold
        [[0.80, 0.10, 0.15], [1.00, 1.00, 1.00]],  # red and white
        [[0.00, 0.40, 0.25], [1.00, 0.75, 0.80]],  # green and rose
        [[1.00, 0.80, 0.10], [0.55, 0.05, 0.35]],  # gold and plum
        [[0.95, 0.95, 0.90], [0.05, 0.25, 0.70]],  # paper and blue
        [[0.45, 0.10, 0.60], [0.35, 1.00, 0.75]],  # purple and mint
        [[0.05, 0.05, 0.08], [1.00, 0.45, 0.10]],  # black and orange
        [[0.20, 0.75, 0.90], [0.10, 0.05, 0.20]],  # sky and ink
    ]
)
PIXELS = 2 * video.SIZE
HANDS = 8  # of each class, those nearest to its mean
SCALE = 1.06  # of the digit's own frame, so over 1 makes it smaller
REACH = 0.34  # how far it drifts to either side, of half the width


def typical(ink: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The most typical digits (10, HANDS, 1, 96, 96) of each class."""
    found = []
    for each in range(len(video.MODEL.classes)):
        own = ink[target == each]
        off = (own - own.mean(0)).square().mean((1, 2, 3))
        found.append(own[off.argsort()[:HANDS]])
    return torch.stack(found)


def move(ink: torch.Tensor, heading: torch.Tensor) -> torch.Tensor:
    """Digits (B, 1, 96, 96) drifting to `heading`, 0 to 7: masks (B, 8, 24, 24), 0 to 1."""
    time = torch.linspace(-1, 1, video.FRAMES)[None]
    angle = heading[:, None] * (math.pi / 4)
    offset = -REACH * SCALE * torch.stack([angle.cos() * time, angle.sin() * time], 2)
    still = SCALE * torch.eye(2).expand(len(ink), video.FRAMES, 2, 2)
    theta = torch.cat([still, offset[..., None]], 3).flatten(0, 1)
    where = functional.affine_grid(
        theta, [len(theta), 1, 2 * PIXELS, 2 * PIXELS], align_corners=False
    )
    frames = ink.repeat_interleave(video.FRAMES, 0)
    moved = functional.grid_sample(frames, where, align_corners=False, padding_mode="border")
    edge = torch.sigmoid((moved - 0.46) * 14)
    return functional.avg_pool2d(edge, 2).view(len(ink), video.FRAMES, PIXELS, PIXELS)


@functools.cache
def digits() -> torch.Tensor:
    return typical(*load_strokes())


def examples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (count, 40, 12, 12) and their classes (count)."""
    rng = torch.Generator().manual_seed(seed)
    sizes = len(video.MODEL.classes), HANDS, 8, len(PALETTE)
    target, hand, heading, pair = (torch.randint(n, (count,), generator=rng) for n in sizes)
    made = []
    for part in torch.arange(count).split(250):
        mask = move(digits()[target[part], hand[part]], heading[part])[:, :, None]
        ground, ink = PALETTE[pair[part]][:, :, None, :, None, None].unbind(1)
        made.append(video.encode((ground * (1 - mask) + ink * mask) * 2 - 1))
    return torch.cat(made), target


def velocity_loss(
    model: common.Conditioned, clean: torch.Tensor, label: torch.Tensor, level: torch.Tensor
) -> torch.Tensor:
    """The error of v = alpha noise - sigma clean, less where there is little noise."""
    times = (level * 1000).long().clamp(max=999)
    alpha, sigma = (scale[times] for scale in video.levels())
    noise = torch.randn_like(clean)
    noisy = alpha * clean + sigma * noise
    found = video.MODEL.forward(model.network, noisy, times, model.prompts[label])
    # Times sigma^2 it is that of the clean clip; 1 / sigma^2 alone would let the least noise rule.
    weight = sigma.square() / (sigma.square() + 0.1)
    return (weight * (found - alpha * noise + sigma * clean).square()).mean()


def main() -> None:
    what = "Train the video model of parastep's demos."
    parser = training.command_line(what, steps=3000, rate=2e-3, out=video.MODEL.weights, batch=16)
    options = training.read_options(parser)
    trained = training.fit(common.Conditioned(video.MODEL), examples, velocity_loss, options)
    training.save(trained, options.out)


if __name__ == "__main__":
    main()
