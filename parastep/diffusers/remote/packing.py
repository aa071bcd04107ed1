"""Python objects with tensors as bytes, and a pipeline as memory that other processes map.

torch's own serialisation does the work. Used between processes that belong together: who can write
to the pipe of a worker, or to the process group, is trusted.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ... import _core
from ..compiling import compile_parts, compiled_parts
from ..offload import forget_hooks, unhook_denoisers
from ..parts import denoisers_of, encoders_of
from ..quantised import sendable
from ..replicas import going_along, replicate, twin_of

_CALLS = ("forward", "encode", "get_text_features", "get_image_features")


def pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpack(data: bytes | bytearray, device: torch.device | None = None) -> Any:
    """What was packed; tensors that were on a device of the sender's are on `device`."""
    with _importable():
        return torch.load(io.BytesIO(data), map_location=_placed(device), weights_only=False)


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """A worker has a main module of its own: the user's script would run again in it."""
    try:
        yield
    except AttributeError as error:
        found = re.search(r"attribute '(\w+)' on <module '__main__'", str(error))
        if found is None:
            raise
        raise _core.UnsupportedError(
            f"{found[1]} is defined in the script itself, or in a notebook's cell, which other "
            "processes do not run: move it to a module of its own, or use mode='threads'"
        ) from error


def _placed(device: torch.device | None) -> Callable[[Any, str], Any]:
    def place(storage: Any, location: str) -> Any:
        away = location != "cpu" and device is not None and device.type != "cpu"
        return storage.to(device=device) if away else storage

    return place


def pipeline_to_memory(pipe: Any) -> int:
    """A descriptor of memory that holds the pipeline, to be closed; other processes map it, so that
    any number of them share one copy.

    Encoders go without their weights: a follower takes their outputs from the leader.
    """
    memory = os.memfd_create("parastep-pipeline", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(memory), "wb") as file:
            hollow = _hollow(pipe)
            torch.save((hollow, compiled_parts(pipe), going_along(hollow)), file)
    except BaseException:
        os.close(memory)
        raise
    return memory


def pipeline_from_memory(memory: int, device: torch.device) -> Any:
    """A replica on `device`, of what the descriptor holds."""
    path = f"/proc/self/fd/{memory}"
    with _importable():
        loaded, compiled, along = torch.load(
            path, map_location="cpu", mmap=True, weights_only=False
        )
    replica = replicate(loaded, device, along=along)
    compile_parts(replica, compiled)
    for name, module in encoders_of(replica).items():
        for method in _CALLS:
            if hasattr(module, method):
                vars(module)[method] = _absent(f"{name}.{method}")
    return replica


def _hollow(pipe: Any) -> Any:
    """The pipeline with encoders whose tensors take no memory, but have shapes and dtypes."""
    memo: dict[int, Any] = {}
    encoders: dict[int, Any] = {}
    for module in encoders_of(pipe).values():
        twin_of(module, encoders)
    for module in denoisers_of(pipe).values():
        memo |= dict(sendable(module.parameters()))
        memo |= {id(tensor): tensor for tensor in module.buffers()}
    for tensor in going_along(pipe):
        memo.setdefault(id(tensor), tensor.detach())
    for part in encoders.values():
        _forget_functions(part)
        for tensor in _tensors_in(part):
            memo.setdefault(id(tensor), _without_memory(tensor))
    hollow = copy.copy(pipe)
    for name, module in encoders_of(pipe).items():
        vars(hollow)[name] = encoders[id(module)]
    forget_hooks(pipe, memo)
    hollow = copy.deepcopy(hollow, memo)
    unhook_denoisers(hollow)
    for module in denoisers_of(hollow).values():
        for part in module.modules():
            vars(part).pop("extra_repr", None)  # torchao's, which cannot be pickled
    return hollow


def _tensors_in(part: torch.nn.Module) -> list[torch.Tensor]:
    """A part's own parameters, and those that it keeps as plain attributes; buffers go over."""
    own = (*part._parameters.values(), *vars(part).values())
    return [tensor for tensor in own if isinstance(tensor, torch.Tensor)]


def _forget_functions(part: torch.nn.Module) -> None:
    """What other libraries have hooked into a module that will not run; often it cannot be sent."""
    own = vars(part)
    for name in [name for name, value in own.items() if inspect.isroutine(value)]:
        del own[name]
    for name, value in own.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            own[name] = type(value)()


def _without_memory(tensor: torch.Tensor) -> Any:
    if type(tensor) not in (torch.nn.Parameter, torch.Tensor):  # quantised weights have classes
        return tensor
    one = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    if type(tensor) is torch.Tensor:
        return one
    return torch.nn.Parameter(one, requires_grad=False)


def _absent(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"a worker needs {name}, which the leader did not call before its loop; "
            "mode='threads' has it"
        )

    return call
