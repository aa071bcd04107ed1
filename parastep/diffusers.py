"""diffusers: `pipe = parastep.parallelize(pipe, devices=[...])`, then `pipe(...)` as before.

The pipeline's own `__call__` runs on every rank; `leading` and `following` hold the hooks. Nothing
is patched between calls, no class is touched, and the pipe is as it was after every call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import _core
from .api import check_stride, describe, warn_of
from .call import Call
from .following import Following
from .leading import Leading
from .noise import cloned_generator, cloned_global_generator
from .replicas import denoisers_of, fingerprint, offloaded, replicate
from .report import Report
from .seam import Hooks
from .threads import HostContext

_CALLBACKS = ("callback_on_step_end", "callback")
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
        tolerance, policy, warmup, order, deadline, on_failure: as for `parastep.sample`; tolerance
        0
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
        raise _core.DeviceError(f"devices: the first is {found[0]}, but the pipe is on {home}")
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
        name = type(self.pipe).__name__
        return f"<parastep.ParallelPipeline: {name} on {len(self.devices)} ranks>"

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
        try:
            bound = inspect.signature(type(self.pipe).__call__).bind(self.pipe, *args, **kwargs)
        except TypeError:
            return self.pipe(*args, **kwargs)  # raises what it would without us
        began = time.perf_counter()
        ranks, reason = len(self.devices), self._ready()
        call, hooks = Call(ranks if reason is None else 1), Hooks()
        leading = Leading(self.pipe, call, bound.arguments.get("generator"), self._options)
        if reason is not None:
            leading.give_up(reason)
        leading.active = leading.active and ranks > 1
        threads: dict[int, threading.Thread] = {}
        try:
            if leading.active:
                threads = self._start_followers(call, self._followers_arguments(bound))
            for name in _CALLBACKS:
                if leading.active and bound.arguments.get(name) is not None:
                    bound.arguments[name] = leading.watched(bound.arguments[name])
            with _quiet_followers():
                leading.place(hooks)
                result = self.pipe(*bound.args[1:], **bound.kwargs)
        finally:
            hooks.restore()
            if leading.leader is not None:
                leading.leader.finish()
            call.end()
            self._gather_threads(threads, leading)
            self.report = self._reported(leading, time.perf_counter() - began)
        warn_of(self.report, stacklevel=4)
        return result

    def _ready(self) -> str | None:
        """Replicas of the pipe as it is now, or why there can be none."""
        if len(self.devices) == 1:
            return None
        reason = offloaded(self.pipe)
        if reason is None:
            try:
                self._refresh()
            except Exception as error:  # a component that cannot be copied
                reason = f"replicas of the pipeline cannot be made: {describe(error)}"
        return reason

    @staticmethod
    def _followers_arguments(bound: inspect.BoundArguments) -> dict[str, Any]:
        """The call's arguments by name, for replicas: callbacks are the leader's, generators
        clones.
        """
        named = dict(bound.arguments)
        named.pop("self", None)
        named.update(named.pop("kwargs", {}))
        for name in _CALLBACKS:
            named.pop(name, None)
        if "generator" in named:
            named["generator"] = cloned_generator(named["generator"])
        return named

    def _refresh(self) -> None:
        """Replicas of the pipe as it is now: made again where its weights or modules changed."""
        now = fingerprint(self.pipe)
        if now != self._made_from:
            self._replicas.clear()
            self._made_from = now
        for rank, device in enumerate(self.devices[1:], 1):
            if rank not in self._replicas:
                self._replicas[rank] = replicate(self.pipe, device)

    def _start_followers(
        self, call: Call, arguments: dict[str, Any]
    ) -> dict[int, threading.Thread]:
        context, threads = HostContext(), {}
        for rank, device in enumerate(self.devices[1:], 1):
            replica = self._replicas[rank]
            replica.scheduler = copy.deepcopy(self.pipe.scheduler)
            following = Following(replica, rank, call, device)
            body = functools.partial(following.run, arguments, cloned_global_generator(device))
            # The leader keeps its own number of threads, which its bits may depend on.
            intraop = 1 if device.type == "cpu" else None
            threads[rank] = context.start(body, f"parastep-{rank}", intraop)
        return threads

    def _gather_threads(self, threads: dict[int, threading.Thread], leading: Leading) -> None:
        """Waits for those that are about to leave; a replica whose thread hangs is not used again.
        """
        lost = set()
        if leading.leader is not None:
            lost = {line[0] for line in leading.leader.report()["failures"]}
        for rank, thread in threads.items():
            thread.join(timeout=0.05 if rank in lost else 10.0)
            if thread.is_alive():
                self._replicas.pop(rank, None)

    def _reported(self, leading: Leading, seconds: float) -> Report:
        """The core's report with times from the call's beginning, and what ran without the core."""
        if leading.leader is None:
            report = Report(ranks=len(self.devices), evaluations=[0] * len(self.devices))
        else:
            report = Report.from_core(leading.leader.report())
            report.timeline = [
                r._replace(begin=r.begin + leading.opened, end=r.end + leading.opened)
                for r in report.timeline
            ]
        alone = leading.evaluated - report.rounds
        report.accepted = report.accepted + [1] * max(alone, 0)
        report.steps = leading.steps
        report.rounds = report.evaluations[0] = leading.evaluated
        report.drift = (report.drift + [math.nan] * report.steps)[: report.steps]
        report.seconds, report.fallback = seconds, leading.reason
        return report


@contextlib.contextmanager
def _quiet_followers() -> Iterator[None]:
    """Messages come from the leader alone, once."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    quiet = _FollowersAreQuiet()
    for handler in handlers:
        handler.addFilter(quiet)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(quiet)
