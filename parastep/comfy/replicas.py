"""ComfyUI: a model's replicas on other devices.

Where the host makes multi-GPU clones, they are its own: it loads them with the model, brings LoRAs
and patches to them before each run, and gives them ControlNets of their own. Elsewhere a replica is
a deep copy of the model with a ModelPatcher around it, kept among the patcher's additional models,
which the host loads too. `node` asks for replicas when the node runs; before each run the host
is asked for room, and devices that have none are left out of it.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..messages import describe

KEY = "parastep"  # of our own copies among a patcher's additional models
_HOSTS_KEY = "multigpu"  # of the host's

_log = logging.getLogger(__name__)


def add_replicas(model: Any, devices: list[torch.device]) -> list[torch.device]:
    """Gives the patcher `model` a replica on each device but its own; returns those that have one.

    Repeats of a device share its replica. A device that cannot have one is left out, with a
    warning.
    """
    missing = set()
    for device in dict.fromkeys(devices):
        if device == model.load_device:
            continue
        try:
            _check_room(model, device)
            _add(model, device)
        except Exception as error:  # of the host, its loader, or a copy of whatever is in a model
            missing.add(device)
            _log.warning("ParaStep: %s is left out: %s", device, describe(error))
    return [device for device in devices if device not in missing]


def _check_room(model: Any, device: torch.device) -> None:
    from comfy import model_management

    if device.type == "cpu":
        return
    room, size = model_management.get_total_memory(device), _weights(model)
    if size + model_management.minimum_inference_memory() > room:
        gb = f"{size / 1e9:.1f} GB of weights, {room / 1e9:.1f} GB of memory"
        raise RuntimeError(f"the model does not fit there: {gb}")


def _weights(model: Any) -> float:
    """Bytes that a model's weights take on its device; none where the host streams them."""
    return 0 if getattr(model, "is_dynamic", bool)() else model.model_size()


def _add(model: Any, device: torch.device) -> None:
    by_host = hasattr(model, "deepclone_multigpu") and model.cached_patcher_init is not None
    key = _HOSTS_KEY if by_host else KEY
    others = model.get_additional_models_with_key(key)
    if all(other.load_device != device for other in others):
        made = _host_clone(model, device) if by_host else _own_copy(model, device)
        model.set_additional_models(key, [*others, made])
    if by_host:
        model.match_multigpu_clones()


def _host_clone(model: Any, device: torch.device) -> Any:
    """As the host's `create_multigpu_deepclones`, which takes the first of all devices only."""
    from comfy import model_management

    for loaded in model_management.loaded_models():
        if (
            loaded is not None  # a model that nobody holds any more
            and loaded.load_device == device
            and loaded.clone_base_uuid == model.clone_base_uuid
            and loaded.is_multigpu_base_clone
        ):
            return loaded.clone()
    made = model.deepclone_multigpu(new_load_device=device)
    made.is_multigpu_base_clone = True
    return made


def _own_copy(model: Any, device: torch.device) -> Any:
    """A deep copy of the model as it is without patches, in a patcher of the model's own class."""
    if model.injections:
        raise RuntimeError("its injections cannot be copied")
    model.unpatch_model(model.offload_device)
    # Newer hosts answer None for any attribute of a model's configuration, which copy.deepcopy
    # takes for a method; nobody writes into a configuration once the model is made.
    keep = [getattr(model.model, name, None) for name in ("model_config", "current_patcher")]
    own = copy.deepcopy(model.model, {id(value): value for value in keep if value is not None})
    return type(model)(own, load_device=device, offload_device=model.offload_device)


