"""How the demos' models are trained: one loop, one file format, one command line for all."""

from __future__ import annotations

import argparse
import copy
import math
import pathlib
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file

Trained = TypeVar("Trained", bound=torch.nn.Module)
REFRESH = 200  # steps between two fresh sets of examples: none is seen often


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over the first 3 %, then a cosine down to 1 % of the peak."""
    if progress < 0.03:
        return peak * progress / 0.03
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


def fit(
    model: Trained,
    examples: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
    loss_of: Callable[[Trained, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    options: argparse.Namespace,
) -> Trained:
    """The averaged model after `options.steps` steps of AdamW.

    `examples(count, seed)` makes latents (count, ...) and their classes (count).
    `loss_of(model, clean, label, level)` is the loss of one batch of them, one label in eight
    replaced by the empty prompt, at noise levels (B) that are even in 0 to 1. The model's `prompts`
    has a row for each class and a last one that is empty.
    """
    if options.start is not None:
        restore(model, options.start)
    average = copy.deepcopy(model).requires_grad_(False)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01)
    empty, size = len(model.prompts) - 1, options.batch
    begin, total = time.perf_counter(), 0.0
    for step in range(options.steps):
        if step % REFRESH == 0:
            clean, classes = examples(REFRESH * size, options.seed + step)
        part = slice(step % REFRESH * size, (step % REFRESH + 1) * size)
        label = classes[part].clone()
        label[torch.rand(size) < 0.12] = empty
        # Levels are spread evenly over a batch, which takes noise out of the gradient.
        level = (torch.randperm(size) + torch.rand(1)) / size
        loss = loss_of(model, clean[part], label, level)
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


def save(model: torch.nn.Module, out: pathlib.Path) -> None:
    """Writes the weights as float16.

    Those of the network are one vector, end to end: their names would take 1 % of the file.
    """
    tensors = dict(model.named_parameters(recurse=False))
    for name, network in model.named_children():
        tensors[name] = torch.nn.utils.parameters_to_vector(network.parameters())
    save_file({name: tensor.detach().half() for name, tensor in tensors.items()}, out)


def restore(model: torch.nn.Module, weights: pathlib.Path) -> None:
    """The inverse of `save`."""
    stored = load_file(weights)
    for name, network in model.named_children():
        torch.nn.utils.vector_to_parameters(stored[name].float(), network.parameters())
    with torch.no_grad():
        for name, table in model.named_parameters(recurse=False):
            table.copy_(stored[name])


def command_line(
    what: str, steps: int, rate: float, out: pathlib.Path, batch: int = 32
) -> argparse.ArgumentParser:
    """The options of a training script, with its own defaults."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=out)
    parser.add_argument("--start", type=pathlib.Path, help="weights to go on from")
    return parser


def read_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options that were given, with torch's threads and seed set to them."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return options
