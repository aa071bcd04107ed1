"""The node that goes between the model loader and the sampler."""

from __future__ import annotations

from typing import Any

from .package import NOTE, host

_QUALITIES = ("exact", "high", "balanced", "fast")  # the names that parastep.tolerance has
_OWN = "own tolerance"


class ParaStep:
    node_id = "ParaStep"
    display_name = "ParaStep"
    category = "advanced/multigpu"
    aliases = ("multi GPU", "parallel sampling", "speed up", "several steps at once", "parastep")
    cached = True
    description = NOTE + (
        "Evaluates several sampling steps at once, one on each device, and checks each before it "
        "is used; steps between them are estimated where the quality allows, so that one device "
        "gains too. Goes between the model loader and any sampler; nothing else in the graph "
        "changes."
    )
    inputs: dict[str, Any] = {
        "model": ("MODEL", {"tooltip": "With its LoRAs and patches, or before them."}),
        "devices": (
            "STRING",
            {
                "default": "auto",
                "tooltip": "auto: all GPUs that ComfyUI sees. Or a list that begins with the "
                "model's own device: cuda:0, cuda:1. Each one holds a copy of the model.",
            },
        ),
        "quality": (
            [*_QUALITIES, _OWN],
            {
                "default": "balanced",
                "tooltip": "How far off guesses and estimates may be, in units of the noise "
                "level. exact: the same picture bit for bit, no faster. high: .005. "
                "balanced: .02. fast: .05. own tolerance: the number below.",
            },
        ),
        "tolerance": (
            "FLOAT",
            {
                "default": 0.02,
                "min": 0.0,
                "max": 0.2,
                "step": 0.001,
                "round": False,
                "display": "slider",
                "advanced": True,
                "tooltip": "Only where quality says own tolerance.",
            },
        ),
        "policy": (
            ["verified", "paper"],
            {
                "default": "verified",
                "advanced": True,
                "tooltip": "verified: guesses that are too far off are not used. paper: the "
                "published rule, which uses all of them after five steps one by one.",
            },
        ),
        "order": (
            "INT",
            {
                "default": 1,
                "min": 0,
                "max": 1,
                "advanced": True,
                "tooltip": "How guesses go on: 1 along the slope of the last outputs, 0 without.",
            },
        ),
    }
    # Not among the required ones, so that graphs saved before it was there still run.
    optional: dict[str, Any] = {
        "max_stride": (
            "INT",
            {
                "default": 0,
                "min": 0,
                "max": 64,
                "advanced": True,
                "tooltip": "1: every step is evaluated on some device and verified, and one "
                "device alone gains nothing. More: evaluations lie at most so many steps apart. "
                "0: as far apart as the quality allows.",
            },
        ),
    }
    outputs = (("MODEL", "model"),)

    @staticmethod
    def run(
        model: Any,
        devices: str,
        quality: str,
        tolerance: float,
        policy: str,
        order: int,
        max_stride: int = 0,
    ) -> tuple[Any]:
        options: dict[str, Any] = {"policy": policy, "order": order}
        options["tolerance"] = tolerance if quality == _OWN else quality
        options["max_stride"] = max_stride or None
        return (host().patch(model, devices, **options),)
