"""Room for replicas, asked for before they are made: a device that runs full does so in mid-run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .parts import denoisers_of

_MARGIN = 1.1  # of the weights: what a forward takes beside them is not known before it has run


def weights_of(pipe: Any) -> int:
    """Bytes of the denoisers' parameters and buffers, what a replica takes on another device."""
    modules = denoisers_of(pipe).values()
    tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return sum({id(t): _bytes_of(t) for t in tensors}.values())


def _bytes_of(tensor: torch.Tensor) -> int:
    """Of a quantised one those of its parts: it says the size of what it stands for."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    parts, _ = tensor.__tensor_flatten__()
    return sum(_bytes_of(getattr(tensor, name)) for name in parts)


def free_on(device: torch.device) -> int | None:
    """Bytes that this process may still take there; None where the device does not say."""
    if device.type != "cuda":
        return None
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def allocated_on(device: torch.device) -> tuple[int, int] | None:
    """Bytes of this process's tensors there, now and at most so far; None as in `free_on`."""
    if device.type != "cuda":
        return None
    return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)


class Peak:
    """What forwards on a device took at most, in bytes beside what was there before: 0 until it is
    known. The user's own statistics are read, not reset, so that it is known where a forward takes
    more than anything before it did.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device

    def over(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The forward `run`, measured; nothing else may allocate there meanwhile."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            before = allocated_on(self._device)
            output = run(*args, **kwargs)
            after = allocated_on(self._device)
            if before is not None and after is not None and after[1] > before[1]:
                self.bytes = max(self.bytes, after[1] - before[0])
            return output

        return measured


def without_room(
    pipe: Any, places: dict[int, torch.device], home: torch.device, peak: int = 0
) -> dict[int, str]:
    """Of these places, which are to have a replica each, those on devices without room for that and
    for a forward that takes `peak` bytes, and why.

    Ranks on the pipe's own device share its weights.
    """
    size = int(weights_of(pipe) * _MARGIN) + peak
    taken, found = dict.fromkeys(places.values(), 0), {}
    for place, device in places.items():
        free = None if device == home else free_on(device)
        if free is not None and taken[device] + size > free:
            found[place] = (
                f"{device} has no room for a replica: {size / 1e9:.1f} GB are needed"
                f"{' with what a forward takes' if peak else ''}, "
                f"{max(free - taken[device], 0) / 1e9:.1f} GB are free"
            )
        else:
            taken[device] += size
    return found
