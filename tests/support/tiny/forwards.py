"""Forwards counted where they really run: in an inner layer, in every thread and copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# The submodule that runs exactly once in a forward, by the first name that a component has.
_HEARTS = (
    "controlnet_mid_block",
    "conv_out",
    "proj_out",
    "norm_out",
    "visual_projection",
    "text_projection",
    "final_layer_norm",
    "encoder.final_layer_norm",
    "t_embedder",
)


@dataclass
class Count:
    """Forwards that really ran: of the given modules, and of these and their copies."""

    calls: list[bool] = field(default_factory=list)

    @property
    def own(self) -> int:
        return sum(self.calls)

    @property
    def everywhere(self) -> int:
        return len(self.calls)


@contextmanager
def count_forwards(*modules: nn.Module) -> Iterator[Count]:
    """Count the forwards of `modules`, and of deep copies of them, in every thread.

    What is counted is a call of an inner layer, so a `forward` that was replaced on the module
    and does not run the model counts nothing. A module of two builds of one case counts under
    `everywhere` of each other.
    """
    hearts = [_heart(module) for module in modules]
    for heart in hearts:
        heart.__dict__.setdefault("tiny_mark", f"{type(heart).__name__}-{id(heart)}")
    own = {id(heart) for heart in hearts}
    marks = {heart.__dict__["tiny_mark"] for heart in hearts}
    count = Count()

    def note(module: nn.Module, _: Any) -> None:
        if module.__dict__.get("tiny_mark") in marks:
            count.calls.append(id(module) in own)

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield count
    finally:
        handle.remove()


def _heart(module: nn.Module) -> nn.Module:
    for path in _HEARTS:
        try:
            return module.get_submodule(path)
        except AttributeError:
            continue
    return module


def mark(name: str, part: nn.Module) -> None:
    """Name the layers to count: a deep copy keeps the name."""
    _heart(part).__dict__["tiny_mark"] = name
    for side in ("encoder", "decoder"):
        inner = getattr(part, side, None)
        if name in ("vae", "movq") and isinstance(inner, nn.Module):
            _heart(inner).__dict__["tiny_mark"] = f"{name}.{side}"
