"""ComfyUI: what of the host reaches into a run: cancelling, an inpainting's mask, the guider, and
the helpers of its ranks.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from .options import split_by_graph, without_host_split
from .sampling import Host
from .sharing import Sharing
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
        self.sharing: Sharing | None = None
        self.share = 1.0  # of an item's rms that a drift within the mask alone has
        mask = extra_args.get("denoise_mask")
        if mask is not None:
            self.share = math.sqrt(float(mask.flatten(1).mean(1).min().clamp(0, 1)))

    def cancel(self, on: bool) -> None:
        self._management.interrupt_current_processing(on)

    def arguments(self, extra_args: dict[str, Any], parallel: bool) -> dict[str, Any]:
        """Arguments under which the leader's model uses its own devices: one, or its team's.

        The host splits CFG over its clones of a model wherever it finds them. Where a node of the
        graph's asked for that, the split is left alone if nothing runs in parallel otherwise.
        """
        options = extra_args.get("model_options", {})
        team = None if self.sharing is None else self.sharing.leader
        asked_for = split_by_graph(options)
        if team is None and ("multigpu_clones" not in options or (asked_for and not parallel)):
            return extra_args
        own = without_host_split(options)
        if team is not None:
            team.put_into(own)
        elif asked_for:
            _log.warning(
                "ParaStep: the GPUs of MultiGPU CFG Split evaluate whole steps; remove that node"
            )
        return {**extra_args, "model_options": own}

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
        made = self.look.first(evaluate)
        if self.sharing is not None and self.sharing.leader is not None:
            if self.look.reason is not None:
                self.sharing.leader.dissolve(self.look.reason)
            self.sharing.leader.held = False
        return made, self.look.reason

    @property
    def shares(self) -> bool:  # type: ignore[override]
        return self.sharing is not None and self.sharing.leader is not None

    def at(self, rank: int, step: int) -> None:
        if self.sharing is not None:
            self.sharing.at(rank, step)

    def leave(self) -> None:
        if self.sharing is not None:
            self.sharing.leave()

    def end(self) -> None:
        if self.sharing is not None:
            self.sharing.end()

    def busy(self) -> bool:
        return self.sharing is not None and self.sharing.busy

    def altered(self) -> str | None:
        now = self._settings()
        changed = [name for name in now if now[name] != self._before.get(name)]
        if changed:
            return f"the guider's {changed[0]} changed in the run"
        return None if self.look is None else self.look.changed()

    def _settings(self) -> dict[str, Any]:
        plain = (bool, int, float, str)
        return {k: v for k, v in vars(self._guider).items() if isinstance(v, plain)}
