"""ComfyUI: the followers' model functions, each the sampler's own model on a replica.

A lane is what the stock sampler calls, `KSamplerX0Inpaint`, with a guider of its own: the same
class and conditioning, another device's model. Lanes on one device share its weights; what the
host keeps in between calls (a ControlNet's resized hint) each has for itself. Called by `node`
when a run begins.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..tracing.kdiffusion import Function
from .guidance import with_function
from .options import copied, map_patches, without_host_split
from .places import Team as Devices
from .teams import Team


class Lane:
    """`lane(x, sigma)` is the denoised output at x, on this lane's device and back on that of x."""

    def __init__(
        self,
        model: Any,
        extra_args: dict[str, Any],
        patcher: Any,
        device: torch.device,
        team: Team | None = None,
    ) -> None:
        """`model` and `extra_args` are those that the sampler function is handed.

        `patcher` is the ModelPatcher whose weights are on `device`, loaded and ready to run; `team`
        shares out what it evaluates.
        """
        guider = model.inner_model
        self.device, self.team = device, team
        self._elsewhere = device != guider.model_patcher.load_device
        self.model = copy.copy(model)
        self.model.inner_model = self._guider(guider, patcher)
        for name in ("latent_image", "noise", "sigmas"):
            setattr(self.model, name, self._here(getattr(model, name, None)))
        self.extra_args = {name: self._here(value) for name, value in extra_args.items()}
        options = without_host_split(extra_args.get("model_options", {}))
        transformer_options = options.get("transformer_options", {})
        if "sample_sigmas" in transformer_options:
            transformer_options["sample_sigmas"] = self._here(transformer_options["sample_sigmas"])
        if self._elsewhere:
            _move_patches(options, device)
        if team is not None:
            team.put_into(options)
        self.extra_args["model_options"] = options

    @property
    def devices(self) -> Devices:
        return (self.device,) if self.team is None else self.team.devices

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, after_guidance: Function | None = None
    ) -> torch.Tensor:
        arguments = {**self.extra_args, "model_options": copied(self.extra_args["model_options"])}
        if after_guidance is not None:
            arguments = with_function(arguments, after_guidance)
        return self.model(x.to(self.device), sigma.to(self.device), **arguments).to(x.device)

    def _guider(self, guider: Any, patcher: Any) -> Any:
        own = copy.copy(guider)
        own.model_patcher, own.inner_model = patcher, patcher.model
        own.model_options = without_host_split(guider.model_options)
        if patcher is not guider.model_patcher:
            if hasattr(guider.inner_model, "latent_shapes"):
                patcher.model.latent_shapes = guider.inner_model.latent_shapes
        controls: dict[int, Any] = {}
        own.conds = {
            kind: [self._cond(cond, controls) for cond in conds]
            for kind, conds in guider.conds.items()
        }
        return own

    def _cond(self, cond: Mapping[str, Any], controls: dict[int, Any]) -> dict[str, Any]:
        own = {name: self._here(value) for name, value in cond.items() if name != "control"}
        if self._elsewhere and "gligen" in cond:
            raise RuntimeError("GLIGEN runs on one device only")
        if cond.get("control") is not None:
            own["control"] = self._control(cond["control"], controls)
        return own

    def _control(self, control: Any, controls: dict[int, Any]) -> Any:
        """A ControlNet, and those chained before it, with hints of their own.

        Conditionings that share one go on sharing it: the host batches them together then.
        """
        if control is None or id(control) in controls:
            return controls.get(id(control))
        there = control
        if self._elsewhere:
            clones = getattr(control, "multigpu_clones", {})
            if self.device not in clones:
                raise RuntimeError(f"its ControlNet has no copy on {self.device}")
            there = clones[self.device]
        own = controls[id(control)] = copy.copy(there)
        own.previous_controlnet = self._control(control.previous_controlnet, controls)
        return own

    def _here(self, value: Any) -> Any:
        """A conditioning's value with its tensors on this device; as it is where they are here."""
        if not self._elsewhere:
            return value
        if isinstance(value, torch.Tensor):
            return value.to(self.device)
        if isinstance(value, dict):
            return {name: self._here(item) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._here(item) for item in value)
        if hasattr(value, "_copy_with") and hasattr(value, "cond"):
            return value._copy_with(self._here(value.cond))
        return value


def _move_patches(options: dict[str, Any], device: torch.device) -> None:
    """Patches that hold weights of their own (a hypernetwork's) get a copy of them on the device,
    where the host, which knows one device a patch, would move them back and forth.
    """

    def moved(patch: Any) -> Any:
        return copy.deepcopy(patch).to(device) if hasattr(patch, "to") else patch

    map_patches(options, moved)


def make_lanes(
    model: Any,
    extra_args: dict[str, Any],
    ranks: Sequence[Devices],
    patcher_of: Callable[[torch.device], Any],
    team_of: Callable[[Devices], Team | None],
) -> tuple[list[Lane], list[str]]:
    """A lane for each rank whose devices can have one, and why the others cannot.

    `patcher_of` and `team_of` raise RuntimeError, or anything, where there is no replica on a
    device.
    """
    lanes, missing = [], []
    for devices in ranks:
        try:
            lane = Lane(model, extra_args, patcher_of(devices[0]), devices[0], team_of(devices))
            lanes.append(lane)
        except Exception as error:
            named = " + ".join(map(str, devices))
            missing.append(f"{named} is left out: {error}")
    return lanes, missing
