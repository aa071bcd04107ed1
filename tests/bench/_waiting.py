"""Denoisers that wait in place of computing, in a module that worker processes can import."""

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


class ByItem:
    """A denoiser that waits `wait` seconds for each item of its batch, and gives what depends on
    the item and on its conditioning, as guidance needs it. `halved`: its output has half of the
    channels of its input, which are dimension `halved`.
    """

    wait, halved = 0.1, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = kwargs.get("hidden_states", kwargs.get("sample", args[0] if args else None))
        words = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        assert x is not None and words is not None
        time.sleep(self.wait * len(x))
        shift = words.float().mean(dim=tuple(range(1, words.dim())))
        output = 0.3 * x + 0.01 * shift.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        if self.halved:
            output = output.narrow(self.halved, 0, output.shape[self.halved] // 2)
        return (output,)


class WaitingUNet(ByItem, diffusers.UNet2DConditionModel):
    """Of StableDiffusionPipeline."""


class WaitingFrames(ByItem, diffusers.UNetSpatioTemporalConditionModel):
    """Of StableVideoDiffusionPipeline: the picture's latents are further channels."""

    halved = 2


class WaitingWan(ByItem, diffusers.WanTransformer3DModel):
    """Of WanPipeline, which calls it twice a step."""


class WaitingQwen(ByItem, diffusers.QwenImageTransformer2DModel):
    """Of QwenImagePipeline, which calls it twice a step."""


def launch(count: int) -> None:
    number = torch.ones(())
    for _ in range(count):
        number = torch.neg(number)
