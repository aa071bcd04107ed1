"""Loops of pipelines written by hand that can all be carried in full, in every shape they take."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffusers
import torch
from written import ALPHAS, SHAPE, Form, Net, begin, euler, flow, plain, written


@dataclass
class Out:
    sample: torch.Tensor
    extra: Any = None


class Pair(NamedTuple):
    sample: torch.Tensor
    rest: list[torch.Tensor]


def tuple_step(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.progress_bar(pipe.scheduler.timesteps):
        x, clean = pipe.scheduler.step(pipe.denoiser(x, t), t, x, return_dict=False)
        assert clean.shape == x.shape
    return x


def keywords(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        m = pipe.denoiser(t=t, x=x)
        x = pipe.scheduler.step(sample=x, model_output=m, timestep=t, generator=generator)[0]
    return x


def scaled(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        given = pipe.scheduler.scale_model_input(torch.cat([x] * 2), t)
        a, b = pipe.denoiser(given, t).chunk(2)
        x = pipe.scheduler.step(a + 2.0 * (b - 0.9 * a), t, x).prev_sample
    return x


def scaled_by_hand(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """The denoiser is shown something that is not the latent."""
    x = begin(pipe, steps, generator)
    for i, t in enumerate(pipe.scheduler.timesteps):
        sigma = pipe.scheduler.sigmas[i]
        pipe.scheduler.is_scale_input_called = True
        m = pipe.denoiser(x / (sigma**2 + 1) ** 0.5, t)
        x = pipe.scheduler.step(m, t, x).prev_sample
    return x


def two_calls(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        with_text, without = pipe.denoiser(x, t), pipe.denoiser(x, t * 0 + 500)
        x = pipe.scheduler.step(without + 2.0 * (with_text - without), t, x)[0]
    return x


def varying_calls(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """Guidance in the middle of the run alone."""
    x = begin(pipe, steps, generator)
    for i, t in enumerate(pipe.scheduler.timesteps):
        m = pipe.denoiser(x, t)
        if 2 < i < 6:
            m = m + 0.5 * (m - pipe.denoiser(x[:1], t * 0 + 500))
        x = pipe.scheduler.step(m, t, x)[0]
    return x


def item_by_item(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        m = torch.cat([pipe.denoiser(item[None], t) for item in x])
        x = pipe.scheduler.step(m, t, x)[0]
    return x


def cast(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator).to(torch.bfloat16)
    for t in pipe.scheduler.timesteps:
        m = pipe.denoiser(x, t).float()
        x = pipe.scheduler.step(m, t, x.float())[0].to(torch.bfloat16)
    return x


def cast_after_the_first_step(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.denoiser(x.bfloat16(), t), t, x)[0].bfloat16()
    return x


def in_double(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator).double()
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
    return x


def edited_after(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """Inpainting: a part of the latents is put back after every step."""
    x = begin(pipe, steps, generator)
    noise, kept = torch.randn(SHAPE, generator=generator), torch.ones(SHAPE)
    mask = torch.zeros(SHAPE)
    mask[..., 2:6] = 1
    times = pipe.scheduler.timesteps
    for i, t in enumerate(times):
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
        if i + 1 < len(times):
            x = mask * x + (1 - mask) * pipe.scheduler.add_noise(kept, noise, times[i + 1 : i + 2])
    return x


def edited_in_place(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """One tensor for the whole loop, and a part of it kept."""
    x = begin(pipe, steps, generator)
    first = x[:, :1].clone()
    for t in pipe.scheduler.timesteps:
        x[:] = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
        x[:, :1] = 0.9 * x[:, :1] + 0.1 * first
    return x


def result_edited_in_place(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
        x.mul_(0.97)
    return x


def shrunk_before(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """The step's sample is not what the step before returned."""
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        x = 0.98 * x
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
    return x


