"""The node that goes between the model loader and the sampler."""

from __future__ import annotations

from typing import Any

from .files import calibration_at, version_of
from .package import NOTE, host

_SCALE = 2  # what a tolerance means, as parastep.tolerance has it
_QUALITIES = ("exact", "high", "balanced", "fast")  # the names that parastep.tolerance has
_CUSTOM = "custom"
_BEFORE = "own tolerance"  # what graphs say for it that were saved at scale 1


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
                "estimated. exact: the untouched sampler, bit for bit and no faster. high: .006. "
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
        "calibration": (
            "STRING",
            {
                "default": "",
                "advanced": True,
                "tooltip": "The file of a calibration (parastep.calibrate, saved as JSON) in "
                "ComfyUI's input folder: its tolerance takes the place of quality and tolerance. "
                "Empty: none.",
            },
        ),
        "scale": (
            "INT",
            {
                "default": _SCALE,
                "min": 1,
                "max": 64,
                "advanced": True,
                "tooltip": "What a number in tolerance means, so that this graph can be told from "
                "one of another version: leave it as it is.",
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

    @classmethod
    def version(cls, calibration: str | None = "", **inputs: Any) -> str:
        """Changes with what is in the file, so that the node runs again."""
        return version_of(calibration)

    @staticmethod
    def run(
        model: Any,
        devices: str,
        quality: str,
        tolerance: float,
        policy: str,
        order: int,
        max_stride: int = 0,
        calibration: str = "",
        scale: int = _SCALE,
    ) -> tuple[Any]:
        options: dict[str, Any] = {"policy": policy, "order": order}
        if calibration.strip():
            options["tolerance"] = calibration_at(calibration)
        elif quality in (_CUSTOM, _BEFORE):
            options["tolerance"] = _of_today(tolerance, 1 if quality == _BEFORE else scale)
        else:
            options["tolerance"] = quality
        options["max_stride"] = max_stride or None
        return (host().patch(model, devices, **options),)


def _of_today(tolerance: float, scale: int) -> float:
    """A number of a saved graph. At scale 1 the default was .02, which stood for about what .04
    does now.
    """
    if scale not in (1, _SCALE):
        raise ValueError(
            f"scale: this graph's tolerance is of scale {scale}, which a newer parastep wrote: "
            f"update parastep, or choose a quality (scale here: {_SCALE})"
        )
    return tolerance * _SCALE / scale