class Replicas:
    """The replicas in a model's runs: those there is room for, with the model's patches."""

    def __init__(self, devices: Sequence[torch.device], shared: bool = False) -> None:
        """`devices`: one for each evaluation at a time, the model's own first; `shared`: several
        of them share the conditions of one, or evaluate one condition each.
        """
        self._devices, self._shared = list(devices), shared
        self._room: Counter[torch.device] = Counter(
            devices
        )  # evaluations that the last run has room for
        self._missing: list[str] = []

    def __deepcopy__(self, memo: Any) -> Replicas:
        return self  # the host copies model options deeply

    def prepare(
        self, executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A wrapper around the host's `prepare_sampling`, which loads the models of a run.

        The host brings patches to its own clones; copies of ours take them on here.
        """
        for own in model.get_additional_models_with_key(KEY):
            _refresh(own, model)
        self._ask_for_room(model, noise_shape, conds)
        left_out: dict[str, list[Any]] = {}
        for key in (KEY, _HOSTS_KEY):
            others = _others(model, key)
            left_out[key] = [other for other in others if self._room.get(other.load_device) == 0]
            _set_others(model, key, [other for other in others if other not in left_out[key]])
        try:
            return executor(model, noise_shape, conds, *args, **kwargs)
        finally:  # the next run may have room again
            for key, others in left_out.items():
                _set_others(model, key, [*_others(model, key), *others])

    def with_room(self) -> tuple[list[torch.device], list[str]]:
        """The devices of this run, the model's own first, and why others are missing."""
        left, found = +self._room, []
        for device in self._devices:
            if left[device] > 0:
                found.append(device)
            left[device] -= 1
        return found, self._missing

    def _ask_for_room(self, model: Any, noise_shape: Any, conds: Any) -> None:
        """Asks the host for the weights and for as many evaluations at a time as there are ranks,
        as it does itself for one; takes what there is.
        """
        from comfy import model_management
        from comfy.sampler_helpers import estimate_memory

        self._missing = []
        fixed = _fixed_control(conds)
        several, single = estimate_memory(model, noise_shape, conds)
        one = single if self._shared else several
        least = model_management.minimum_inference_memory()
        for device, ranks in Counter(self._devices).items():
            self._room[device] = ranks
            if fixed is not None and device != model.load_device:
                self._room[device] = 0
                self._missing.append(f"{device} is left out: {fixed} cannot be copied to it")
                continue
            if device == torch.device("cpu") or (device == model.load_device and ranks == 1):
                continue  # where the host itself does not ask, or asks for as much
            weights = (
                1.1 * (_weights(patcher) - _loaded(patcher))
                if (patcher := _on(model, device))
                else 0.0
            )
            wanted = weights + max(least, ranks * one)
            _free(wanted, device, patcher)
            room = model_management.get_free_memory(device) - weights
            fit = 0 if room < least else ranks if room >= ranks * one else int(room // one)
            self._room[device] = max(fit, int(device == model.load_device))
            if self._room[device] < ranks:
                gb = f"{wanted / 1e9:.1f} GB are needed, {(room + weights) / 1e9:.1f} GB are free"
                self._missing.append(
                    f"{device}: room for {self._room[device]} of {ranks} ranks: {gb}"
                )


def _fixed_control(conds: Mapping[str, Any]) -> str | None:
    """The class of a ControlNet of which the host can make no copy for another device, or None.

    In hosts without clones for several devices, where no ControlNet has one, lanes say so.
    """
    from comfy.controlnet import ControlBase

    makes = getattr(ControlBase, "deepclone_multigpu", None)
    for cond in (cond for each in conds.values() for cond in each):
        control = cond.get("control") if makes is not None else None
        while control is not None:
            if getattr(type(control), "deepclone_multigpu", makes) is makes:
                return f"the ControlNet {type(control).__name__}"
            control = control.previous_controlnet
    return None


def _others(model: Any, key: str) -> list[Any]:
    return list(model.get_additional_models_with_key(key))


def _set_others(model: Any, key: str, others: list[Any]) -> None:
    if others or _others(model, key):
        model.set_additional_models(key, others)


def _refresh(own: Any, model: Any) -> None:
    """A copy of ours takes on the model's patches."""
    if own.patches_uuid != model.patches_uuid:
        own.patches = {name: list(patches) for name, patches in model.patches.items()}
        own.patches_uuid = model.patches_uuid
    own.weight_wrapper_patches = dict(getattr(model, "weight_wrapper_patches", {}))
    own.object_patches = {
        name: copy.deepcopy(value) for name, value in model.object_patches.items()
    }


def _on(model: Any, device: torch.device) -> Any:
    """The patcher of a device, or None."""
    everywhere = [model, *_others(model, KEY), *_others(model, _HOSTS_KEY)]
    return next((patcher for patcher in everywhere if patcher.load_device == device), None)


def _loaded(patcher: Any) -> float:
    """Bytes of its weights that are on its device already; clones share them."""
    return min(patcher.loaded_size(), _weights(patcher))


def _free(wanted: float, device: torch.device, patcher: Any) -> None:
    """The host unloads what it can spare on a device; not what this model has there."""
    from comfy import model_management

    loaded = model_management.current_loaded_models
    own = [
        each
        for each in loaded
        if each.model is not None and patcher is not None and each.model.is_clone(patcher)
    ]
    model_management.free_memory(wanted, device, own)


def patcher_on(model: Any, options: dict[str, Any], device: torch.device) -> Any:
    """The loaded patcher of a device in a run of `model` with these model options.

    Raises RuntimeError where there is none.
    """
    if device == model.load_device:
        return model
    if device in (clones := options.get("multigpu_clones", {})):
        return clones[device]
    for own in model.get_additional_models_with_key(KEY):
        if own.load_device == device:
            own.pre_run()
            return own
    raise RuntimeError("the model has no replica there")
