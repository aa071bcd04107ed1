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
from .conditions import nothing_to_share
from .host import ComfyHost
from .lanes import Lane, make_lanes
from .options import split_by_graph
from .places import Place, Places, places_of
from .places import Team as Devices
from .replicas import Replicas, add_replicas, patcher_on
from .rows import rows_of
from .sampling import Sampling
from .serial import reason_against
from .sharing import EXACT, Sharing, no_split
from .state import Look
from .telling import picture, words

KEY = "parastep"  # of the wrappers on a patched model

_log = logging.getLogger(__name__)


def patch(
    model: Any,
    devices: str | Sequence[Place | Sequence[Place]] = "auto",
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

    `devices`: the first is the model's own, repeats allowed; also as one string, "cuda:0, cuda:1".
    Tuples, or "cuda:0+cuda:1, cuda:2+cuda:3", are ranks of several devices, which share out the
    conditions of each step (`teams`); where there is one condition a step, each is a rank of its
    own. "auto" is all that the host sees, in pairs where a step has several conditions. A device
    without room for a replica is left out, with a warning. The other arguments are those of
    `parastep.options.Options`; at a `max_stride` of 1 every step is evaluated, and one device gains
    nothing.

    Raises InvalidError, DeviceError, UnsupportedError: subclasses of parastep.Error; the text says
    what to do.
    """
    if not all(hasattr(model, name) for name in ("add_wrapper_with_key", "load_device", "clone")):
        raise _core.InvalidError(f"model: {type(model).__name__} is not a ComfyUI MODEL")
    options = Options(tolerance, policy, max_stride, warmup, order, deadline, on_failure)
    model = model.clone()
    places = places_of(model, devices)
    if not options.untouched:
        places = places.with_devices(add_replicas(model, places.devices))
    steps = ParaStep(places, options)
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

    def __init__(self, places: Places, options: Options) -> None:
        self.places, self.options = places, options
        self.no_split = no_split() if places.may_share else None
        shared = places.may_share and self.no_split is None
        self.replicas = Replicas(places.devices, shared)
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
        host = ComfyHost(model, extra_args)
        tolerance = host.share * number_of(self.options.tolerance)
        run_options = dataclasses.replace(self.options, tolerance=tolerance)
        model_options = extra_args.get("model_options", {})
        reason = self._look(host, guider, model_options, run_options)
        ranks: list[Devices] = [(guider.model_patcher.load_device,)]
        lanes: list[Lane] = []
        why = reason or self.no_split
        if self._several(run_options) and reason is None:
            why = why or nothing_to_share(guider, model_options, sigmas)
            ranks, lanes = self._share_out(host, model, extra_args, run_options, why is None)
        run = Sampling(model, lanes, run_options, host, reason)
        rows = functools.partial(rows_of, stock, model, sigmas, extra_args, options)
        arguments = host.arguments(extra_args, bool(lanes))
        try:
            return run.run(
                stock, x, sigmas, arguments, options, rows, callback=callback, disable=disable
            )
        finally:
            if host.look is not None and (kept := host.look.end()) is not None:
                run.give_up(kept)
            report = run.report
            if host.sharing is not None and self.places.may_share:
                host.sharing.tell(report, ranks, why, run.began)
            self._limit(report, run_options, arguments.get("model_options", {}))
            self._tell(report)

    def _several(self, options: Options) -> bool:
        return len(self.places.devices) > 1 and not options.untouched

    def _look(
        self, host: ComfyHost, guider: Any, model_options: dict[str, Any], options: Options
    ) -> str | None:
        """Why the run is to be serial, as far as can be read."""
        several = self._several(options)
        if not several and not options.strides:
            return None
        reason = reason_against(guider, model_options)
        if reason is None:
            host.look = Look(guider.inner_model, guider, model_options, shared=several)
            reason = host.look.reason
        return reason

    def _share_out(
        self,
        host: ComfyHost,
        model: Any,
        extra_args: dict[str, Any],
        options: Options,
        share: bool,
    ) -> tuple[list[Devices], list[Lane]]:
        """The devices of each rank that there is room for, and the followers' lanes."""
        guider = model.inner_model
        patcher = functools.partial(
            patcher_on, guider.model_patcher, extra_args.get("model_options", {})
        )
        assert host.look is not None
        room, short = self.replicas.with_room()
        wanted, idle = self.places.shared_out(room, share)
        host.sharing = sharing = Sharing(guider, patcher, options, host.interrupt)
        sharing.lead(wanted[0], host.look.needed, host.look.changed)
        lanes, missing = make_lanes(model, extra_args, wanted[1:], patcher, sharing.follow)
        sharing.number([lane.team for lane in lanes])
        for line in dict.fromkeys([*short, *idle, *missing]):
            _log.warning("ParaStep: %s", line)
        return [wanted[0], *(lane.devices for lane in lanes)], lanes

    def _limit(self, report: Report, options: Options, model_options: dict[str, Any]) -> None:
        """What kept the run from being faster, and a split that is the graph's own."""
        if options.untouched:
            ranks = self.places.ranks
            report.add_idle(ranks, options.idle_reason(ranks))
            if any(len(team) > 1 for team in self.places.teams):
                report.limit = f"{report.limit}; {EXACT}"
        split = split_by_graph(model_options)
        if split:
            text = f"the graph's own MultiGPU CFG Split goes on over {' + '.join(map(str, split))}"
            report.limit = f"{report.limit}; {text}" if report.limit else text

    def _tell(self, report: Report) -> None:
        self.report = report
        _log.info("ParaStep: %s", report)
        for line in report.failures:
            name = f"rank {line.rank} {line.became} at step {line.step} ({line.status})"
            _log.warning("ParaStep: %s: %s", name, line.text)
        if report.fallback is not None:
            _log.warning("ParaStep: running serially: %s", report.fallback)
