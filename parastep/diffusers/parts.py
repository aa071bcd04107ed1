"""What a pipeline consists of: its components that denoise, those that encode, its schedulers."""

from __future__ import annotations

import re
from typing import Any

import torch

# The first of these that some component fits says what the loop calls.
_DENOISERS = (
    re.compile(r"(unet|transformer|controlnet|denoiser|dit|unconditional_transformer)"),
    re.compile(r"(decoder|generator)$"),
    re.compile(r"prior"),
)
_ENCODER = re.compile(
    r"(encoder|embed|text_model|vae|vocoder|safety|language_model|projection|connector|movq|vq|"
    r"vision|clip|tokenizer|watermark|upsampl|adapter)"
)


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The pipeline's components that are modules, by name."""
    return {k: v for k, v in vars(pipe).items() if isinstance(v, torch.nn.Module)}


def denoisers_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The modules that its loop calls: by their usual names, else all that are not encoders."""
    modules = modules_of(pipe)
    for pattern in _DENOISERS:
        found = {name: module for name, module in modules.items() if pattern.match(name)}
        if found:
            return found
    return {name: m for name, m in modules.items() if not _ENCODER.search(name)} or modules


def encoders_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Its other modules: a follower takes their outputs from the leader."""
    denoisers = denoisers_of(pipe)
    return {name: module for name, module in modules_of(pipe).items() if name not in denoisers}


def is_scheduler(value: Any) -> bool:
    return hasattr(value, "step") and not isinstance(value, torch.nn.Module)
