"""ComfyUI: what of the host reaches into a run: cancelling, an inpainting's mask, the guider."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from .lanes import without_host_split
from .sampling import Host
from .state import Look

_log = logging.getLogger(__name__)


class ComfyHost(Host):
    """What of the host reaches into a run: cancelling, the mask of an inpainting, the guider."""

    def __init__(self, model: Any, extra_args: dict[str, Any]) -> None:
        from comfy import model_management

        self.interrupt = model_management.InterruptProcessingException
        self._management = model_management
        self._model, self._guider = model, model.inner_model
        self._before = self._settings()
        self.look: Look | None = None
        self.share = 1.0  # of an item's rms that a drift within the mask alone has
        mask = extra_args.get("denoise_mask")
        if mask is not None:
            self.share = math.sqrt(float(mask.flatten(1).mean(1).min().clamp(0, 1)))

    def cancel(self, on: bool) -> None:
        self._management.interrupt_current_processing(on)

    def alone(self, extra_args: dict[str, Any], parallel: bool) -> dict[str, Any]:
        """Arguments under which the leader's model uses one device.

        The host splits CFG over its clones of a model wherever it finds them. Where a node of the
        host's asked for that, the split is left alone if nothing runs in parallel otherwise.
        """
        options = extra_args.get("model_options", {})
        asked_for = "multigpu_options" in options
        if "multigpu_clones" not in options or (asked_for and not parallel):
            return extra_args
        if asked_for:
            _log.warning(
                "ParaStep: the GPUs of MultiGPU CFG Split evaluate whole steps; remove that node"
            )
        return {**extra_args, "model_options": without_host_split(options)}

    def settle(
        self, denoised: torch.Tensor, sigma: torch.Tensor, arguments: dict[str, Any]
    ) -> torch.Tensor:
        """What is outside of the mask is the given latents, as the stock model's call has it."""
        mask, options = arguments.get("denoise_mask"), arguments.get("model_options", {})
        if mask is None:
            return denoised
        if "denoise_mask_function" in options:
            extra = {"model": self._guider, "sigmas": self._model.sigmas}
            mask = options["denoise_mask_function"](sigma, mask, extra_options=extra)
        return denoised * mask + self._model.latent_image * (1.0 - mask)

    def unknown(self) -> bool:
        return self.look is not None and self.look.needed

    def begin(self, arguments: dict[str, Any]) -> None:
        if self.look is not None:
            self.look.begin(arguments.get("model_options") or {})

    def look_at(self, evaluate: Any) -> tuple[Any, str | None]:
        assert self.look is not None
        return self.look.first(evaluate), self.look.reason

    def altered(self) -> str | None:
        now = self._settings()
        changed = [name for name in now if now[name] != self._before.get(name)]
        if changed:
            return f"the guider's {changed[0]} changed in the run"
        return None if self.look is None else self.look.changed()

    def _settings(self) -> dict[str, Any]:
        plain = (bool, int, float, str)
        return {k: v for k, v in vars(self._guider).items() if isinstance(v, plain)}
