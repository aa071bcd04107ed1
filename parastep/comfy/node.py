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
import math
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from .. import _core
from ..options import Options
from ..report import Report
from ..tolerance import Tolerance, number_of
from ..tracing.kdiffusion import Traced, trace
from .lanes import Lane, make_lanes, without_host_split
from .replicas import Replicas, add_replicas, patcher_on
from .sampling import Host, Sampling
from .serial import reason_against
from .state import Look

KEY = "parastep"  # of the wrappers on a patched model

_log = logging.getLogger(__name__)
_traced: weakref.WeakKeyDictionary[Any, dict[Hashable, Traced]] = weakref.WeakKeyDictionary()
_TRACES = 16  # kept for each noise schedule


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


def devices_of(model: Any, devices: str | Sequence[str | torch.device]) -> list[torch.device]:
    """Torch devices of what the user wrote, the model's own first."""
    from comfy import model_management

    home = model.load_device
    if isinstance(devices, str) and devices.strip().lower() == "auto":
        others: list[Any] = [model_management.get_torch_device()]
        if hasattr(model_management, "get_all_torch_devices"):
            others = model_management.get_all_torch_devices()
        elif home.type == "cuda":
            others = [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
        return [home, *(other for other in others if _indexed(other) != _indexed(home))]
    names = devices.replace(",", " ").split() if isinstance(devices, str) else list(devices)
    if not 0 < len(names) <= 256:
        raise _core.InvalidError(f"devices: {devices!r}: write 'auto', or as 'cuda:0, cuda:1'")
    found = [_device(name, home) for name in names]
    if _indexed(found[0]) != _indexed(home):
        raise _core.DeviceError(
            f"devices: the first is {found[0]}, but the model is on {home}: begin with that one"
        )
    for device in found:
        if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
            there = ", ".join(f"cuda:{k}" for k in range(count)) or "no CUDA device"
            raise _core.DeviceError(f"devices: there is no {device}: PyTorch sees {there}")
    return [home if _indexed(device) == _indexed(home) else device for device in found]


def _device(name: str | torch.device, home: torch.device) -> torch.device:
    """Raises DeviceError where it is none, with what to write instead."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        word = str(name).lower()
    if word == "auto":
        instead = "write auto alone, for all devices that ComfyUI sees"
    elif word.isdecimal():
        kind = "cuda" if home.type == "cpu" else home.type
        instead = f"write {kind}:{word}"
    elif _is_device(word):
        instead = f"write {word}"
    else:
        instead = "write auto, or a list as cuda:0, cuda:1"
    raise _core.DeviceError(f"devices: {str(name)!r} is no device: {instead}")


def _is_device(name: str) -> bool:
    try:
        return torch.device(name) is not None
    except RuntimeError:
        return False


def _indexed(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0


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
    return _words(steps.report), _picture(steps.report)


def _words(report: Report) -> str:
    if not report.steps and report.fallback is not None:
        return f"ran serially: {report.fallback}"
    lines = [str(report), f"evaluations on each rank: {report.evaluations}"]
    known = [drift for drift in report.drift if math.isfinite(drift)]
    if known:
        worst = max(known)
        lines.append(f"drift of the guesses: mean {sum(known) / len(known):.4f}, worst {worst:.4f}")
    lines += [f"rank {f.rank} was left out at step {f.step}: {f.text}" for f in report.failures]
    return "\n".join(lines)


def _picture(report: Report) -> torch.Tensor:
    """The report's figure, or its words alone: the host does not need matplotlib itself."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(report.plot())
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    except ImportError:
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (900, 200), "white")
        text = _words(report) + "\nfor the timeline: pip install matplotlib"
        ImageDraw.Draw(image).text((20, 20), text, fill="black")
        pixels = np.asarray(image)
    return torch.from_numpy(pixels.astype(np.float32) / 255.0).unsqueeze(0)


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
        host = _Comfy(model, extra_args)
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
        rows = functools.partial(_rows, stock, model, sigmas, extra_args, options)
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


