"""Trains the model of `_signs`: `python tests/bench/train_signs.py`.

The data are drawn as they are needed: ten shapes, moved, turned and scaled at random, in a colour
that fades, with a rim of another, on a ground that fades too. Takes about twenty minutes on one CPU
core.
"""

from __future__ import annotations

import math

import _signs
import torch
from torch.nn import functional

from parastep.demo import common, training

FINE = 3  # samples a pixel, in each direction
EDGE = 0.03  # how far an edge is blurred, of half the picture
RIM = 0.13  # how wide the rim is


def _distance(kind: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How far (x, y) is outside of a shape of about radius 1; negative within."""
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    if kind == "disc":
        return radius - 0.9
    if kind == "ring":
        return (radius - 0.7).abs() - 0.28
    if kind == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.8
    if kind == "diamond":
        return (x.abs() * 1.5 + y.abs()) / 1.6 - 0.62
    if kind == "triangle":
        corner = torch.remainder(angle + math.pi / 2, 2 * math.pi / 3) - math.pi / 3
        return radius * torch.cos(corner) - 0.5
    if kind == "cross":
        longer, shorter = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
        return torch.maximum(longer - 0.95, shorter - 0.32)
    if kind == "star":
        point = torch.remainder(angle + math.pi / 2, 2 * math.pi / 5) - math.pi / 5
        return radius - 0.42 - 0.55 * (point.abs() * 5 / math.pi).pow(1.5)
    if kind == "crescent":
        return torch.maximum(radius - 0.95, 0.75 - torch.hypot(x - 0.45, y))
    if kind == "heart":
        left, right = torch.hypot(x + 0.42, y + 0.35), torch.hypot(x - 0.42, y + 0.35)
        lobes = torch.minimum(left, right) - 0.5
        tip = torch.maximum((x.abs() + y - 0.72) / math.sqrt(2), -0.35 - y)
        return torch.minimum(lobes, tip)
    shaft = torch.maximum(x.abs() - 0.24, (y - 0.3).abs() - 0.65)  # arrow
    head = torch.maximum((x.abs() - y - 0.95) / math.sqrt(2), y + 0.1)
    return torch.minimum(shaft, head)


def _fading(count: int, x: torch.Tensor, rng: torch.Generator, dark: bool) -> torch.Tensor:
    """Grounds (count, 3, n, n) from one colour to another, in a direction of each one's own."""
    ends = torch.rand(2, count, 3, 1, 1, generator=rng) * 0.75
    ends = ends - 1.0 if dark else ends + 0.25
    turn = 2 * math.pi * torch.rand(count, 1, 1, generator=rng)
    along = (x * torch.cos(turn) + x.T * torch.sin(turn)) / math.sqrt(2)
    weight = ((along + 1) / 2)[:, None]
    return ends[0] * (1 - weight) + ends[1] * weight


def draw(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (count, 256, 12) and their classes (count)."""
    rng = torch.Generator().manual_seed(seed)
    size = 2 * _signs.SIDE * FINE
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x = axis.expand(size, size)
    label = torch.randint(len(_signs.CLASSES), (count,), generator=rng)
    scale = 0.5 + 0.25 * torch.rand(count, 1, 1, generator=rng)
    turn = 0.5 * (torch.rand(count, 1, 1, generator=rng) - 0.5)
    move = 0.5 * (torch.rand(2, count, 1, 1, generator=rng) - 0.5)
    shifted = x - move[0], x.T - move[1]
    u = (shifted[0] * torch.cos(turn) + shifted[1] * torch.sin(turn)) / scale
    v = (shifted[1] * torch.cos(turn) - shifted[0] * torch.sin(turn)) / scale
    distance = torch.stack(
        [_distance(_signs.CLASSES[k], u[n], v[n]) for n, k in enumerate(label.tolist())]
    )
    inside = torch.sigmoid(-distance * scale / EDGE)[:, None]
    core = torch.sigmoid(-(distance + RIM) * scale / EDGE)[:, None]
    ground, fill = _fading(count, x, rng, True), _fading(count, x, rng, False)
    rim = torch.rand(count, 3, 1, 1, generator=rng) * 2 - 1
    picture = ground * (1 - inside) + rim * (inside - core) + fill * core
    return _signs.encode(functional.avg_pool2d(picture, FINE)), label


def velocity_loss(
    model: common.Conditioned, clean: torch.Tensor, label: torch.Tensor, level: torch.Tensor
) -> torch.Tensor:
    """The error of the velocity noise - clean at (1 - level) clean + level noise, at levels that
    are shifted as those of sampling are, half as far.
    """
    shift = math.sqrt(_signs.SHIFT)
    level = (shift * level / (1 + (shift - 1) * level))[:, None, None]
    noise = torch.randn_like(clean)
    noisy = torch.lerp(clean, noise, level)
    prompts, pooled = model.prompts[label], model.pooled[label]
    found = _signs.MODEL.forward(model.network, noisy, level[:, 0, 0] * 1000, prompts, pooled)
    return functional.mse_loss(found, noise - clean)


def main() -> None:
    what = "Train the model that judges: signs, a Flux transformer."
    parser = training.command_line(what, steps=3000, rate=2e-3, out=_signs.MODEL.weights, batch=16)
    options = training.read_options(parser)
    trained = training.fit(common.Conditioned(_signs.MODEL), draw, velocity_loss, options)
    training.save(trained, options.out)


if __name__ == "__main__":
    main()
