"""ComfyUI: a run's model options, and what in them has the host split CFG over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CLONES, POOL = "multigpu_clones", "multigpu_thread_pool"
_ASKED_FOR = "multigpu_options"  # by the host's own node MultiGPU CFG Split


def copied(options: dict[str, Any]) -> dict[str, Any]:
    """The dictionaries and lists of model options anew: the host writes into them in a call."""
    return {name: _copied(value) for name, value in options.items()}


def _copied(value: Any) -> Any:
    if type(value) is dict:
        return copied(value)
    return list(value) if type(value) is list else value


def without_host_split(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in copied(options).items() if name not in (CLONES, POOL)}


def split_by_graph(options: dict[str, Any]) -> list[Any]:
    """The devices over which a node of the graph's own has the host split CFG."""
    return list(options.get(CLONES, ())) if _ASKED_FOR in options else []


def map_patches(options: dict[str, Any], change: Callable[[Any], Any]) -> None:
    """Puts `change(patch)` in the place of each patch of the model, in options of one's own."""
    inner = options.get("transformer_options", {})
    for patches in inner.get("patches", {}).values():
        patches[:] = map(change, patches)
    for patches in inner.get("patches_replace", {}).values():
        patches.update({place: change(patch) for place, patch in patches.items()})
    if "model_function_wrapper" in options:
        options["model_function_wrapper"] = change(options["model_function_wrapper"])
