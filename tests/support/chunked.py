"""A pipeline that samples several times in one call, each time from what came out before, as those
do that make a video in chunks. In a module of its own, so that worker processes find it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline


class Net(torch.nn.Module):
    """Not linear in x, and dependent on the time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(9, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        time = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1).expand(x.shape[0], 1) / 1000
        return self.last(torch.tanh(self.first(torch.cat([x, time], 1))))


class Chunked(DiffusionPipeline):
    """Between loops it encodes the last latents and draws noise; `extra` calls the denoiser once
    more after each loop, as for a cache; `within` encodes in the first loop too.
    """

    def __init__(self, unet: Any, scheduler: Any, text_encoder: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self,
        num_inference_steps: int = 12,
        generator: Any = None,
        chunks: int = 3,
        extra: bool = False,
        within: bool = False,
    ) -> torch.Tensor:
        found, last = [], torch.zeros(1, 8)
        drawn = {"generator": generator} if isinstance(self.scheduler, DDPMScheduler) else {}
        for _ in range(chunks):
            last = self.text_encoder(last)
            self.scheduler.set_timesteps(num_inference_steps)
            x = torch.randn(1, 8, generator=generator) + 0.3 * last
            for t in self.scheduler.timesteps:
                if within:
                    self.text_encoder(x)
                m = self.unet(x, t)
                x = self.scheduler.step(m, t, x, **drawn, return_dict=False)[0]
            if extra:
                self.unet(x, 0)
            found.append(x)
            last = x
        return torch.stack(found)


def chunked(scheduler: Any) -> Chunked:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Chunked(Net(), scheduler, torch.nn.Linear(8, 8))
