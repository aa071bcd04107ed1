"""diffusers: `pipe = parastep.parallelize(pipe, devices=[...])`, then `pipe(...)` as before.

The pipeline's own `__call__` runs on every rank; `leading` and `following` hold the hooks. Nothing
is patched between calls, no class is touched, and the pipe is as it was after every call.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import _core
from ..api import describe, warn_of
from ..quiet import quiet_followers
from ..report.report import Report
from ..tolerance import Tolerance, number_of
from .batching import Meeting
from .call import Call
from .hooks import Hooks
from .leader import Leading
from .local import NearFollowers
from .remote.groups import Group, group_of
from .remote.link import FarFollowers
from .remote.workers import Workers
from .replicas import denoisers_of, fingerprint, refresh, replicate, split_over_processes, unfit
from .watch import Watch

_log = logging.getLogger(__name__)
_CALLBACKS = ("callback_on_step_end", "callback")
_OWN_PUBLIC = ("pipe", "devices", "report")
_OWN = (*_OWN_PUBLIC, "_options", "_batch", "_far", "_auto", "_replicas", "_made_from", "_lock",
        "_process", "_closed")  # fmt: skip


def parallelize(
    pipe: Any,
    devices: Sequence[str | torch.device] | None = None,
    *,
    tolerance: Tolerance = 0.02,
    policy: str = "verified",
    max_stride: int | None = None,
    warmup: int = 5,
    order: int = 1,
    mode: str = "auto",
    group: Any = None,
    slots: str = "auto",
    deadline: float | None = None,
    on_failure: str = "continue",
) -> ParallelPipeline:
    """A pipeline that evaluates several denoising steps at once, one on each device.

    Args:
        pipe: any diffusers pipeline with a scheduler; it stays usable by itself.
        devices: torch devices, the first the leader's, where the pipe is; repeats allowed
            (`["cpu"] * 4`). None: the pipe's own device and all others of its kind.
        tolerance, policy, warmup, order, deadline, on_failure: as for `parastep.sample`; tolerance
            0, or "exact", gives the pipeline's own result bit for bit.
        max_stride: steps from one evaluation to the next at most: 1, every step is evaluated by
            some rank; None, as far apart as the tolerance allows, so that one device gains too.
            Answers between evaluations are estimated, not verified.
        mode: "threads", "processes" (workers that are spawned by us, with the first call) or
            "auto": processes where every rank has a CUDA device of its own, since launching kernels
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

    Raises:
        InvalidError, UnsupportedError: subclasses of parastep.Error; the text says what to do.
    """
    if mode not in ("auto", "threads", "processes"):
        raise _core.InvalidError(f"mode: {mode!r}: must be 'auto', 'threads' or 'processes'")
    if group is not None and (devices is not None or mode == "threads"):
        raise _core.InvalidError("group: its processes are the ranks: leave out devices and mode")
    if slots not in ("auto", "batch"):
        raise _core.InvalidError(f"slots: {slots!r}: must be 'auto' or 'batch'")
    if slots == "batch" and (group is not None or devices is None or mode == "processes"):
        raise _core.InvalidError(
            "slots='batch': give devices, one device as often as a batch has steps, as "
            "['cuda:0'] * 4, without group and mode"
        )
    if isinstance(pipe, type) or not callable(pipe) or not hasattr(pipe, "__dict__"):
        raise _core.InvalidError(f"pipe: {type(pipe).__name__} is not a diffusers pipeline")
    if not hasattr(getattr(pipe, "scheduler", None), "step"):
        raise _core.InvalidError(f"pipe: {type(pipe).__name__} has no scheduler with a step method")
    if not denoisers_of(pipe):
        raise _core.InvalidError(f"pipe: {type(pipe).__name__} has no module that could denoise")
    if policy not in ("verified", "paper"):
        raise _core.InvalidError(f"policy: {policy!r}: must be 'verified' or 'paper'")
    if on_failure not in ("continue", "raise"):
        raise _core.InvalidError(f"on_failure: {on_failure!r}: must be 'continue' or 'raise'")
    if order not in (0, 1) or warmup < 1:
        raise _core.InvalidError(f"order {order}, warmup {warmup}: must be 0 or 1, and at least 1")
    if max_stride is not None and (not isinstance(max_stride, int) or max_stride < 1):
        raise _core.InvalidError(f"max_stride: {max_stride!r}: must be None, or 1 and above")
    if deadline is not None and not deadline > 0:
        raise _core.InvalidError(f"deadline: {deadline}: must be seconds above 0, or None")
    options = {
        "tolerance": number_of(tolerance),
        "policy": policy,
        "max_stride": max_stride,
        "warmup": warmup,
        "order": order,
        "deadline": deadline,
        "on_failure": on_failure,
    }
    batch = slots == "batch"
    home = _home_of(pipe)
    found = group_of(group, home) if devices is None and mode != "threads" else None
    if found is not None:
        try:
            _refuse_split(pipe)
        except _core.Error:
            found.close()
            raise
        return ParallelPipeline(pipe, [home] * found.size, options, found)
    places = _devices_of(home, devices)
    if batch and len(set(places)) > 1:
        named = ", ".join(dict.fromkeys(map(str, places)))
        raise _core.UnsupportedError(
            f"slots='batch': {named}: a batch is of one device, repeated; without slots each rank "
            "evaluates a step of its own"
        )
    workers = Workers(places) if _by_workers(mode, places) else None
    return ParallelPipeline(pipe, places, options, workers, batch, mode == "auto")


def _refuse_split(pipe: Any) -> None:
    """A group whose processes share each forward of a denoiser cannot have them as ranks as well:
    they would wait for each other.
    """
    name = split_over_processes(pipe)
    if name is not None:
        raise _core.UnsupportedError(
            f"{name} is split over processes (enable_parallelism) that are to be ranks of a group "
            "here: they would wait for each other; leave out one of the two"
        )


def _by_workers(mode: str, places: list[torch.device]) -> bool:
    """Whether followers are processes; "auto" has them where each rank has a device of its own."""
    if mode != "auto":
        return mode == "processes"
    return places[0].type == "cuda" and 1 < len(places) == len(set(places))


def _devices_of(
    home: torch.device, devices: Sequence[str | torch.device] | None
) -> list[torch.device]:
    if devices is None:
        kind = getattr(torch, home.type, None)
        count = kind.device_count() if kind is not None and hasattr(kind, "device_count") else 1
        own = home.index or 0
        order = [own, *(k for k in range(count) if k != own)]
        devices = [torch.device(home.type, k) if count > 1 else home for k in order]
    if isinstance(devices, (str, torch.device)) or not 0 < len(devices) <= 256:
        raise _core.InvalidError(f"devices: {devices!r}: a list is needed, as ['cuda:0', 'cuda:1']")
    try:
        found = [torch.device(device) for device in devices]
    except (RuntimeError, TypeError) as error:
        raise _core.DeviceError(f"devices: {devices!r}: {describe(error)}") from error
    if found[0].type != home.type or (found[0].index or 0) != (home.index or 0):
        raise _core.DeviceError(f"devices: the first is {found[0]}, but the pipe is on {home}")
    if any(device.type not in ("cpu", "cuda") for device in found):
        raise _core.UnsupportedError("devices: only CPU and CUDA devices so far")
    if any(device.type != home.type for device in found):
        raise _core.DeviceError(f"devices: {devices!r}: all CPU, or all CUDA devices, are needed")
    return [device if device.type == "cpu" else _numbered(device) for device in found]


def _numbered(device: torch.device) -> torch.device:
    """With its index: that of the current one where none was given."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def _home_of(pipe: Any) -> torch.device:
    """Where its denoisers' weights are; a module of the user's own need not tell its device."""
    modules = denoisers_of(pipe).values()
    return next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))


