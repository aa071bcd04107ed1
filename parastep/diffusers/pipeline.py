"""diffusers: `pipe = parastep.parallelize(pipe, devices=[...])`, then `pipe(...)` as before.

What a user holds. `ranks` is where its ranks are, `run` one call of it: there the pipeline's own
`__call__` runs on every rank. Nothing is patched between calls, no class is touched, and the pipe
is as it was after every call.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .. import _core
from ..messages import warn_of
from ..options import Options
from ..report import Report
from ..tolerance import Tolerance
from .claims import called, check_busy, claimed
from .parts import denoisers_of
from .places import Place, ranks_of
from .ranks import Ranks
from .run import Run

_OWN_PUBLIC = ("pipe", "report")
_OWN = (*_OWN_PUBLIC, "_ranks", "_options", "_busy", "_closed")


def parallelize(
    pipe: Any,
    devices: Sequence[Place | tuple[Place, ...]] | None = None,
    *,
    split: str | int | None = None,
    tolerance: Tolerance = "balanced",
    policy: str = "verified",
    max_stride: int | None = None,
    warmup: int = 5,
    order: int = 1,
    mode: str = "auto",
    group: Any = None,
    slots: str = "auto",
    deadline: float | None = None,
    on_failure: str = "continue",
    busy: str = "serial",
) -> ParallelPipeline:
    """A pipeline that evaluates several denoising steps at once, one on each device.

    Args:
        pipe: any diffusers pipeline with a scheduler; it stays usable by itself. One that is
            parallel already gives another one around the same pipeline.
        devices: torch devices, the first the leader's, where the pipe is; repeats allowed
            (`["cpu"] * 4`). None: the pipe's own device and all others of its kind. A tuple is one
            rank of several devices, `[("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")]`: a head that
            runs the loop and helpers that are given a share of each forward (`diffusers.teams`).
        split: how devices in a row make ranks. A number: as many for each rank. "auto": two where
            the call is guided, so that there is something to share, else one, each call anew.
            "none": one. None: "auto" where `devices` is None, else "none". In a group, as many
            processes for each rank, which all have to say the same; None is "none" there.
        tolerance, policy, max_stride, warmup, order, deadline, on_failure: as in
            `parastep.options.Options`; tolerance 0, or "exact", is the pipeline untouched, but that
            a team's helpers are given calls of it, bit for bit.
        mode: "threads", "processes" (workers that are spawned by us, with the first call) or
            "auto": processes where all are CUDA devices, each named once, since launching kernels
            holds Python's lock, and threads elsewhere, or where the pipeline cannot be sent.
        group: ranks are the processes of this group, which all call parallelize and then the
            pipeline: a torch.distributed group or an mpi4py communicator. None with devices None:
            the group of the launcher (torchrun, mpirun) that started this script, if there is one.
        slots: "auto", one evaluation a rank and round; "batch", where `devices` is one device
            repeated: its ranks evaluate the steps of a round in one forward, as
            `report.forwards` counts. What the pipeline itself asks for is part of it, but never at
            tolerance 0. "auto" never batches: whether it pays depends on how busy one step keeps
            the device. A denoiser that takes no batch goes on with one step at a time, and
            `report.unbatched` says why.
        busy: what a call does whose modules are in another parallel call's use, in another thread:
            "serial", it runs one step after another, with the reason; "wait", for its turn, first
            come first served; "raise", StateError. A second call of one and the same parallel
            pipeline waits or raises. `.report` tells of the call that ended last.

    Raises:
        InvalidError, UnsupportedError: subclasses of parastep.Error; the text says what to do.
    """
    if isinstance(pipe, ParallelPipeline):  # a notebook's cell, run again
        pipe = pipe.pipe
    _check_pipeline(pipe)
    options = Options(tolerance, policy, max_stride, warmup, order, deadline, on_failure)
    ranks = ranks_of(pipe, devices, split, mode, group, slots)
    return ParallelPipeline(pipe, ranks, options, check_busy(busy))


def _check_pipeline(pipe: Any) -> None:
    name = type(pipe).__name__
    if isinstance(pipe, type) or not callable(pipe) or not hasattr(pipe, "__dict__"):
        raise _core.InvalidError(f"pipe: {name} is not a diffusers pipeline")
    if not hasattr(getattr(pipe, "scheduler", None), "step"):
        raise _core.InvalidError(f"pipe: {name} has no scheduler with a step method")
    if not denoisers_of(pipe):
        raise _core.InvalidError(f"pipe: {name} has no module that could denoise")


class ParallelPipeline:
    """Called like the pipe; `.report` tells of the last call. Other attributes are the pipe's own,
    its class among them, by which diffusers finds what belongs to a pipeline.

    A context manager; `close()` lets the replicas go and leaves the pipe as it was. A copy, be it
    by way of a pickle, is around a copy of the pipe, with ranks of its own in the same places.
    """

    def __init__(self, pipe: Any, ranks: Ranks, options: Options, busy: str = "serial") -> None:
        self.pipe = pipe
        self.report: Report | None = None
        self._ranks, self._options, self._busy = ranks, options, busy
        self._closed = False

    @property
    def __class__(self) -> type:
        return type(self.pipe)

    @__class__.setter
    def __class__(self, value: type) -> None:
        self.pipe.__class__ = value

    def __copy__(self) -> ParallelPipeline:
        ranks = copy.copy(self._ranks)
        return ParallelPipeline(copy.copy(self.pipe), ranks, self._options, self._busy)

    def __reduce__(self) -> Any:
        return ParallelPipeline, (self.pipe, self._ranks, self._options, self._busy)

    @property
    def devices(self) -> list[torch.device]:
        """One for each rank, the leader's first: where its loop runs."""
        return self._ranks.devices

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:  # not made yet: a copy in the making
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.pipe, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.pipe, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *_OWN_PUBLIC, *dir(self.pipe)})

    def to(self, *args: Any, **kwargs: Any) -> ParallelPipeline:
        """As the pipe's own; returns this object, as the pipe's returns the pipe."""
        self.pipe.to(*args, **kwargs)
        return self

    def __repr__(self) -> str:
        name, shares = type(self.pipe).__name__, self._ranks.shares
        sizes = sorted({len(share) for share in shares})
        of = "" if sizes == [1] else f" of {'-'.join(map(str, sizes))} devices"
        return f"<parastep.ParallelPipeline: {name} on {len(shares)} ranks{of}>"

    def __enter__(self) -> ParallelPipeline:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Lets the replicas go, and ends the workers; twice is fine."""
        self._ranks.close()
        self._closed = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_closed()
        with called(self, self._busy):
            group = self._ranks.group
            if group is None:
                return self._call(args, kwargs)
            group.check(self.pipe)
            if group.rank == 0:
                return group.lead(lambda: self._call(args, kwargs), lambda: self.report)
            result, self.report = group.follow(self.pipe)
            return result

    def _refuse_closed(self) -> None:
        if self._closed:
            raise _core.StateError("this parallel pipeline is closed; parallelize the pipe again")

    def _claimed(self) -> contextlib.AbstractContextManager[str | None]:
        """Where others take part: with the reason why they cannot."""
        if self._ranks.leader_alone(self._options):
            return contextlib.nullcontext()
        return claimed(self, self.pipe, self._busy)

    def _call(self, args: Any, kwargs: Any) -> Any:
        try:
            bound = inspect.signature(type(self.pipe).__call__).bind(self.pipe, *args, **kwargs)
        except TypeError:
            return self.pipe(*args, **kwargs)  # raises what it would without us
        with self._claimed() as in_use:
            self._refuse_closed()  # while it waited
            run = Run(self.pipe, self._ranks, self._options, bound, in_use)
            try:
                result = run.go()
            finally:
                self.report = run.report
        warn_of(self.report, stacklevel=4)
        return result
