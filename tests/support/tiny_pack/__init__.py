"""Nodes of the tests: a loader of tiny models, texts for them, and an end that tells the latents.

The old form of nodes, which every version of the host loads.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from . import models


class TinyModel:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "kind": (list(models.KINDS),),
                "seed": ("INT", {"default": 0}),
                "slow_ms": ("FLOAT", {"default": 0.0, "max": 1e5}),
            }
        }

    def load(self, kind: str, seed: int, slow_ms: float) -> tuple[Any]:
        return (models.build(kind, seed, slow_ms),)


class TinyText:
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"kind": (list(models.KINDS),), "seed": ("INT", {"default": 0})},
        }

    def encode(self, kind: str, seed: int) -> tuple[Any]:
        return (models.conditioning(kind, seed),)


class TinyLatent:
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "kind": (list(models.KINDS),),
                "batch": ("INT", {"default": 1, "min": 1}),
                "filled": ("BOOLEAN", {"default": False}),
            }
        }

    def make(self, kind: str, batch: int, filled: bool) -> tuple[Any]:
        shape = (batch, *models.KINDS[kind].latent)
        samples = torch.zeros(shape)
        if filled:
            samples = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        return ({"samples": samples},)


class TinyEnd:
    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ("LATENT",)}}

    def tell(self, latent: Any) -> dict[str, Any]:
        samples = latent["samples"].float().contiguous()
        digest = hashlib.sha256(samples.numpy().tobytes()).hexdigest()
        values = samples.flatten().tolist()
        return {"ui": {"digest": [digest], "latent": values, "shape": list(samples.shape)}}


class TinyString:
    RETURN_TYPES = ()
    FUNCTION = "tell"
    OUTPUT_NODE = True
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"text": ("STRING", {"forceInput": True})}}

    def tell(self, text: str) -> dict[str, Any]:
        return {"ui": {"text": [text]}}


NODE_CLASS_MAPPINGS = {
    kind.__name__: kind for kind in (TinyModel, TinyText, TinyLatent, TinyEnd, TinyString)
}
