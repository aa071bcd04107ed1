"""ComfyUI: a model's replicas on other devices.

Where the host makes multi-GPU clones, they are its own: it loads them with the model, brings LoRAs
and patches to them before each run, and gives them ControlNets of their own. Elsewhere a replica is
a deep copy of the model with a ModelPatcher around it, kept among the patcher's additional models,
which the host loads too. `comfy` asks for replicas when the node runs and finds them in each run.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from .api import describe

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
    room, size = model_management.get_total_memory(device), model.model_size()
    if size > room:
        gb = f"{size / 1e9:.1f} GB of weights, {room / 1e9:.1f} GB of memory"
        raise RuntimeError(f"the model does not fit there: {gb}")


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
            loaded.load_device == device
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


def refresh_replicas(executor: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper around the host's `prepare_sampling`: copies of ours take on the model's patches.

    The host does so for its own clones.
    """
    for own in model.get_additional_models_with_key(KEY):
        if own.patches_uuid != model.patches_uuid:
            own.patches = {name: list(patches) for name, patches in model.patches.items()}
            own.patches_uuid = model.patches_uuid
        own.weight_wrapper_patches = dict(getattr(model, "weight_wrapper_patches", {}))
        own.object_patches = {
            name: copy.deepcopy(value) for name, value in model.object_patches.items()
        }
    return executor(model, *args, **kwargs)


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
