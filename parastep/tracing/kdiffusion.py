"""Reads a k-diffusion sampler function off as numbers: the sampling program of the ComfyUI adapter.

The function itself is run twice with a stand-in for the model. Once in float32 with nothing in the
latents, which shows at which noise levels it asks; once in float64 on basis vectors, one of its own
for the first latent and for each answer, so that a latent it hands to the model *is* the weights
with which these went into it. No sampler is re-implemented. With sigma the noise level of a call, D
its denoised output and d = (x - D) / sigma, the rows read

    x_{j+1} = sum_k ( a[j, k] x_{j-k} + b[j, k] d_{j-k} + e[j, k] q_{j-k} ) + z_j

with q the unguided output less the guided one, d, where a sampler works with both (CFG++). One row
is one model call, whatever the steps of the sampler. Rows serve guesses alone: a sampler that is
not affine makes worse ones, never a wrong picture. Called by `comfy.node`; knows no host, but for
the names of the model options that samplers hang their own functions into.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import _core
from ..messages import describe
from .draws import Draws
from .schedulers import NotTraceableError

Array = npt.NDArray[np.float64]
Function = Callable[[dict[str, Any]], torch.Tensor]  # what a sampler has called after guidance

AFTER_GUIDANCE = "sampler_post_cfg_function"  # in model options: a list of such functions
UNGUIDED_TOO = "disable_cfg1_optimization"  # evaluate the unguided output at a scale of 1 as well

_LONGEST = 4  # latents and answers that a row looks back on; the longest of the host's samplers
_EXACT = 1e-7  # units of the noise level that a row of the sampler's own may be off by
_NEAR = 10.0  # times the longest rows' error that shorter ones may have
_SAME_LEVEL = 1e-2  # of a level: what float32 may lose of a small one; any choice of levels is more
_MOST_CALLS = 8  # a step; a sampler that makes more chooses them by what the model returns
_TRIAL = "a trial of the sampler on numbers of ours, which is to show what its steps do,"
_ADAPTIVE = "the sampler chooses its noise levels by what the model returns"


@dataclass(frozen=True)
class Traced:
    """A sampler function on one list of noise levels: N model calls, rows of H."""

    levels: torch.Tensor  # (N,) float32, the sigma of each call, bit for bit
    a: Array  # (N, H)
    b: Array  # (N, H)
    error: float  # of the worst row on its own run, in units of the next noise level
    draws: bool  # it draws noise somewhere
    e: Array | None = None  # (N, H); None: the unguided output is not used
    alpha: Array | None = None  # (N,) scales of the clean latent in those noisy ones; None: all 1

    def program(self, noise: bool = False) -> _core.Program:
        """s is the noise level; g = 0.25 / s: a quarter of what holds the denoised output.

        With `noise` each row adds z_j as it is: `noise_ahead` gives it ready to be added; likewise
        what q adds.
        """
        s = self.levels.double().numpy()
        c = np.ones(len(s)) if noise or self.e is not None else None
        return _core.Program(self.a, self.b, c, s, 0.25 / s, self.alpha)


def to_d(x: torch.Tensor, sigma: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
    """(x - denoised) / sigma: the noise in x, or a flow's velocity; sigma is (B,)."""
    return (x - denoised).div_(_beside(sigma, x))