def noised_before(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        x = x + 0.01 * torch.randn(SHAPE, generator=generator)
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
    return x


def part_stepped(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """The first row is a condition: the denoiser sees all, step gets the rest."""
    x = begin(pipe, steps, generator)
    first = x[..., :1, :]
    for t in pipe.scheduler.timesteps:
        m = pipe.denoiser(x, t)[..., 1:, :]
        x = torch.cat([first, pipe.scheduler.step(m, t, x[..., 1:, :])[0]], dim=-2)
    return x


def patches(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """The denoiser sees tokens, step the picture."""
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        tokens = x.flatten(2).transpose(1, 2)
        m = pipe.denoiser(tokens.transpose(1, 2), t).reshape(SHAPE)
        x = pipe.scheduler.step(m, t, x)[0]
    return x


def more_channels(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x, given = begin(pipe, steps, generator), torch.ones(SHAPE)
    for t in pipe.scheduler.timesteps:
        m = pipe.denoiser(torch.cat([x, given], dim=1), t)[:, :4]
        x = pipe.scheduler.step(m, t, x)[0]
    return x


def condition_first(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x, given = begin(pipe, steps, generator), torch.ones(SHAPE)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.denoiser(given, x, t), t, x)[0]
    return x


def negated(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        m = -pipe.denoiser(x, 1000 - t)
        x = pipe.scheduler.step(-m * m.norm() / (m.norm() + 1e-3), t, x)[0]
    return x


def one_dimension(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator, (4,))
    for t in pipe.scheduler.timesteps:
        m = pipe.denoiser(x[None], t)[0]
        x = pipe.scheduler.step(m, t, x)[0]
    return x


def not_contiguous(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator).transpose(2, 3)
    for t in pipe.scheduler.timesteps:
        m = pipe.denoiser(x, t).transpose(2, 3).contiguous().transpose(2, 3)
        x = pipe.scheduler.step(m, t, x)[0]
    return x


def unwrapped(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        m = pipe.denoiser(x, t)
        m = m["sample"] if isinstance(m, dict) else m.sample if hasattr(m, "sample") else m[0]
        x = pipe.scheduler.step(m, t, x)[0]
    return x


def direct_forward(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.denoiser.forward(x, t), t, x)[0]
    return x


class Bare(diffusers.DDIMScheduler):
    """A scheduler whose step returns a tensor."""

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:  # type: ignore[override]
        return super().step(model_output, timestep, sample).prev_sample


class Foreign(diffusers.DDIMScheduler):
    """A scheduler with names of its own for the arguments of step."""

    def step(self, eps: Any, when: Any, x: Any) -> Any:  # type: ignore[override]
        return super().step(eps, when, x)


class PassesOn(diffusers.DDIMScheduler):
    def step(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.count = getattr(self, "count", 0) + 1
        return super().step(*args, **kwargs)


def counted(pipe: Any) -> Any:
    """The pipe, with a function of the user's own in place of its scheduler's step."""
    original, pipe.scheduler.stepped = pipe.scheduler.step, []

    def step(*args: Any, **kwargs: Any) -> Any:
        pipe.scheduler.stepped.append(args)
        return original(*args, **kwargs)

    pipe.scheduler.step = step
    return pipe


def bare(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)
    return x


def plain_list(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
    return x


class Conditioned(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, given: torch.Tensor, x: torch.Tensor, t: Any) -> torch.Tensor:
        return self.inner(x, t) + 0.1 * given


class Euler:
    """No class of diffusers' at all; its timesteps are a list."""

    init_noise_sigma = 1.0

    def set_timesteps(self, count: int) -> None:
        self.timesteps = [1000 * (1 - k / count) for k in range(count)]
        self.count = count

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        return (sample - model_output / self.count,)


FULL: dict[str, Callable[[], Any]] = {
    "plain": lambda: written(plain),
    "flow": lambda: written(plain, scheduler=flow()),
    "tuple": lambda: written(tuple_step),
    "keywords": lambda: written(keywords),
    "scaled": lambda: written(scaled, scheduler=euler()),
    "scaled by hand": lambda: written(scaled_by_hand, scheduler=euler()),
    "two calls": lambda: written(two_calls),
    "varying calls": lambda: written(varying_calls),
    "item by item": lambda: written(item_by_item),
    "cast": lambda: written(cast),
    "cast after the first": lambda: written(cast_after_the_first_step, scheduler=flow()),
    "double": lambda: written(in_double),
    "edited after": lambda: written(edited_after),
    "edited in place": lambda: written(edited_in_place),
    "result edited in place": lambda: written(result_edited_in_place),
    "shrunk before": lambda: written(shrunk_before),
    "noised before": lambda: written(noised_before),
    "part stepped": lambda: written(part_stepped),
    "patches": lambda: written(patches),
    "more channels": lambda: written(more_channels, Net(8)),
    "condition first": lambda: written(condition_first, Conditioned()),
    "negated": lambda: written(negated),
    "one dimension": lambda: written(one_dimension),
    "not contiguous": lambda: written(not_contiguous),
    "dataclass": lambda: written(unwrapped, Form(lambda m: Out(m, [m]))),
    "named tuple": lambda: written(unwrapped, Form(lambda m: Pair(m, [m, m]))),
    "namespace": lambda: written(unwrapped, Form(lambda m: types.SimpleNamespace(sample=m))),
    "dict": lambda: written(unwrapped, Form(lambda m: {"sample": m, "none": None})),
    "list": lambda: written(unwrapped, Form(lambda m: [m])),
    "forward": lambda: written(direct_forward),
    "own names": lambda: written(plain, scheduler=Foreign(**ALPHAS, clip_sample=False)),
    "passes on": lambda: written(plain, scheduler=PassesOn(**ALPHAS, clip_sample=False)),
    "step replaced": lambda: counted(written(plain)),
    "own scheduler": lambda: written(plain_list, scheduler=Euler()),
    "bare": lambda: written(bare, scheduler=Bare(**ALPHAS, clip_sample=False)),
}
