"""Context groups: denoisers that several processes have split among them, as diffusers'
`enable_parallelism` does along the sequence. Each process has all weights and a part of every
forward, which all of them enter together.

Read off the pipe here, never set up: that is the user's. `teams.together` has what a head does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import _core
from .parts import denoisers_of
from .replicas import twin_of

_HOOKS = "diffusers.hooks.context_parallel"


class Context(NamedTuple):
    """The denoisers that are split, and the processes that each is split over, as
    torch.distributed counts them.
    """

    names: tuple[str, ...]
    ranks: tuple[int, ...]


def context_of(pipe: Any) -> Context | None:
    """None: nothing is split. Raises where it is, but not so that these processes could be one
    rank.
    """
    configs = {
        name: module._parallel_config
        for name, module in denoisers_of(pipe).items()
        if getattr(module, "_parallel_config", None) is not None
    }
    if not configs:
        return None
    groups = {name: _ranks_of(name, config) for name, config in configs.items()}
    if len(set(groups.values())) > 1:
        raise _core.UnsupportedError(
            f"{' and '.join(groups)} are split over different processes: they must be the same"
        )
    for name in configs:
        _check_hooks(name, getattr(pipe, name))
    return Context(tuple(sorted(groups)), next(iter(groups.values())))


def _ranks_of(name: str, config: Any) -> tuple[int, ...]:
    split = getattr(config, "context_parallel_config", None)
    mesh = getattr(split, "_flattened_mesh", None)
    if mesh is None:
        raise _core.UnsupportedError(
            f"{name} is split over processes (enable_parallelism) in another way than by a "
            "ContextParallelConfig, which alone can be combined with steps"
        )
    return tuple(sorted(torch.distributed.get_process_group_ranks(mesh.get_group())))


def _check_hooks(name: str, module: torch.nn.Module) -> None:
    """Others than the context's keep something of a forward, or of the loop around it, of which the
    other processes see nothing.
    """
    for part in module.modules():
        hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
        others = [key for key, hook in hooks.items() if type(hook).__module__ != _HOOKS]
        if others:
            raise _core.UnsupportedError(
                f"{name} is split over processes and has other hooks of diffusers, which cannot be "
                f"combined with steps: {', '.join(others)}"
            )


def stand_ins(
    pipe: Any, names: tuple[str, ...], enter: Callable[..., Any]
) -> dict[str, torch.nn.Module]:
    """For a replica: modules like those that are split, with the same weights, whose forward is
    `enter(name, args, kwargs)`. A copy would have hooks that hold the original.
    """
    found = {}
    for name in names:
        twin = twin_of(getattr(pipe, name), {})
        for part in twin.modules():
            for attribute in ("_diffusers_hook", "_compiled_call_impl"):
                vars(part).pop(attribute, None)
        vars(twin)["forward"] = _forward(name, enter)
        found[name] = twin
    return found


def _forward(name: str, enter: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return enter(name, args, kwargs)

    return forward


def node_mesh(n: int, ring: int = 1) -> Any:
    """The `torch.distributed.device_mesh.DeviceMesh` for context groups of `n` processes.

    Processes in a row are a group, so that with as many of them on each machine its links are
    within one: `ContextParallelConfig(ulysses_degree=n, mesh=parastep.node_mesh(n))`. Every process
    of the launcher has to call it; where torch.distributed has not begun, it begins by this.

    Args:
        n: processes of a group, as many as the config's degrees multiplied.
        ring: its `ring_degree`, a divisor of n; the rest is `ulysses_degree`.

    Raises:
        InvalidError: n does not divide the number of processes, or ring does not divide n.
        StateError: there is no launcher, and no group of processes.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if type(n) is not int or n < 1 or type(ring) is not int or ring < 1 or n % ring:
        raise _core.InvalidError(f"n={n!r}, ring={ring!r}: must be whole, and ring divide n")
    dist = torch.distributed
    try:
        if not dist.is_initialized():
            dist.init_process_group()
    except Exception as error:
        raise _core.StateError(
            "node_mesh: there is no group of processes; start the script with torchrun, or call "
            "torch.distributed.init_process_group first"
        ) from error
    world = dist.get_world_size()
    if world % n:
        raise _core.InvalidError(f"n={n}: {world} processes are no whole number of groups of {n}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    all_ranks = torch.arange(world).reshape(world // n, ring, n // ring)
    mesh = DeviceMesh(device, all_ranks, mesh_dim_names=("steps", "ring", "ulysses"))
    return mesh["ring", "ulysses"]
