"""Random generators: cloned from a host's own, which is only read, and draws sent to a clone.

All that follows or looks ahead draws from what is made here; `kdiffusion` alone borrows torch's
global generators, and puts them back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_NORMAL = {torch.randn, torch.randn_like, torch.normal, torch.Tensor.normal_}
_LIKE = {
    torch.randn_like: torch.randn,
    torch.rand_like: torch.rand,
    torch.randint_like: torch.randint,
}
RANDOM = {
    *_NORMAL,
    *_LIKE,
    torch.rand,
    torch.randint,
    torch.randperm,
    torch.bernoulli,
    torch.multinomial,
    torch.Tensor.bernoulli_,
    torch.Tensor.exponential_,
    torch.Tensor.multinomial,
    torch.Tensor.random_,
    torch.Tensor.uniform_,
}


class Draws(TorchFunctionMode):
    """While active in this thread, no random draw reaches torch's global generators.

    Args:
        generator: gives the generator that replaces the global one of a device.
        seen: called with each normal draw; what it returns is handed out in its place.
    """

    def __init__(
        self,
        generator: Callable[[torch.device], torch.Generator],
        seen: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self._generator = generator
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in RANDOM:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        if func in _LIKE:  # these take no generator in older versions of torch
            like, args = args[0], (*args[1:], tuple(args[0].shape))
            kwargs.pop("memory_format", None)
            kwargs = {"dtype": like.dtype, "device": like.device} | kwargs
        if kwargs.get("generator") is None:
            near = args[0] if args and isinstance(args[0], torch.Tensor) else None
            device = near.device if near is not None else kwargs.get("device")
            kwargs["generator"] = self._generator(torch.device(device or "cpu"))
        result = _LIKE.get(func, func)(*args, **kwargs)
        return self._seen(result) if func in _NORMAL else result


def cloned_generator(generator: Any) -> Any:
    """Generators that will draw what these would draw next; a list of them as a list, or None."""
    if generator is None:
        return None
    if isinstance(generator, (list, tuple)):
        return [cloned_generator(one) for one in generator]
    clone = torch.Generator(generator.device)
    clone.set_state(generator.get_state())
    return clone


def cloned_global_generator(device: torch.device) -> torch.Generator:
    """A generator that will draw what torch's own generator of this device would draw next."""
    clone = torch.Generator(device)
    module = torch if device.type == "cpu" else getattr(torch, device.type)
    one_alone = device.type in ("cpu", "mps")
    clone.set_state(module.get_rng_state() if one_alone else module.get_rng_state(device))
    return clone