class _Comfy(Host):
    """What of the host reaches into a run: cancelling, the mask of an inpainting, the guider."""

    def __init__(self, model: Any, extra_args: dict[str, Any]) -> None:
        from comfy import model_management

        self.interrupt = model_management.InterruptProcessingException
        self._management = model_management
        self._model, self._guider = model, model.inner_model
        self._before = self._settings()
        self.look: Look | None = None
        self.share = 1.0  # of an item's rms that a drift within the mask alone has
        mask = extra_args.get("denoise_mask")
        if mask is not None:
            self.share = math.sqrt(float(mask.flatten(1).mean(1).min().clamp(0, 1)))

    def cancel(self, on: bool) -> None:
        self._management.interrupt_current_processing(on)

    def alone(self, extra_args: dict[str, Any], parallel: bool) -> dict[str, Any]:
        """Arguments under which the leader's model uses one device.

        The host splits CFG over its clones of a model wherever it finds them. Where a node of the
        host's asked for that, the split is left alone if nothing runs in parallel otherwise.
        """
        options = extra_args.get("model_options", {})
        asked_for = "multigpu_options" in options
        if "multigpu_clones" not in options or (asked_for and not parallel):
            return extra_args
        if asked_for:
            _log.warning(
                "ParaStep: the GPUs of MultiGPU CFG Split evaluate whole steps; remove that node"
            )
        return {**extra_args, "model_options": without_host_split(options)}

    def settle(
        self, denoised: torch.Tensor, sigma: torch.Tensor, arguments: dict[str, Any]
    ) -> torch.Tensor:
        """What is outside of the mask is the given latents, as the stock model's call has it."""
        mask, options = arguments.get("denoise_mask"), arguments.get("model_options", {})
        if mask is None:
            return denoised
        if "denoise_mask_function" in options:
            extra = {"model": self._guider, "sigmas": self._model.sigmas}
            mask = options["denoise_mask_function"](sigma, mask, extra_options=extra)
        return denoised * mask + self._model.latent_image * (1.0 - mask)

    def unknown(self) -> bool:
        return self.look is not None and self.look.needed

    def begin(self, arguments: dict[str, Any]) -> None:
        if self.look is not None:
            self.look.begin(arguments.get("model_options") or {})

    def look_at(self, evaluate: Any) -> tuple[Any, str | None]:
        assert self.look is not None
        return self.look.first(evaluate), self.look.reason

    def altered(self) -> str | None:
        now = self._settings()
        changed = [name for name in now if now[name] != self._before.get(name)]
        if changed:
            return f"the guider's {changed[0]} changed in the run"
        return None if self.look is None else self.look.changed()

    def _settings(self) -> dict[str, Any]:
        plain = (bool, int, float, str)
        return {k: v for k, v in vars(self._guider).items() if isinstance(v, plain)}


def _alpha(schedule: Any, levels: torch.Tensor) -> Any:
    """Scales of the clean latent at each noise level, by how the host adds noise to one: 1, or
    1 - sigma in flow models. None where it does not say.
    """
    clean = torch.ones(len(levels), 1)
    try:
        noisy = schedule.noise_scaling(levels.clone(), torch.zeros_like(clean), clean)
    except Exception:  # a class of another pack's own
        return None
    return noisy.flatten().double().cpu().numpy()


def _rows(
    stock: Any,
    model: Any,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    options: dict[str, Any],
) -> Traced:
    """The rows of a sampler function, kept for the next run with the same noise levels."""
    schedule = model.inner_model.inner_model.model_sampling

    def made() -> Traced:
        found = trace(stock, model, sigmas, extra_args, options)
        return dataclasses.replace(found, alpha=_alpha(schedule, found.levels))

    kept = _traced.setdefault(schedule, {})
    key = (stock, tuple(sigmas.tolist()), tuple(sorted(options.items(), key=lambda item: item[0])))
    try:
        if key in kept:
            return kept[key]
    except TypeError:  # an option that cannot be hashed
        return made()
    found = kept[key] = made()
    while len(kept) > _TRACES:
        del kept[next(iter(kept))]
    return found
