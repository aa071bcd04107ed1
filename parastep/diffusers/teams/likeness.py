"""Whether a helper's replica is still like its head: what hosts change about a denoiser, or around
it, within a call, so that the next of its forwards computes another function.

Loops put layers aside, switch adapters off or hang hooks in for one of guidance's branches, or from
some step on. A helper has another copy of the modules and sees none of that. What changed while the
denoiser itself ran is its own affair, which `state` looks after.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from typing import Any

import torch

from ...tracing.draws import Draws
from ..changes import Changes, holders_in

_REGISTRY = "_diffusers_hook"


class Likeness:
    """Of the head's denoisers, as they are when this is made, with the modes of this thread."""

    def __init__(self, denoisers: dict[str, torch.nn.Module]) -> None:
        self._denoisers = denoisers
        self._modes = _modes()
        self.renew()

    def renew(self) -> None:
        """The denoisers are now what they are to be."""
        self._changes = Changes(_holders(self._denoisers))
        self._seen = self._changes.look()

    def changed(self) -> str | None:
        """What is no longer as it was, or None."""
        if _modes() != self._modes:
            return "the modes that its denoisers run in"
        return self._changes.changed(self._seen)


class _Own:
    """A denoiser's attributes but for diffusers' registry of hooks, which its `cache_context` makes
    when it is first entered; what counts are the hooks in it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._own = vars(module)

    def __len__(self) -> int:
        return len(self._own) - (_REGISTRY in self._own)

    def __iter__(self) -> Iterator[Any]:
        for key, value in self._own.items():
            if key != _REGISTRY:
                yield value
        yield from getattr(self._own.get(_REGISTRY), "hooks", ())


def _holders(denoisers: dict[str, torch.nn.Module]) -> Iterator[tuple[str, Any]]:
    roots = {id(vars(module)): module for module in denoisers.values()}
    for name, holder in holders_in(denoisers):
        yield name, _Own(roots[id(holder)]) if id(holder) in roots else holder


def _modes() -> tuple[Any, ...]:
    """What a thread's forwards depend on beside modules and arguments."""
    kinds = ("cpu", "cuda")
    autocast = [torch.is_autocast_enabled(kind) for kind in kinds]
    dtypes = [torch.get_autocast_dtype(kind) for kind in kinds]
    context = {variable: id(value) for variable, value in contextvars.copy_context().items()}
    # A follower's random draws are watched in its first forward, by a mode of ours.
    functions = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    own = [id(mode) for mode in functions if not isinstance(mode, Draws)]
    stack = own, torch._C._len_torch_dispatch_stack()
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        autocast,
        dtypes,
        stack,
        context,
    )
