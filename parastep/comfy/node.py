"""ComfyUI: `model = parastep.comfy.patch(model, devices)`, and any stock sampler node behind it.

The patch is a wrapper around the sampler of a run (`WrappersMP.SAMPLER_SAMPLE`), so whatever else
the graph has done to the model stays, and KSampler, SamplerCustom and guiders run as they are: the
host's own sampler function, with its noise scaling, masks, callbacks and previews. Only what it
calls as its model is a `sampling.Sampling` here. Replicas for other devices are the host's own
multi-GPU clones where it has them. Used by the node pack in `nodes/`; imports the host when called.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

from .. import _core
from ..options import Options
from ..report import Report
from ..tolerance import Tolerance, number_of
from .host import ComfyHost
from .lanes import Lane, make_lanes
from .places import devices_of
from .replicas import Replicas, add_replicas, patcher_on
from .rows import rows_of
from .sampling import Sampling
from .serial import reason_against
from .state import Look
from .telling import picture, words

KEY = "parastep"  # of the wrappers on a patched model

_log = logging.getLogger(__name__)


def patch(
    model: Any,
    devices: str | Sequence[str | torch.device] = "auto",
    *,
    tolerance: Tolerance = "balanced",
    policy: str = "verified",
    max_stride: int | None = None,
    warmup: int = 5,
    order: int = 1,
    deadline: float | None = None,
    on_failure: str = "continue",
) -> Any:
    """A clone of the ModelPatcher under which samplers evaluate several steps at once, and take
    those between from the outputs around them where the tolerance allows: one device gains too.

    `devices`: the first is the model's own, repeats allowed; also as one string, "cuda:0, cuda:1",
    or "auto", all that the host sees. A device without room for a replica is left out, with a
    warning. The other arguments are those of `parastep.options.Options`; at a `max_stride` of 1
    every step is evaluated, and one device gains nothing.

    Raises InvalidError, DeviceError, UnsupportedError: subclasses of parastep.Error; the text says
    what to do.
    """
    if not all(hasattr(model, name) for name in ("add_wrapper_with_key", "load_device", "clone")):
        raise _core.InvalidError(f"model: {type(model).__name__} is not a ComfyUI MODEL")
    options = Options(tolerance, policy, max_stride, warmup, order, deadline, on_failure)
    model = model.clone()
    found = devices_of(model, devices)
    if not options.untouched:
        found = add_replicas(model, found)
    steps = ParaStep(found, options)
    wrappers = _wrappers()
    for kind in (wrappers.SAMPLER_SAMPLE, wrappers.PREPARE_SAMPLING):
        model.wrappers.get(kind, {}).pop(KEY, None)  # of a node before this one
    model.add_wrapper_with_key(wrappers.SAMPLER_SAMPLE, KEY, steps)
    if not options.untouched:
        model.add_wrapper_with_key(wrappers.PREPARE_SAMPLING, KEY, steps.replicas.prepare)
    return model


def of_model(model: Any) -> ParaStep | None:
    """What `patch` put on a model, or on the model that it was made from; None: nothing."""
    found = model.wrappers.get(_wrappers().SAMPLER_SAMPLE, {}).get(KEY, [])
    return found[-1] if found else None


def told(model: Any) -> tuple[str, torch.Tensor]:
    """The last run of a patched model in words, and its timeline as an image (1, H, W, 3) in 0..1.

    Raises InvalidError where the model has no patch, StateError where it has not run.
    """
    steps = of_model(model)
    if steps is None:
        raise _core.InvalidError("this model has not been through a ParaStep node: put one in")
    if steps.report is None:
        raise _core.StateError("this model has not been sampled yet: put the node behind a sampler")
    return words(steps.report), picture(steps.report)


def _wrappers() -> Any:
    from comfy.patcher_extension import WrappersMP

    return WrappersMP


class ParaStep:
    """The wrapper: one for each patch, shared by all clones of its model. `report` is the last run.

    Called by the host in place of the sampler's `sample`, with the models loaded and the
    conditioning processed.
    """

    def __init__(self, devices: list[torch.device], options: Options) -> None:
        self.devices, self.options = devices, options
        self.replicas = Replicas(devices)
        self.report: Report | None = None

    def __deepcopy__(self, memo: Any) -> ParaStep:
        return self  # the host copies model options deeply; the report is to be found again

    def __call__(self, executor: Any, guider: Any, sigmas: Any, *args: Any, **kwargs: Any) -> Any:
        sampler = executor.class_obj
        if not hasattr(sampler, "sampler_function"):
            reason = f"the sampler {type(sampler).__name__} has a loop of its own, not ComfyUI's"
            self._tell(Report(ranks=1, fallback=reason))
            return executor(guider, sigmas, *args, **kwargs)
        own, stock = copy.copy(sampler), sampler.sampler_function
        # By its name the host's log and other wrappers know what samples.
        own.sampler_function = functools.wraps(stock)(
            functools.partial(self._sample, stock, guider)
        )
        inner = type(executor)(own.sample, own, executor.wrappers, executor.idx + 1)
        return inner.execute(guider, sigmas, *args, **kwargs)

    def _sample(
        self,
        stock: Any,
        guider: Any,
        model: Any,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any = None,
        disable: Any = None,
        **options: Any,
    ) -> torch.Tensor:
        """In place of the stock sampler function, which runs in here."""
        reason: str | None = None
        lanes: list[Lane] = []
        host = ComfyHost(model, extra_args)
        tolerance = host.share * number_of(self.options.tolerance)
        run_options = dataclasses.replace(self.options, tolerance=tolerance)
        several = len(self.devices) > 1 and not run_options.untouched
        if several or run_options.strides:
            model_options = extra_args.get("model_options", {})
            reason = reason_against(guider, model_options)
            if reason is None:
                host.look = Look(guider.inner_model, guider, model_options, shared=several)
                reason = host.look.reason
        if several and reason is None:
            patcher = functools.partial(
                patcher_on, guider.model_patcher, extra_args.get("model_options", {})
            )
            devices, short = self.replicas.with_room()
            lanes, missing = make_lanes(model, extra_args, devices, patcher)
            for line in dict.fromkeys([*short, *missing]):
                _log.warning("ParaStep: %s", line)
        run = Sampling(model, lanes, run_options, host, reason)
        rows = functools.partial(rows_of, stock, model, sigmas, extra_args, options)
        arguments = host.alone(extra_args, bool(lanes))
        try:
            return run.run(
                stock, x, sigmas, arguments, options, rows, callback=callback, disable=disable
            )
        finally:
            if host.look is not None and (kept := host.look.end()) is not None:
                run.give_up(kept)
            report, asked = run.report, len(self.devices)
            if run_options.untouched:
                report.add_idle(asked, run_options.idle_reason(asked))
            self._tell(report)

    def _tell(self, report: Report) -> None:
        self.report = report
        _log.info("ParaStep: %s", report)
        for line in report.failures:
            name = f"rank {line.rank} was left out at step {line.step} ({line.status})"
            _log.warning("ParaStep: %s: %s", name, line.text)
        if report.fallback is not None:
            _log.warning("ParaStep: running serially: %s", report.fallback)
