"""Small trained models in real pipeline classes, for demos, tests and benches.

`image.MODEL`, `video.MODEL` and `sound.MODEL`; `load(name)` is the one of that name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .common import Model

NAMES = ("image", "video", "sound")


def load(name: str) -> Model:
    """The model of that name, one of `NAMES`; its own `load()` is the pipeline."""
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}: one of {', '.join(NAMES)}")
    model: Model = importlib.import_module(f"{__name__}.{name}").MODEL
    return model
