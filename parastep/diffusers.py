"""diffusers: `pipe = parastep.parallelize(pipe, devices=[...])`, then `pipe(...)` as before.

The pipeline's own `__call__` runs on every rank; `leading` and `following` hold the hooks. Nothing is
patched between calls, no class is touched, and the pipe is as it was after every call.
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import _core
from .api import check_stride, warn_of
from .call import Call
from .following import Following
from .leading import Leading
from .replicas import denoisers_of, encoders_of, fingerprint, offloaded, replicate
from .report import Report
from .seam import Hooks
from .threads import HostContext

_OWN = ("pipe", "devices", "report", "_options", "_replicas", "_made_from", "_lock", "_closed")


def parallelize(
    pipe: Any,
    devices: Sequence[str | torch.device] | None = None,
    *,
    tolerance: float = 0.02,
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
        tolerance, policy, warmup, order, deadline, on_failure: as for `parastep.sample`; tolerance 0
            gives the pipeline's own result bit for bit.
        max_stride: 1, every step is evaluated by some rank; None the same so far.
        mode: "threads" or "auto" (threads); group and other modes do not exist yet.
        slots: "auto", one evaluation a rank and round.

    Raises:
        InvalidError, UnsupportedError: subclasses of parastep.Error; the text says what to do.
    """
    check_stride(max_stride)
    if mode not in ("auto", "threads"):
        raise _core.UnsupportedError(f"mode: {mode!r}: only 'threads' (or 'auto') so far")
    if group is not None:
        raise _core.UnsupportedError("group: process groups are not supported yet; give devices")
    if slots != "auto":
        raise _core.UnsupportedError(f"slots: {slots!r}: only 'auto' so far")
    if not callable(pipe) or not hasattr(pipe, "components"):
        raise _core.InvalidError(f"pipe: {type(pipe).__name__} is not a diffusers pipeline")
    if not hasattr(getattr(pipe, "scheduler", None), "step"):
        raise _core.InvalidError(f"pipe: {type(pipe).__name__} has no scheduler with a step method")
    if not denoisers_of(pipe):
        raise _core.InvalidError(f"pipe: {type(pipe).__name__} has no module that could denoise")
    if not tolerance >= 0:
        raise _core.InvalidError(f"tolerance: {tolerance}: must be 0 (exact) or above")
    if policy not in ("verified", "paper"):
        raise _core.InvalidError(f"policy: {policy!r}: must be 'verified' or 'paper'")
    if on_failure not in ("continue", "raise"):
        raise _core.InvalidError(f"on_failure: {on_failure!r}: must be 'continue' or 'raise'")
    if order not in (0, 1) or warmup < 1:
        raise _core.InvalidError(f"order {order}, warmup {warmup}: must be 0 or 1, and at least 1")
    if deadline is not None and not deadline > 0:
        raise _core.InvalidError(f"deadline: {deadline}: must be seconds above 0, or None")
    options = {
        "tolerance": tolerance,
        "policy": policy,
        "warmup": warmup,
        "order": order,
        "deadline": deadline,
        "on_failure": on_failure,
    }
    return ParallelPipeline(pipe, _devices_of(pipe, devices), options)


def _devices_of(pipe: Any, devices: Sequence[str | torch.device] | None) -> list[torch.device]:
    home = pipe.device
    if devices is None:
        kind = getattr(torch, home.type, None)
        count = kind.device_count() if kind is not None and hasattr(kind, "device_count") else 1
        own = home.index or 0
        order = [own, *(k for k in range(count) if k != own)]
        return [torch.device(home.type, k) if count > 1 else home for k in order]
    if isinstance(devices, (str, torch.device)) or not len(devices):
        raise _core.InvalidError(f"devices: {devices!r}: a list is needed, as ['cuda:0', 'cuda:1']")
    found = [torch.device(device) for device in devices]
    if found[0].type != home.type or (found[0].index or 0) != (home.index or 0):
        raise _core.DeviceError(f"devices: the first, {found[0]}, must be where the pipe is, {home}")
    if any(device.type != "cpu" for device in found):
        raise _core.UnsupportedError("devices: only CPU devices so far")
    return found


