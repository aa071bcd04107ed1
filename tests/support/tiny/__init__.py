"""Real diffusers pipelines with tiny random weights, built without a network: hosts for the tests.

Every entry of `CASES`, `MORE` and `SEVERAL` builds one pipeline class from its own components, with
weights that are the same at every build, and makes the arguments of a call. Layers that diffusers
initialises to zero are given small random weights, so that the output depends on latents, time and
conditioning.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from . import flows, images, loops, sounds, stable, video_flows, videos, worlds  # noqa: F401 (they register cases)
from .cases import CASES, MORE, SEVERAL, Case, case_of, decoder, denoisers, leaf, run
from .forwards import count_forwards
from .parts import (
    clip_processor,
    clip_text,
    clip_tokenizer,
    clip_vision,
    net,
    picture,
    sd_unet,
)
from .stable import add_ip_adapter, add_lora

__all__ = [
    "CASES",
    "MORE",
    "SEVERAL",
    "Case",
    "add_ip_adapter",
    "add_lora",
    "case_of",
    "clip_processor",
    "clip_text",
    "clip_tokenizer",
    "clip_vision",
    "count_forwards",
    "decoder",
    "denoisers",
    "leaf",
    "net",
    "picture",
    "run",
    "sd_unet",
]