class ParallelPipeline:
    """Called like the pipe; `.report` tells of the last call. Other attributes are the pipe's own.

    A context manager; `close()` lets the replicas go and leaves the pipe as it was.
    """

    def __init__(
        self,
        pipe: Any,
        devices: list[torch.device],
        options: dict[str, Any],
        far: Workers | Group | None = None,
        batch: bool = False,
        auto: bool = False,
    ) -> None:
        self.pipe = pipe
        self.devices = devices
        self.report: Report | None = None
        self._options = options
        self._batch = batch and len(devices) > 1
        self._far = far  # where the followers are, if they are not threads
        self._auto = auto  # workers where they can be, else threads
        self._replicas: dict[int, Any] = {}
        self._made_from: int | None = None
        self._lock, self._process = threading.Lock(), os.getpid()
        self._closed = False

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
        return sorted({*super().__dir__(), *dir(self.pipe)})

    def to(self, *args: Any, **kwargs: Any) -> ParallelPipeline:
        """As the pipe's own; returns this object, as the pipe's returns the pipe."""
        self.pipe.to(*args, **kwargs)
        return self

    def __repr__(self) -> str:
        name = type(self.pipe).__name__
        return f"<parastep.ParallelPipeline: {name} on {len(self.devices)} ranks>"

    def __enter__(self) -> ParallelPipeline:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Lets the replicas go, and ends the workers; twice is fine."""
        self._replicas.clear()
        if self._far is not None:
            self._far.close()
        self._closed = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._closed:
            raise _core.StateError("this parallel pipeline is closed; parallelize the pipe again")
        if os.getpid() != self._process:  # a forked child, in which no thread is in a call
            self._lock, self._process = threading.Lock(), os.getpid()
        if not self._lock.acquire(blocking=False):
            raise _core.StateError("another thread is in a call of this pipeline; one at a time")
        try:
            if not isinstance(self._far, Group):
                return self._call(args, kwargs)
            _refuse_split(self.pipe)
            if self._far.rank == 0:
                return self._far.lead(lambda: self._call(args, kwargs), lambda: self.report)
            result, self.report = self._far.follow(self.pipe)
            return result
        finally:
            self._lock.release()

    def _call(self, args: Any, kwargs: Any) -> Any:
        try:
            bound = inspect.signature(type(self.pipe).__call__).bind(self.pipe, *args, **kwargs)
        except TypeError:
            return self.pipe(*args, **kwargs)  # raises what it would without us
        began, reason = time.perf_counter(), self._unready(bound)
        ranks = len(self.devices) if reason is None else 1
        call = Call(ranks, self.devices, self._lane and reason is None)
        if self._batch and ranks > 1:
            call.meeting = Meeting(ranks, leads=self._options["tolerance"] > 0)
        near: NearFollowers | None = None
        far: FarFollowers | None = None
        if self._far is not None and ranks > 1:
            try:
                far = self._far.followers(call, self.pipe, _without_callbacks(bound))
            except Exception as error:
                reason = f"the arguments cannot be sent to other processes: {describe(error)}"
                if self._goes_on_in_threads(reason):
                    reason = self._unready(bound)
                if reason is not None:
                    call = Call(1)
        if call.lane or (call.ranks > 1 and far is None):
            near = NearFollowers(call, self._replicas, _without_callbacks(bound))
        followers = [some for some in (near, far) if some is not None]
        generators = [named.get("generator") for named in _given(bound)]
        leading = Leading(
            self.pipe,
            call,
            next((generator for generator in generators if generator is not None), None),
            self._options,
            lambda: _start(followers),
            near.start_lane if near is not None else lambda: None,
        )
        if reason is not None:
            leading.give_up(reason)
        if leading.active:
            for named in _given(bound):
                for name in _CALLBACKS:
                    if named.get(name) is not None:
                        leading.watch = leading.watch or Watch(self.pipe, leading.give_up)
                        named[name] = leading.watch.over(named[name])
        with contextlib.ExitStack() as leaving:  # whatever one of these raises, the others are done
            leaving.callback(self._report_on, leading, followers, began)
            leaving.enter_context(quiet_followers())
            for some in followers:
                leaving.callback(_gather, some, leading)
            leaving.callback(call.end)
            leaving.callback(leading.finish)
            hooks = Hooks()
            leaving.callback(hooks.restore)
            leading.place(hooks)
            result = self.pipe(*bound.args[1:], **bound.kwargs)
            leading.complete()
        assert self.report is not None
        warn_of(self.report, stacklevel=4)
        return result

    def _unready(self, bound: inspect.BoundArguments) -> str | None:
        """Makes replicas of the pipe as it is now; returns why there can be none, or None."""
        if len(self.devices) == 1 and not self._lane:
            return None
        reason = unfit(self.pipe)
        once = [k for k, v in bound.arguments.items() if isinstance(v, Iterator)]
        if reason is None and once:
            reason = f"the argument {once[0]!r} can be read only once"
        if reason is None:
            try:
                self._refresh_far()
                self._refresh()
            except Exception as error:  # a component that cannot be copied
                reason = f"replicas of the pipeline cannot be made: {describe(error)}"
                if isinstance(self._far, Workers):
                    reason += "; mode='threads' needs no other processes"
        return reason

    @property
    def _lane(self) -> bool:
        """Whether steps ahead of the leader's loop may be evaluated on its own device."""
        options = self._options
        strides = options["max_stride"] != 1 and options["policy"] == "verified"
        return strides and options["tolerance"] > 0

    def _refresh_far(self) -> None:
        """The replicas in other processes."""
        try:
            if self._far is not None:
                self._far.refresh(self.pipe)
        except Exception as error:
            if not self._goes_on_in_threads(describe(error)):
                raise

    def _goes_on_in_threads(self, why: str) -> bool:
        """Whether ranks may be threads in place of workers; from here on they are."""
        if self._auto and self._far is not None:
            _log.warning("ranks are threads, not processes: %s", why)
            self._far.close()
            self._far = None
            return True
        return False

    def _refresh(self) -> None:
        """Replicas of the pipe as it is now: made again where its weights or modules changed."""
        now = fingerprint(self.pipe)
        if now != self._made_from:
            self._replicas.clear()
            self._made_from = now
        for rank, device in enumerate(self.devices):
            here = self._lane if rank == 0 else self._far is None
            if here and rank not in self._replicas:
                self._replicas[rank] = replicate(self.pipe, device)
        for replica in self._replicas.values():
            refresh(replica, self.pipe)

    def _report_on(
        self, leading: Leading, followers: list[NearFollowers | FarFollowers], began: float
    ) -> None:
        """The core's report with times from the call's beginning, and what ran without the core."""
        if leading.leader is None:
            report = Report(ranks=len(self.devices), evaluations=[0] * len(self.devices))
        else:
            report = Report.from_core(leading.leader.report())
            report.failures = [f._replace(step=max(f.step, 0)) for f in report.failures]
            report.timeline = [
                r._replace(begin=r.begin + leading.opened, end=r.end + leading.opened)
                for r in report.timeline
            ]
        meeting = leading.call.meeting
        alone = leading.evaluated - leading.submitted
        report.accepted = report.accepted + [1] * alone
        report.steps = leading.steps
        report.rounds += alone
        report.evaluations[0] = leading.evaluated
        for some in followers:
            for rank, evaluated in some.evaluated.items():
                own = leading.evaluated if rank == 0 else 0  # beside its lane's
                report.evaluations[rank] = own + evaluated
        report.forwards = sum(report.evaluations)
        if meeting is not None:
            report.forwards = leading.evaluated - leading.shared + meeting.forwards
            report.unbatched = meeting.unbatched
        report.drift = (report.drift + [math.nan] * report.steps)[: report.steps]
        if leading.leader is not None:
            report.transports = leading.call.transports
        report.seconds, report.fallback = time.perf_counter() - began, leading.reason
        if self._options["policy"] == "verified":
            report.tolerance = self._options["tolerance"]
        self.report = report


