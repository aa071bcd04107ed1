"""Nodes of the tests: a loader of tiny models, texts for them, an end that tells the latents, and
one that has our node rehearse.

The old form of nodes, which every version of the host loads.
"""

from __future__ import annotations

import copy
import dataclasses
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
            },
            "optional": {"item_ms": ("FLOAT", {"default": 0.0, "max": 1e5})},
        }

    def load(self, kind: str, seed: int, slow_ms: float, item_ms: float = 0.0) -> tuple[Any]:
        return (models.build(kind, seed, slow_ms, item_ms),)


class TinyRehearsal:
    """Behind a ParaStep node: rounds are run, and none of their answers is used."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "rehearse"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def rehearse(self, model: Any) -> tuple[Any]:
        from comfy.patcher_extension import WrappersMP

        from parastep.comfy.node import KEY, of_model

        model, kind = model.clone(), WrappersMP.SAMPLER_SAMPLE
        steps = copy.copy(of_model(model))  # the server keeps the node's own for other graphs
        steps.options = dataclasses.replace(steps.options, tolerance="rehearse")
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, steps)
        return (model,)


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


_KINDS = (TinyModel, TinyRehearsal, TinyText, TinyLatent, TinyEnd, TinyString)
NODE_CLASS_MAPPINGS = {kind.__name__: kind for kind in _KINDS}
