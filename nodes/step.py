"""The node that goes between the model loader and the sampler."""

from __future__ import annotations

from typing import Any

from .package import NOTE, host

_QUALITIES = ("exact", "high", "balanced", "fast")  # the names that parastep.tolerance has
_CUSTOM = "custom"
_BEFORE = "own tolerance"  # what graphs that were saved earlier say for it


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
                "tooltip": "auto: all GPUs that ComfyUI sees; where a step evaluates several "
                "conditions (cfg above 1), pairs of them share each step. Or a list that begins "
                "with the model's own device: cuda:0, cuda:1 evaluate a step each, "
                "cuda:0+cuda:1, cuda:2+cuda:3 share one two by two. Each device holds a copy of "
                "the model.",
            },
        ),
        "quality": (
            [*_QUALITIES, _CUSTOM],
            {
                "default": "balanced",
                "tooltip": "What guesses and estimates may add to the error of the result, as "
                "estimated. exact: the untouched sampler, bit for bit and no faster. high: .01. "
                "balanced: .04. fast: .12. custom: the tolerance below.",
            },
        ),
        "tolerance": (
            "FLOAT",
            {
                "default": 0.04,
                "min": 0.0,
                "max": 0.2,
                "step": 0.001,
                "round": False,
                "display": "slider",
                "advanced": True,
                "display_name": "tolerance (quality: custom)",
                "tooltip": "Has no effect unless quality is custom: then this number takes the "
                "place of its words.",
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

    @classmethod
    def valid(cls, quality: str = _CUSTOM) -> bool | str:
        """In place of the host's own look at the list, which would refuse graphs saved earlier.

        A quality that comes over a link is not known yet, and not given here.
        """
        words = (*_QUALITIES, _CUSTOM)
        return quality in (*words, _BEFORE) or f"{quality!r} is none of {', '.join(words)}"

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
        options["tolerance"] = tolerance if quality in (_CUSTOM, _BEFORE) else quality
        options["max_stride"] = max_stride or None
        return (host().patch(model, devices, **options),)
