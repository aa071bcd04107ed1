"""What the tests of the diffusers adapter share: hosts, their own results, and comparisons."""

from __future__ import annotations

import dataclasses
import functools
import math
import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch

import parastep
from parastep.diffusers.replicas import AsMade

torch.set_num_threads(1)


@functools.cache
def host(name: str) -> Any:
    """The pipeline of a case, one for all tests of a process: leave it as you find it."""
    return tiny.case_of(name).build()


@dataclass
class Own:
    """What an untouched pipeline makes of a call, and what it leaves behind."""

    result: torch.Tensor
    generator: torch.Tensor  # its state at the end
    scheduler: dict[str, Any]
    forwards: int
    steps: int


@functools.cache
def own(name: str, steps: int | None = None, decode: bool = False) -> Own:
    """The untouched run of a case that `call` is to equal."""
    case, pipe = tiny.case_of(name), host(name)
    kwargs = case.kwargs(steps=steps, decode=decode)
    with tiny.count_forwards(*tiny.denoisers(pipe)) as count:
        with count_iterations(pipe, count) as iterations:
            result = tiny.run(pipe, kwargs)
    state = kwargs["generator"].get_state()
    return Own(result, state, frozen(pipe.scheduler), count.own, iterations[0])


def devices(ranks: int) -> list[str]:
    return ["cpu"] * ranks


def parallel(pipe: Any, ranks: int = 4, tolerance: Any = 0.0, **options: Any) -> Any:
    """Every step evaluated by some rank, unless the test says otherwise. Tolerance 0 is rehearsed:
    rounds are run, and none of their answers is used.
    """
    options.setdefault("max_stride", 1)
    tolerance = "rehearse" if tolerance == 0 else tolerance
    return parastep.parallelize(pipe, devices(ranks), tolerance=tolerance, **options)


def set_options(together: Any, **options: Any) -> None:
    """Other options for the calls to come."""
    together._options = dataclasses.replace(together._options, **options)


def settle(replica: Any) -> None:
    """What was done to it since it was made stays when a follower goes back."""
    type(replica).as_made = AsMade(replica)


def threads() -> list[str]:
    """The names of followers' threads that are still there."""
    return [t.name for t in threading.enumerate() if t.name.startswith("parastep-")]


def children() -> set[int]:
    """Processes that this one has started and not reaped, zombies too."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found - {p.pid for p in multiprocessing.active_children() if p.pid}


def rounds_without_limit(steps: int, ranks: int) -> int:
    return 1 + math.ceil((steps - 1) / ranks)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance of a from b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@contextmanager
def count_steps(pipe: Any) -> Iterator[list[int]]:
    """[how often the pipe's scheduler stepped]; undone at the end."""
    count, original = [0], pipe.scheduler.step

    @functools.wraps(original.__func__)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += self is pipe.scheduler  # and no copy of it
        return original.__func__(self, *args, **kwargs)

    vars(pipe.scheduler)["step"] = counted.__get__(pipe.scheduler)
    try:
        yield count
    finally:
        del vars(pipe.scheduler)["step"]


@contextmanager
def count_iterations(pipe: Any, forwards: Any) -> Iterator[list[int]]:
    """[how often the pipe's scheduler stepped, or copies of it, after forwards]; undone at the end.
    Calls of step without a forward between them are of one iteration.
    """
    count, seen, original = [0], [0], pipe.scheduler.step

    @functools.wraps(original.__func__)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += forwards.own > seen[0]
        seen[0] = forwards.own
        return original.__func__(self, *args, **kwargs)

    vars(pipe.scheduler)["step"] = counted.__get__(pipe.scheduler)
    try:
        yield count
    finally:
        del vars(pipe.scheduler)["step"]


@contextmanager
def no_warnings() -> Iterator[None]:
    """Within, a warning of ours is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", parastep.FollowerWarning)
        warnings.simplefilter("error", parastep.SerialWarning)
        yield


@contextmanager
def caught() -> Iterator[list[str]]:
    """The texts of our warnings within."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield texts
    ours = (parastep.FollowerWarning, parastep.SerialWarning)
    texts += [str(w.message) for w in seen if issubclass(w.category, ours)]


def frozen(value: Any) -> Any:
    """A value as plain data that compares by content."""
    if isinstance(value, torch.Tensor):
        numbers = value.double().nan_to_num(nan=math.pi)  # NaN does not equal itself
        return (str(value.dtype), tuple(value.shape), numbers.tolist())
    if isinstance(value, np.ndarray):
        return frozen(torch.from_numpy(value))
    if isinstance(value, dict):
        return {k: frozen(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(v) for v in value]
    if type(value).__module__.startswith("diffusers.schedulers"):
        return frozen(vars(value))
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value)


def attributes(pipe: Any) -> dict[str, set[str]]:
    """The names in the pipe, in every module of it and in its scheduler."""
    found = {"pipe": set(vars(pipe)), "scheduler": set(vars(pipe.scheduler))}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            found |= {f"{name}.{path}": set(vars(m)) for path, m in part.named_modules()}
    return found