def _start(followers: list[NearFollowers | FarFollowers]) -> None:
    for some in followers:
        some.start()


def _gather(some: NearFollowers | FarFollowers, leading: Leading) -> None:
    some.gather(_lost(leading))


def _lost(leading: Leading) -> set[int]:
    """The ranks that were left out."""
    if leading.leader is None:
        return set()
    return {line[0] for line in leading.leader.report()["failures"]}


def _given(bound: inspect.BoundArguments) -> list[dict[str, Any]]:
    """The call's named arguments, and those that its `**kwargs` took in."""
    parameters = bound.signature.parameters.values()
    extra = (p.name for p in parameters if p.kind is p.VAR_KEYWORD)
    return [bound.arguments, *(bound.arguments[n] for n in extra if n in bound.arguments)]


def _without_callbacks(bound: inspect.BoundArguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) for a replica; callbacks are the leader's alone."""
    arguments, parameters = OrderedDict(bound.arguments), bound.signature.parameters
    for name in _CALLBACKS:
        if name in arguments:
            default = parameters[name].default
            arguments[name] = None if default is inspect.Parameter.empty else default
    bound = inspect.BoundArguments(bound.signature, arguments)
    kwargs = {k: v for k, v in bound.kwargs.items() if k in parameters or k not in _CALLBACKS}
    return bound.args[1:], kwargs
