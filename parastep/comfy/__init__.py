"""ComfyUI: `model = parastep.comfy.patch(model, devices)`, and any stock sampler node behind it."""

from .node import patch, told

__all__ = ["patch", "told"]
