"""Runs on the stand-in devices: one program and one latent for all, and a denoiser there."""

from __future__ import annotations

from typing import Any

import cases

STEPS = 12


def euler() -> Any:
    return cases.euler(STEPS)


def latents(dtype: str = "f4") -> Any:
    return cases.latents((2, 3, 50), dtype)


def on_device(kind: Any) -> Any:
    def denoiser(x: Any, step: int, rank: int) -> Any:
        assert isinstance(x, kind)
        return kind.of(cases.smooth(x.numpy(), step, rank), x.device)

    return denoiser
