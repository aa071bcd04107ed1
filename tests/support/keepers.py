"""Denoisers that keep something from call to call, and others that only look so, on a tiny UNet.

Each function hangs something into the pipe's UNet, as users' scripts and cache packs do. In a file
of its own so that worker processes can import the classes.
"""

from __future__ import annotations

import collections
import functools
import itertools
import types
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0

STEPS = 8
calls = 0  # of `counts_in_a_global`


def scaled(output: Any, by: Any) -> Any:
    return (output[0] * by, *output[1:])


def early(calls: int) -> float:
    """Half of the steps at one scale, half at another."""
    return 1.0 if (calls - 1) % STEPS < STEPS // 2 else 0.6


# ---- that keep something -------------------------------------------------------------------------


def skips_where_little_changed(pipe: Any) -> None:
    """State on the instance: a counter, the last input and output, as TeaCache has it."""
    unet, own = pipe.unet, type(pipe.unet).forward

    def forward(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if self.count % STEPS in (0, STEPS - 1) or float((sample - self.seen).abs().mean()) > 0.1:
            self.seen, self.kept = sample, own(self, sample, *args, **kwargs)
        self.count += 1
        return self.kept

    unet.count, unet.seen, unet.kept = 0, None, None
    unet.forward = types.MethodType(forward, unet)


def counts_in_a_hook(pipe: Any) -> None:
    n = [0]

    def hook(module: Any, args: Any, output: Any) -> Any:
        n[0] += 1
        return scaled(output, early(n[0]))

    pipe.unet.register_forward_hook(hook)


def counts_in_a_nonlocal(pipe: Any) -> None:
    """Under `functools.wraps`, which gives it the host's names."""
    n, own = 0, pipe.unet.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal n
        n += 1
        return scaled(own(*args, **kwargs), early(n))

    pipe.unet.forward = forward


def counts_in_a_global(pipe: Any) -> None:
    def hook(module: Any, args: Any, output: Any) -> Any:
        global calls
        calls += 1
        return scaled(output, 1 - calls % STEPS / 50)

    global calls
    calls = 0
    pipe.unet.mid_block.resnets[0].conv1.register_forward_hook(
        lambda module, args, output: hook(module, args, (output,))[0]
    )


def counts_in_an_iterator(pipe: Any) -> None:
    n = itertools.count(1)
    pipe.unet.register_forward_hook(lambda m, args, output: scaled(output, early(next(n))))


class Controller:
    """Told of every attention layer, as prompt-to-prompt's controllers are."""

    def __init__(self, layers: int = 1) -> None:
        self.layers, self.layer, self.step = layers, 0, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        by = 1.5 if self.step % STEPS < STEPS // 2 else 0.5
        self.layer += 1
        if self.layer == self.layers:
            self.layer, self.step = 0, self.step + 1
        return x * by

    def hook(self, kept: Any, module: Any, args: Any, output: Any) -> Any:
        return (self(output[0]), *output[1:])


class Processor(AttnProcessor2_0):
    def __init__(self, controller: Any) -> None:
        super().__init__()
        self.controller = controller

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return self.controller(super().__call__(attn, hidden_states, *args, **kwargs))


def processors_share_a_controller(pipe: Any) -> None:
    names = list(pipe.unet.attn_processors)
    controller = Controller(len(names))
    pipe.unet.set_attn_processor({name: Processor(controller) for name in names})


def hooked_by_a_method_in_a_partial(pipe: Any) -> None:
    pipe.unet.register_forward_hook(functools.partial(Controller().hook, None))


def averages_on_the_module(pipe: Any) -> None:
    """Momentum over outputs, a tensor of the module's, written through `.data`."""
    unet, own = pipe.unet, type(pipe.unet).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        self.average.data.mul_(0.3).add_(output[0].mean() * 0.7)
        return scaled(output, 1 + self.average)

    unet.average = torch.zeros(())
    unet.forward = types.MethodType(forward, unet)


class Cached(torch.nn.Module):
    """A part of the user's own, with a buffer."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("count", torch.zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.inner(*args, **kwargs) * (1 - self.count % STEPS / 20)


def part_that_counts(pipe: Any) -> None:
    pipe.unet.conv_out = Cached(pipe.unet.conv_out)


def weights_cast_around_each_layer(pipe: Any) -> None:
    def narrow(module: Any, *_: Any) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.to(torch.float8_e4m3fn)

    def widen(module: Any, *_: Any) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.to(torch.float32)

    for name, module in pipe.unet.named_modules():
        if name.endswith(("conv1", "conv2")):
            narrow(module)
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(narrow)


def weights_swapped_for_the_call(pipe: Any) -> None:
    """And put back, so that before and after are the same."""
    layer, own = pipe.unet.conv_out, pipe.unet.forward
    other = torch.nn.Parameter(layer.weight.detach() * 0.5)

    def forward(*args: Any, **kwargs: Any) -> Any:
        kept, layer.weight = layer.weight, other
        try:
            return own(*args, **kwargs)
        finally:
            layer.weight = kept

    pipe.unet.forward = forward


def class_is_patched(pipe: Any) -> None:
    """A class of this pipe's own, so that others are not; its counter is the class's too."""
    cls = type(pipe.unet)
    twin: Any = type(cls.__name__, (cls,), {"__module__": cls.__module__, "count": 0})

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        twin.count += 1
        return scaled(cls.forward(self, *args, **kwargs), early(twin.count))

    twin.forward = forward
    pipe.unet.__class__ = twin


def counts_in_a_user_dict(pipe: Any) -> None:
    kept: Any = collections.UserDict(n=0)

    def hook(module: Any, args: Any, output: Any) -> Any:
        kept["n"] += 1
        return scaled(output, early(kept["n"]))

    pipe.unet.register_forward_hook(hook)


def counts_far_into_a_list(pipe: Any) -> None:
    kept = [0] * 1000

    def hook(module: Any, args: Any, output: Any) -> Any:
        kept[500] += 1
        return scaled(output, early(kept[500]))

    pipe.unet.register_forward_hook(hook)


def counts_in_a_generator_within_another(pipe: Any) -> None:
    def outer() -> Any:
        yield from (early(n) for n in itertools.count(1))

    n = outer()
    pipe.unet.register_forward_hook(lambda m, args, output: scaled(output, next(n)))


def class_of_processors_is_patched(pipe: Any) -> None:
    """By somebody who counts in the class; again one of this pipe's own."""
    own = AttnProcessor2_0
    twin: Any = type(own.__name__, (own,), {"__module__": own.__module__, "count": 0})

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        twin.count += 1
        return own.__call__(self, *args, **kwargs) * (1.0 if twin.count % 20 < 10 else 0.5)

    twin.__call__ = call
    pipe.unet.set_attn_processor(twin())


KEEPERS = {
    skips_where_little_changed: "count of forward in keepers.py",
    counts_in_a_hook: "a hook that counts its calls (n of hook in keepers.py)",
    counts_in_a_nonlocal: "a patched forward that counts its calls (n of forward in keepers.py)",
    counts_in_a_global: "counts its calls (calls of hook",
    counts_in_an_iterator: "a hook that keeps what it computed (n of <lambda> in keepers.py)",
    processors_share_a_controller: "step of controller of Processor in keepers.py",
    hooked_by_a_method_in_a_partial: "step of hook in keepers.py",
    averages_on_the_module: "average of forward in keepers.py",
    part_that_counts: "a part, Cached, that keeps what it computed (count of",
    weights_cast_around_each_layer: "changes its weights while it runs (",
    weights_swapped_for_the_call: "changes while it runs (weight of conv_out)",
    class_is_patched: "a patched forward that counts its calls",
    counts_in_a_user_dict: "of hook in keepers.py",
    counts_far_into_a_list: "of hook in keepers.py",
    counts_in_a_generator_within_another: "of <lambda> in keepers.py",
    class_of_processors_is_patched: "a patched __call__ that",
}


def begins_late(pipe: Any) -> None:
    """An average over outputs, on the module, from the middle of the run on."""
    unet, own = pipe.unet, type(pipe.unet).forward

    def forward(self: Any, sample: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, sample, timestep, *args, **kwargs)
        if timestep < 500:
            kept = output[0] if self.kept is None else self.kept
            self.kept = 0.7 * output[0] + 0.3 * kept
            output = (self.kept,)
        return output

    unet.kept = None
    unet.forward = types.MethodType(forward, unet)


def swaps_a_part_late(pipe: Any) -> None:
    """In a hook that keeps nothing itself."""

    def hook(module: Any, args: Any) -> None:
        if args[1] < 500 and not isinstance(module.conv_out, Wrapped):
            module.conv_out = Wrapped(module.conv_out)

    pipe.unet.register_forward_pre_hook(hook)


def writes_weights_late(pipe: Any) -> None:
    def hook(module: Any, args: Any) -> None:
        if args[1] < 500:
            module.conv_out.weight.mul_(1.01)

    pipe.unet.register_forward_pre_hook(hook)


def draws(pipe: Any) -> None:
    """From torch's global generator, evenly."""
    pipe.unet.register_forward_hook(lambda m, a, output: scaled(output, 0.9 + 0.1 * torch.rand(())))


# ---- that do not ---------------------------------------------------------------------------------


def hook_that_scales(pipe: Any) -> None:
    settings = {"by": torch.tensor(0.9)}
    pipe.unet.register_forward_hook(lambda m, args, output: scaled(output, settings["by"]))


def forward_that_scales(pipe: Any) -> None:
    own = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: scaled(own(*args, **kwargs), 0.9)


class Louder:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by


def processors_that_scale(pipe: Any) -> None:
    pipe.unet.set_attn_processor(Processor(Louder(1.1)))


class Wrapped(torch.nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.by = inner, 0.9

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) * self.by


def part_that_scales(pipe: Any) -> None:
    pipe.unet.conv_out = Wrapped(pipe.unet.conv_out)


def compiled_in_place(pipe: Any) -> None:
    pipe.unet.compile(backend="eager")


PURE = (
    hook_that_scales,
    forward_that_scales,
    processors_that_scale,
    part_that_scales,
    compiled_in_place,
)


class Table(torch.nn.Module):
    """Makes a table in its first forward and keeps it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.table = inner, None

    def forward(self, x: torch.Tensor, *args: Any) -> Any:
        if self.table is None:
            self.table = torch.full((), 0.9)
        return self.inner(x, *args) * self.table
