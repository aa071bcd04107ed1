"""Modules that were compiled in place (`module.compile()`), and how: their copies are compiled too.

torch leaves the compiled call out of what it copies or pickles. A replica that ran uncompiled would
be slower than the leader, and round in another way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..messages import describe
from .parts import denoisers_of

_log = logging.getLogger(__name__)

_Context = torch._dynamo.eval_frame._TorchDynamoContext
Compiled = dict[tuple[str, str], dict[str, Any]]


def is_compiled_in_place(module: torch.nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether it, or a part of it, was compiled in whatever way: such code would trace into a hook
    or a mode of ours.
    """
    return any(
        is_compiled_in_place(part)
        or hasattr(part, "_orig_mod")
        or hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable")
        for part in module.modules()
    )


def compiled_parts(pipe: Any) -> Compiled:
    """What of its denoisers was compiled in place, by component and path, with the arguments of
    `compile`; without those whose arguments cannot be told, which is logged.
    """
    found: Compiled = {}
    for name, path, part in _parts_of(pipe):
        if is_compiled_in_place(part):
            try:
                found[name, path] = _arguments(_context_of(part))
            except Exception as error:  # what torch keeps there is its own business
                where = f"{name}.{path}".rstrip(".")
                _log.warning("replicas run %s uncompiled: %s", where, describe(error))
    return found


def compile_parts(replica: Any, compiled: Compiled) -> None:
    """Compiles the same parts of a copy of that pipe alike, when they are first called."""
    for name, path, part in _parts_of(replica):
        if (name, path) in compiled:
            part.compile(**compiled[name, path])


def unfit_for_threads(pipe: Any) -> str | None:
    """Why its compiled code would fail in threads of ours, or None: before 2.13 torch keeps what it
    knows of its CUDA graphs for threads that it has started itself.
    """
    if _release(torch.__version__) >= (2, 13) or not _captures_graphs(pipe):
        return None
    return (
        f"its denoiser is compiled with CUDA graphs, which torch {torch.__version__} cannot run in "
        "other threads: use mode='processes', torch 2.13, or compile it with "
        "mode='max-autotune-no-cudagraphs'"
    )


def _home(pipe: Any) -> str:
    weights = (p for module in denoisers_of(pipe).values() for p in module.parameters())
    return next((weight.device.type for weight in weights), "cpu")


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def _captures_graphs(pipe: Any) -> bool:
    """Whether a denoiser was compiled to run as CUDA graphs of torch's (mode="reduce-overhead")."""
    if _home(pipe) != "cuda":  # the code for a CPU has none
        return False
    for _, _, part in _parts_of(pipe):
        if is_compiled_in_place(part) or hasattr(part, "dynamo_ctx"):
            try:
                options = _arguments(_context_of(part)).get("options") or {}
            except Exception:
                continue
            if options.get("triton.cudagraphs"):
                return True
    return False


def _parts_of(pipe: Any) -> Iterator[tuple[str, str, torch.nn.Module]]:
    for name, module in denoisers_of(pipe).items():
        for path, part in module.named_modules():
            yield name, path, part


def _context_of(part: torch.nn.Module) -> Any:
    """torch's object that knows how a module was compiled."""
    if hasattr(part, "dynamo_ctx"):
        return part.dynamo_ctx
    call: Callable[..., Any] = vars(part)["_compiled_call_impl"]
    held = (cell.cell_contents for cell in call.__closure__ or ())
    found = next((value for value in held if isinstance(value, _Context)), None)
    if found is None:
        raise RuntimeError(f"torch {torch.__version__} does not tell how it was compiled")
    return found


def _arguments(context: Any) -> dict[str, Any]:
    """Of `torch.compile`, of which the context keeps what its backend was made with."""
    backend = context.callback
    for name in ("_torchdynamo_orig_callable", "_torchdynamo_orig_backend"):
        while hasattr(backend, name):
            backend = getattr(backend, name)
    fullgraph = bool(getattr(context, "fullgraph", False) or getattr(context, "nopython", False))
    how = {"fullgraph": fullgraph, "dynamic": backend.dynamic}
    if hasattr(backend, "compiler_fn"):
        return {**how, "backend": backend.compiler_fn, **backend.kwargs}
    return {**how, "backend": backend.compiler_name, "options": dict(backend.config) or None}
