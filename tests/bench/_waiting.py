"""A denoiser that waits in place of computing, in a module that worker processes can import."""

from __future__ import annotations

import time
from typing import Any

import diffusers
import torch

WAIT = 0.020  # seconds a forward


class Waiting(diffusers.SD3Transformer2DModel):
    """A transformer of StableDiffusion3Pipeline."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        time.sleep(WAIT)
        return (hidden_states * 0.9,)
