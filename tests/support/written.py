"""Pipelines written by hand: a loop, a small denoiser and a scheduler of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

N = 9
SHAPE = (2, 4, 8, 8)
ALPHAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def mixed(x: torch.Tensor, t: Any, weight: torch.Tensor) -> torch.Tensor:
    """A small denoiser: it listens to latent, time and weights, and has no state."""
    t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1)) / 1000
    return torch.tanh(0.3 * x + torch.einsum("ij,bj...->bi...", weight.to(x.dtype), x) + t)


class Net(torch.nn.Module):
    """Tensor in, tensor out."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(channels, channels, generator=generator) / 4)
        self.calls = torch.nn.Identity()  # counts the forwards that ran

    def forward(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        return self.calls(mixed(x, t, self.weight))


class Form(torch.nn.Module):
    """The denoiser above, with its output in another container."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any], channels: int = 4) -> None:
        super().__init__()
        self.inner, self.wrap = Net(channels), wrap

    def forward(self, x: torch.Tensor, t: Any, **kwargs: Any) -> Any:
        return self.wrap(self.inner(x, t))


def begin(pipe: Any, steps: int, generator: Any, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(shape, generator=generator)
    return x * getattr(pipe.scheduler, "init_noise_sigma", 1.0)


Loop = Callable[..., torch.Tensor]


class Written(diffusers.DiffusionPipeline):
    """A pipeline around a loop; the component is called `denoiser`."""

    loop: Loop

    def __init__(self, denoiser: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = N, generator: Any = None) -> torch.Tensor:
        return type(self).loop(self, num_inference_steps, generator)


def ddim(**config: Any) -> Any:
    return diffusers.DDIMScheduler(**ALPHAS, clip_sample=False, steps_offset=1, **config)


def euler() -> Any:
    return diffusers.EulerDiscreteScheduler(**ALPHAS)


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def written(loop: Loop, denoiser: Any = None, scheduler: Any = None, **extra: Any) -> Any:
    kind = type("Written", (Written,), {"loop": loop})
    pipe = kind(denoiser or Net(), scheduler or ddim())
    pipe.set_progress_bar_config(disable=True)
    for name, value in extra.items():
        setattr(pipe, name, value)
    return pipe.eval() if hasattr(pipe, "eval") else pipe


def plain(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x).prev_sample
    return x


class Encoder(torch.nn.Module):
    """What its output does not tell is what `inner` says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(8, 4), torch.nn.Linear(4, 2)

    def forward(self, words: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.outer(self.inner(words) * scale)


class Listener(Written):
    """Conditioned by what a part of its encoder says, and by what that gives in the end."""

    def __init__(self, denoiser: Any, text_encoder: Any, scheduler: Any) -> None:
        super().__init__(denoiser, scheduler)
        self.register_modules(text_encoder=text_encoder)

    def encode(self, words: torch.Tensor) -> torch.Tensor:
        seen: dict[str, Any] = {}
        encoder = self.text_encoder
        handles = [
            encoder.inner.register_forward_hook(lambda part, args, out: seen.update(raw=out)),
            encoder.register_forward_hook(
                lambda part, args, kwargs, out: seen.update(end=out * kwargs["scale"]),
                with_kwargs=True,
            ),
        ]
        try:
            encoder(words, scale=0.5)
        finally:
            for handle in handles:
                handle.remove()
        return seen["raw"].mean() + seen["end"].mean()

    @torch.no_grad()
    def __call__(
        self, words: torch.Tensor, num_inference_steps: int = N, generator: Any = None
    ) -> torch.Tensor:
        shift = self.encode(words)
        x = begin(self, num_inference_steps, generator)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.denoiser(x + shift, t), t, x, return_dict=False)[0]
        return x


def listener() -> Listener:
    return Listener(Net(), Encoder(), ddim())
