"""Random draws of a thread that evaluates for others: from a generator of its own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from ..tracing.draws import RANDOM, Draws


class Drawn(RuntimeError):
    """A random draw where none may be."""


class OwnDraws(Draws):
    """Within, the global generators are the leader's alone.

    A denoiser that draws, by dropout in a module left in training mode for one, is not a function
    of its inputs: no other rank can evaluate it, and torch's own dropout would draw from the global
    generator, which is the leader's. Its first call is watched for that; later ones are not, which
    costs time.
    """

    def __init__(self, random: torch.Generator) -> None:
        super().__init__(lambda device: random, lambda drawn: drawn)
        self._forbidden = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._forbidden and func in RANDOM:
            raise Drawn("its denoiser draws random numbers")
        if self._forbidden and "dropout" in getattr(func, "__name__", ""):
            if _draws(func, args, kwargs or {}):
                raise Drawn("its denoiser draws random numbers (dropout in training mode)")
        return super().__torch_function__(func, types, args, kwargs)

    @contextlib.contextmanager
    def forbidden(self) -> Iterator[None]:
        self._forbidden = True
        try:
            yield
        finally:
            self._forbidden = False

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()


def _draws(dropout: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    try:
        given = inspect.signature(dropout).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a built-in one, called below those with a signature
        return False
    given.apply_defaults()
    return bool(given.arguments.get("training", True)) and given.arguments.get("p", 0.5) > 0
