"""A denoiser that waits in place of computing, in a module that worker processes can import."""

from __future__ import annotations

import time
from typing import Any

import diffusers
import torch

WAIT = 0.020  # seconds a forward


class Waiting(diffusers.SD3Transformer2DModel):
    """A transformer of StableDiffusion3Pipeline; with `launches` above 0 it runs as many operations
    on one number meanwhile, which take Python's lock as a GPU's kernels do where they are launched.
    """

    launches = 0

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        ends = time.perf_counter() + WAIT
        launch(self.launches)
        time.sleep(max(0.0, ends - time.perf_counter()))
        return (hidden_states * 0.9,)


def launch(count: int) -> None:
    number = torch.ones(())
    for _ in range(count):
        number = torch.neg(number)