def to_denoised(x: torch.Tensor, sigma: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_d`."""
    return x - _beside(sigma, x) * d


def _beside(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return sigma if sigma.dtype == x.dtype else sigma.to(x.dtype)


# ---- functions after guidance --------------------------------------------------------------------


def added_functions(before: dict[str, Any], now: dict[str, Any]) -> list[Function] | None:
    """The functions after guidance that a sampler put into model options; None: it did more."""
    names = {*before, *now} - {AFTER_GUIDANCE, UNGUIDED_TOO}
    old, new = list(before.get(AFTER_GUIDANCE, ())), list(now.get(AFTER_GUIDANCE, ()))
    same = all(name in before and now.get(name) is before[name] for name in names)
    return new[len(old) :] if same and new[: len(old)] == old else None


def call_after_guidance(
    functions: list[Function],
    x: torch.Tensor,
    sigma: torch.Tensor,
    denoised: torch.Tensor,
    unguided: torch.Tensor,
) -> bool:
    """Tells a sampler's functions of a model call; whether they left its output as it was."""
    given = {"denoised": denoised, "uncond_denoised": unguided, "input": x, "sigma": sigma}
    return all(function(given) is denoised for function in functions)


# ---- the trace -----------------------------------------------------------------------------------


class StandIn:
    """Stands in for the model in a run of a sampler: notes where it is asked, answers d_j and q_j.

    Everything else that a sampler looks up on its model, the guider and the noise schedule behind
    it, is the real one's.
    """

    def __init__(
        self, model: Any, answer: Callable[[int], tuple[torch.Tensor | float, torch.Tensor | float]]
    ) -> None:
        self._model, self._answer = model, answer
        self.most = 0  # model calls that are let through
        self.options: dict[str, Any] = {}  # of the model, before the sampler
        self.guided_alone = True  # the sampler does not look at the unguided output
        self.x: list[torch.Tensor] = []
        self.sigma: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, model_options: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        if len(self.x) == self.most:
            raise NotTraceableError(_ADAPTIVE)
        functions = added_functions(self.options, model_options or {})
        if functions is None:
            raise NotTraceableError("the sampler changes the options of the model")
        d, q = self._answer(len(self.x))
        self.x.append(x.clone())
        self.sigma.append(sigma.reshape(-1)[0].clone())
        denoised = x - self.sigma[-1].to(x.dtype) * d
        if functions:
            self.guided_alone = False
            unguided = x - self.sigma[-1].to(x.dtype) * (d + q)
            if not call_after_guidance(functions, x, sigma, denoised, unguided):
                raise NotTraceableError("the sampler changes the output of the model")
        return denoised


def trace(
    function: Callable[..., torch.Tensor],
    model: Any,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    options: dict[str, Any],
) -> Traced:
    """The rows of `function(model, x, sigmas, extra_args=..., **options)`.

    Nothing of the caller's is changed: sigmas, options and extra_args are copied, random draws are
    answered with zeros. Raises NotTraceableError, whatever the function raises.
    """
    try:
        return _traced(function, model, sigmas, extra_args, options)
    except NotTraceableError:
        raise
    except Exception as error:
        raise NotTraceableError(f"{_TRIAL} failed: {describe(error)}") from error


def _traced(
    function: Callable[..., torch.Tensor],
    model: Any,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    options: dict[str, Any],
) -> Traced:
    draws = _Zeros()
    one = torch.zeros(1, 1, 1, 1, device=sigmas.device)
    asked = StandIn(model, lambda j: (0.0, 0.0))
    _run(function, asked, one, sigmas, extra_args, options, draws)
    levels = torch.stack(asked.sigma).cpu() if asked.sigma else one.flatten()[:0].cpu()
    count = len(levels)
    if count < 2:
        calls = "1 model call leaves" if count == 1 else f"{count} model calls leave"
        raise NotTraceableError(f"{calls} nothing to gain")
    if not bool((levels > 0).all()):
        raise NotTraceableError("the sampler asks for a model output at noise level 0")
    parts = 1 if asked.guided_alone else 2
    try:
        x = _on_basis(function, model, sigmas.double(), extra_args, options, draws, levels, parts)
    except RuntimeError:  # one that computes in float32 by itself and meets float64
        x = _on_basis(function, model, sigmas.float(), extra_args, options, draws, levels, parts)
    a, b, *e, error = _rows(x, levels.double().numpy(), parts)
    return Traced(levels, a, b, error, draws.seen, *e)


def _on_basis(
    function: Callable[..., torch.Tensor],
    model: Any,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    options: dict[str, Any],
    draws: _Zeros,
    levels: torch.Tensor,
    parts: int,
) -> Array:
    """The latents x_0 .. x_N of a run on basis vectors, (N + 1, 1 + parts N); sigmas gives the
    dtype.

    Column 0 belongs to the function's first latent, column 1 + l to d_l, 1 + N + l to q_l.
    """
    count = len(levels)
    units = torch.eye(1 + 2 * count, dtype=sigmas.dtype, device=sigmas.device)
    units = units[:, : 1 + parts * count].reshape(1 + 2 * count, 1, 1, 1, 1 + parts * count)
    asked = StandIn(model, lambda j: (units[1 + j % count], units[1 + count + j % count]))
    result = _run(function, asked, units[0].clone(), sigmas, extra_args, options, draws)
    found = torch.stack(asked.sigma).float().cpu()
    if len(found) != count or not torch.allclose(found, levels, rtol=_SAME_LEVEL):
        raise NotTraceableError(_ADAPTIVE)
    x = torch.stack([*asked.x, result]).reshape(count + 1, -1).double().cpu().numpy()
    if not np.isfinite(x).all():
        raise NotTraceableError(f"{_TRIAL} gave numbers that are not finite")
    return x


def _rows(x: Array, s: Array, parts: int) -> tuple[Any, ...]:
    """Rows (a, b, error) of the shortest history that explains the latents x (N + 1, 1 + parts N)
    on the basis; (a, b, e, error) where an output has two parts.

    Column 0 of x is the first latent, of about s_0 in size, the others are of about 1.
    """
    fits = [_fit(x, s, h, parts) for h in range(1, min(_LONGEST, len(s)) + 1)]
    limit = max(_EXACT, _NEAR * min(error for *_, error in fits))
    return next(fit for fit in fits if fit[-1] <= limit)


def _fit(x: Array, s: Array, history: int, parts: int) -> tuple[Any, ...]:
    count, worst = len(s), 0.0
    a, *of_outputs = np.zeros((1 + parts, count, history))
    for j in range(count):
        back = j - np.arange(min(history, j + 1))
        columns = [1 + part * count + back for part in range(parts)]
        size = np.ones(x.shape[1])
        size[0], size[np.concatenate(columns)] = s[0], 0.0  # outputs are left out of the fit
        weights = np.linalg.lstsq((x[back] * size).T, x[j + 1] * size, rcond=None)[0]
        rest = x[j + 1] - weights @ x[back]
        a[j, : len(back)] = weights
        for rows, at in zip(of_outputs, columns):
            rows[j, : len(back)] = rest[at]
        worst = max(worst, float(np.linalg.norm(rest * size)) / s[min(j + 1, count - 1)])
    return (a, *of_outputs, worst)


def noise_ahead(
    traced: Traced,
    function: Callable[..., torch.Tensor],
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    options: dict[str, Any],
) -> list[torch.Tensor] | None:
    """z_j for each row, as the sampler will add it: N tensors like x; None where all are zeros.

    The function runs once on zeros with its own noise, drawn in its own order from a copy of the
    random state; what the rows do not explain of its latents is the noise.
    """
    if options.get("noise_sampler") is not None:
        raise NotTraceableError("the sampler is given a source of noise that cannot be copied")
    asked = StandIn(model, lambda j: (0.0, 0.0))
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            result = _run(function, asked, torch.zeros_like(x), sigmas, extra_args, options, None)
    except Exception as error:
        raise NotTraceableError(f"its noise cannot be drawn ahead: {describe(error)}") from error
    found = [*asked.x, result]
    if len(found) != len(traced.levels) + 1:
        raise NotTraceableError("the sampler makes another number of model calls with its noise")
    made = []
    for j, row in enumerate(traced.a):
        known = sum(weight * past for weight, past in zip(row.tolist(), found[j::-1]))
        made.append(found[j + 1] - known)
    return made if any(bool(z.any()) for z in made) else None


class _Zeros(Draws):
    """Random draws are zeros, and are seen."""

    def __init__(self) -> None:
        self.seen = False
        super().__init__(lambda device: torch.Generator(device), self._zeros)

    def _zeros(self, drawn: torch.Tensor) -> torch.Tensor:
        self.seen = True
        return torch.zeros_like(drawn)


def _run(
    function: Callable[..., torch.Tensor],
    model: StandIn,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    options: dict[str, Any],
    zeros: _Zeros | None,
) -> torch.Tensor:
    """The function on copies of what it might write into, and without its progress bar."""
    extra_args = {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in extra_args.items()
    }
    options = copy.copy(options)
    model.most = _MOST_CALLS * len(sigmas)
    model.options = extra_args.get("model_options", {})
    if zeros is not None and "noise_sampler" in inspect.signature(function).parameters:
        options["noise_sampler"] = lambda *_: torch.randn_like(x)
    with zeros if zeros is not None else contextlib.nullcontext():
        return function(
            model,
            x,
            sigmas.clone(),
            extra_args=extra_args,
            callback=None,
            disable=True,
            **options,
        )
