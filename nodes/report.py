"""The node that tells of the last run: words, and the timeline as an image."""

from __future__ import annotations

from typing import Any

from .package import NOTE, host


class ParaStepReport:
    node_id = "ParaStepReport"
    display_name = "ParaStep Report"
    category = "advanced/multigpu"
    aliases = ("parastep timeline", "speed-up", "drift", "rounds")
    cached = False
    description = NOTE + (
        "Tells what ParaStep did in the last run of this model: rounds, evaluations, drift, "
        "speed-up, and the timeline as an image. The latent goes through unchanged: put the node "
        "behind the sampler."
    )
    inputs: dict[str, Any] = {
        "model": ("MODEL", {"tooltip": "The model that the sampler was given."}),
        "latent": ("LATENT", {"tooltip": "What the sampler made; so the node runs after it."}),
    }
    optional: dict[str, Any] = {}
    outputs = (("LATENT", "latent"), ("STRING", "report"), ("IMAGE", "timeline"))

    @staticmethod
    def run(model: Any, latent: Any) -> tuple[Any, str, Any]:
        text, picture = host().told(model)
        return latent, text, picture
