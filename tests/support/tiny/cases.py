"""The registry: what a tiny pipeline is, how it is built, called and looked into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from torch import nn

from .forwards import mark

Kwargs = dict[str, Any]
DENOISERS = ("unet", "transformer", "transformer_2", "controlnet")


@dataclass(frozen=True)
class Case:
    """One pipeline: how to build it, and the arguments of a call.

    `decoded` is the `output_type` that makes the pipeline decode, None where there is no decoder;
    `share` the part of `steps` that really runs (the strength of img2img); `loops` how many
    sampling loops a call has, of `steps` each; `more` says that its loop is of a form that other
    cases have.
    """

    name: str
    make: Callable[[], Any]
    args: Callable[[int, int], Kwargs]
    steps: int = 12
    decoded: str | None = None
    share: float = 1.0
    loops: int = 1
    more: bool = False

    def build(self, *, scheduler: Any = None, dtype: torch.dtype = torch.float32) -> Any:
        """Return a new pipeline, equal in every weight to the one of any other build.

        `scheduler` is an instance, or a class made from the default scheduler's configuration.
        """
        pipe = self.make()
        if isinstance(scheduler, type):
            scheduler = scheduler.from_config(pipe.scheduler.config)
        if scheduler is not None:
            pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                part.eval()
                mark(name, part)
        return pipe.to(dtype) if dtype != torch.float32 else pipe

    def kwargs(
        self,
        *,
        steps: int | None = None,
        seed: int = 0,
        batch: int = 1,
        cond: int = 0,
        decode: bool = False,
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> Kwargs:
        """Return the arguments of a call, with a generator and tensors of its own.

        `seed` is the generator's, `cond` chooses the conditioning (prompt, image ...), `decode`
        asks for pixels or samples in place of latents, `dtype` is that of embeddings.
        """
        if decode and self.decoded is None:
            raise ValueError(f"{self.name} has no decoder")
        kwargs = self.args(batch, cond)
        for key in [key for key in kwargs if key.endswith("embeds")]:
            value = kwargs[key]
            cast = [item.to(dtype) for item in value]
            kwargs[key] = torch.stack(cast) if torch.is_tensor(value) else cast
        kwargs["num_inference_steps"] = self.steps if steps is None else steps
        kwargs["generator"] = torch.Generator("cpu").manual_seed(seed)
        kwargs["output_type"] = self.decoded if decode else "latent"
        return kwargs | overrides


CASES: dict[str, Case] = {}  # of one sampling loop, which most tests run all of
MORE: dict[str, Case] = {}  # as well, held to the host's bits alone
SEVERAL: dict[str, Case] = {}  # of more than one in a call


def case_of(name: str) -> Case:
    return (CASES | MORE | SEVERAL)[name]


def case(
    name: str, args: Callable[[int, int], Kwargs], *, needs: str = "", **fields: Any
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register the decorated builder as the case `name`; `args(batch, cond)` makes a call.

    `needs` is a class of diffusers that older versions lack, or cannot import: without it there is
    no such case.
    """

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        if not needs or _has(needs):
            made = Case(name, make, args, **fields)
            (SEVERAL if made.loops > 1 else MORE if made.more else CASES)[name] = made
        return make

    return register


def _has(name: str) -> bool:
    """Whether this diffusers has the class, and all that it imports is installed: some versions
    import what is not among their requirements.
    """
    try:
        return hasattr(diffusers, name)
    except RuntimeError:
        return False


def run(pipe: Any, kwargs: Kwargs) -> torch.Tensor:
    """Call the pipe and return its result as one tensor, whatever its output class."""
    return as_tensor(pipe(**kwargs))


def as_tensor(output: Any) -> torch.Tensor:
    """Return the images, frames or sound of a pipeline's output as one tensor.

    Video with sound comes back as (B, elements of both), videos of several lengths end to end.
    """
    if getattr(output, "audio", None) is not None:
        return torch.cat([output.frames.flatten(1), output.audio.flatten(1)], dim=1)
    for name in ("images", "frames", "videos", "audios"):
        if hasattr(output, name):
            output = getattr(output, name)
            break
    else:
        output = output[0] if isinstance(output, tuple) else output
    if isinstance(output, list) and len({np.shape(item) for item in output}) > 1:
        return torch.cat([torch.as_tensor(item).flatten(1) for item in output], dim=1)
    if isinstance(output, list):
        output = np.stack([np.asarray(item) for item in output])
    return torch.as_tensor(output)


def denoisers(pipe: Any) -> list[nn.Module]:
    """Return the modules whose forwards are the work of a step, ControlNets among them."""
    parts = (getattr(pipe, name, None) for name in DENOISERS)
    return [part for part in parts if isinstance(part, nn.Module)]


def decoder(pipe: Any) -> nn.Module:
    """Return the module that runs when latents are decoded."""
    return (getattr(pipe, "vae", None) or pipe.movq).decoder


def leaf(output: Any) -> torch.Tensor:
    """Return the first tensor of a model's output, whatever holds it."""
    while not torch.is_tensor(output):
        output = output[0]
    return output