class _FollowersAreQuiet(logging.Filter):
    """Messages come from the leader alone, once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.threadName or "").startswith("parastep-")


class ParallelPipeline:
    """Called like the pipe; `.report` tells of the last call. Other attributes are the pipe's own.

    A context manager; `close()` lets the replicas go and leaves the pipe as it was.
    """

    def __init__(
        self, pipe: Any, devices: list[torch.device], options: dict[str, Any]
    ) -> None:
        self.pipe = pipe
        self.devices = devices
        self.report: Report | None = None
        self._options = options
        self._replicas: dict[int, Any] = {}
        self._made_from: int | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["pipe"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.pipe, name, value)

    def __repr__(self) -> str:
        return f"<parastep.ParallelPipeline: {type(self.pipe).__name__} on {len(self.devices)} ranks>"

    def __enter__(self) -> ParallelPipeline:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Lets the replicas go; twice is fine."""
        self._replicas.clear()
        self._closed = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._closed:
            raise _core.StateError("this parallel pipeline is closed; parallelize the pipe again")
        if not self._lock.acquire(blocking=False):
            raise _core.StateError("another thread is in a call of this pipeline; one at a time")
        try:
            return self._call(args, kwargs)
        finally:
            self._lock.release()

    def _call(self, args: Any, kwargs: Any) -> Any:
        arguments = self._bound(args, kwargs)
        reason = offloaded(self.pipe)
        if arguments is None or reason is not None or len(self.devices) == 1:
            return self._alone(args, kwargs, reason)
        began = time.perf_counter()
        self._refresh()
        call, hooks = Call(len(self.devices)), Hooks()
        leading = Leading(self.pipe, call, arguments.get("generator"), self._options)
        threads = self._start_followers(call, arguments)
        quiet = _quiet_handlers()
        try:
            leading.place(hooks)
            return self.pipe(*args, **_watched_callbacks(kwargs, leading, hooks))
        finally:
            hooks.restore()
            if leading.leader is not None:
                leading.leader.finish()
            call.end()
            self._gather_threads(threads, leading)
            for handler, added in quiet:
                handler.removeFilter(added)
            self.report = self._reported(leading, time.perf_counter() - began)
            warn_of(self.report, stacklevel=4)

    def _bound(self, args: Any, kwargs: Any) -> dict[str, Any] | None:
        """The call's arguments by name; None where they do not fit, which the pipe itself will say."""
        try:
            bound = inspect.signature(type(self.pipe).__call__).bind(self.pipe, *args, **kwargs)
        except TypeError:
            return None
        named = dict(bound.arguments)
        named.pop("self", None)
        named.update(named.pop("kwargs", {}))
        for name in ("callback_on_step_end", "callback"):
            named.pop(name, None)  # callbacks are the leader's
        return named

    def _alone(self, args: Any, kwargs: Any, reason: str | None) -> Any:
        """Without followers; still counted, so that there is a report."""
        began = time.perf_counter()
        call, hooks = Call(1), Hooks()
        leading = Leading(self.pipe, call, kwargs.get("generator"), self._options)
        if reason is not None:
            leading.give_up(reason)
        try:
            leading.place(hooks)
            return self.pipe(*args, **kwargs)
        finally:
            hooks.restore()
            if leading.leader is not None:
                leading.leader.finish()
            self.report = self._reported(leading, time.perf_counter() - began)
            warn_of(self.report, stacklevel=4)

    def _refresh(self) -> None:
        """Replicas of the pipe as it is now: made again where its weights or modules changed."""
        now = fingerprint(self.pipe)
        if now != self._made_from:
            self._replicas.clear()
            self._made_from = now
        for rank, device in enumerate(self.devices[1:], 1):
            if rank not in self._replicas:
                self._replicas[rank] = replicate(self.pipe, device)

    def _start_followers(self, call: Call, arguments: dict[str, Any]) -> dict[int, threading.Thread]:
        import copy

        from .leading import cloned_generator
        from .noise import _clone_global

        context, threads = HostContext(), {}
        encoders = encoders_of(self.pipe)
        del encoders
        arguments = {**arguments, "generator": cloned_generator(arguments.get("generator"))}
        for rank, device in enumerate(self.devices[1:], 1):
            replica = self._replicas[rank]
            replica.scheduler = copy.deepcopy(self.pipe.scheduler)
            clones: dict[str, torch.Generator] = {"cpu": _clone_global(torch.device("cpu"))}
            following = Following(replica, rank, call, device)
            intraop = 1 if device.type == "cpu" else None
            threads[rank] = context.start(
                lambda f=following, c=clones: f.run(arguments, lambda d: c[d.type]),
                f"parastep-{rank}",
                intraop,
            )
        return threads

    def _gather_threads(self, threads: dict[int, threading.Thread], leading: Leading) -> None:
        """Waits for those that are about to leave; a replica whose thread hangs is not used again."""
        lost = set()
        if leading.leader is not None:
            lost = {line[0] for line in leading.leader.report()["failures"]}
        for rank, thread in threads.items():
            thread.join(timeout=0.05 if rank in lost else 10.0)
            if thread.is_alive():
                self._replicas.pop(rank, None)

    def _reported(self, leading: Leading, seconds: float) -> Report:
        """The core's report with times from the call's beginning; of a run that never was, the same."""
        if leading.leader is None:
            report = Report(ranks=len(self.devices), rounds=leading.steps)
            report.evaluations = [leading.steps] + [0] * (len(self.devices) - 1)
            report.accepted = [1] * leading.steps
            report.drift = [math.nan] * leading.steps
            report.steps = leading.steps
            report.fallback = leading.reason
        else:
            report = Report.from_core(leading.leader.report())
            report.timeline = [
                r._replace(begin=r.begin + leading.opened, end=r.end + leading.opened)
                for r in report.timeline
            ]
        report.seconds = seconds
        return report


def _quiet_handlers() -> list[tuple[logging.Handler, logging.Filter]]:
    placed = []
    for name in ("diffusers", "transformers"):
        for handler in logging.getLogger(name).handlers:
            quiet = _FollowersAreQuiet()
            handler.addFilter(quiet)
            placed.append((handler, quiet))
    return placed


def _watched_callbacks(kwargs: dict[str, Any], leading: Leading, hooks: Hooks) -> dict[str, Any]:
    """The same arguments, with callbacks that tell when they change what followers cannot know of."""
    return kwargs
