"""What denoisers write to their own arguments: a cache that is handed to them again.

One that reads there what an earlier step wrote is no function of its latents, and iterations that
are skipped write nothing. The leader looks at its first two iterations, which run in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .forwards import Inputs


class Written:
    """By the calls of one iteration."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def over(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, looked at."""

        def looked_at(*args: Any, **kwargs: Any) -> Any:
            given = _tensors(args, kwargs)
            before = [tensor._version for _, tensor in given]
            output = run(*args, **kwargs)
            changed = [t for (_, t), version in zip(given, before) if t._version != version]
            known = {id(tensor) for _, tensor in given}
            added = [t for _, t in _tensors(args, kwargs) if id(t) not in known]
            self._tensors += changed + added
            return output

        return looked_at

    def handed_again(self, args: Any, kwargs: Any) -> str | None:
        """The argument with a tensor that was written to, or put into it, or None."""
        written = {id(tensor) for tensor in self._tensors}
        return next((name for name, t in _tensors(args, kwargs) if id(t) in written), None)


def _tensors(args: Any, kwargs: Any) -> list[tuple[str, torch.Tensor]]:
    """Those with a count of what is written to them."""
    values = Inputs(args, kwargs).values.items()
    found = [(name, value) for name, value in values if isinstance(value, torch.Tensor)]
    return [(name, tensor) for name, tensor in found if not tensor.is_inference()]
