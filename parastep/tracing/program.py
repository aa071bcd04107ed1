"""Reads a diffusers scheduler off as numbers: the sampling program that guesses are made with.

A copy of the scheduler is stepped once in float64. Item 0 of the batch carries a unit vector of its
own for each sample x_j, each model output m_j and each noise draw, so that what `step` returns *is*
the row of that step; item 1 carries random data that run through the whole loop and show how far
the rows hold. No scheduler is re-implemented, and the caller's is never touched. A row gives

    x_{j+1} = sum_k ( a[j, k] x_{j-k} + b[j, k] m_{j-k} ) + c[j] z_j

Rows serve guesses alone, so a sampler that is not affine (clipping, thresholding) only makes worse
guesses. This module imports without torch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .schedulers import (
    Array,
    Levels,
    NotTraceableError,
    Stepper,
    constant_arguments,
    fresh_copy,
    levels_of,
    loop_timesteps,
    name_of,
    step_parameters,
)

if TYPE_CHECKING:
    import torch

    from .._core import Program

EXACT = 1e-6  # relative error below which rows count as the scheduler itself; float32 gives 1e-7
_UNIT = 2.0**-20  # length of a basis vector: far below every clipping range, and exact to scale
_NOTHING = 1e-9  # share of a new sample below which an entry of a row counts as not there
_TOLERANCE = 1e-7  # share of a new sample that shortening a row may leave out
_LONGEST = 6  # the longest rows that shortening tries for; hidden state needs 2 to 4
_CACHE_SIZE = 64

_cache: dict[Hashable, Traced] = {}


@dataclass(frozen=True, eq=False)
class Traced:
    """Rows of a scheduler's loop of N steps, one `step` call each; all arrays are read-only.

    Attributes:
        a, b: (N, H), the weights of x_{j-k} and m_{j-k} in x_{j+1}; column k looks k steps back.
        c: (N,), standard deviation of the noise that step j adds, 0 where it adds none.
        s: (N,), noise scale of x_j, positive and finite, from `add_noise` or `scale_noise`.
        g: (N,), rebase slope: answer = m + g (x - x_guess); 0 where m's meaning is not known.
        alpha: (N,), signal scale of x_j, from the same, 0 or above.
        error: the worst relative rms difference between a row and the real step on random data,
            over the loop; infinite where there are no rows.
        exact: error < 1e-6.
        stochastic: some step draws noise (where there are no rows: it could).
        repeats_levels: a noise level takes more than one model call (Heun, KDPM2, PNDM).
        reason: None, or one sentence on why there are no rows; a = 1 and b = 0 then.
        noise_weights: (N, K), the weight of each of the up to K normal draws of a step.
        carries_noise: the scheduler remembers its noise, so a step on zeros gives more than c z.
    """

    a: Array
    b: Array
    c: Array
    s: Array
    g: Array
    alpha: Array
    error: float
    exact: bool
    stochastic: bool
    repeats_levels: bool
    reason: str | None
    noise_weights: Array
    carries_noise: bool

    def __len__(self) -> int:
        return len(self.a)

    def is_same(self, other: Traced) -> bool:
        """Whether both are the rows of one program."""
        pairs = ((getattr(self, k), getattr(other, k)) for k in ("a", "b", "c", "s", "g", "alpha"))
        return self is other or all(np.array_equal(mine, its) for mine, its in pairs)

    def program(self, *, noise_ahead: bool = False) -> Program:
        """The rows as a `parastep.Program`.

        With `noise_ahead` the noise vectors will be those of `NoiseAhead`, which hold their factor
        already: c is 1 where noise is added and 0 elsewhere.
        """
        from .._core import Program

        c = (self.c != 0).astype(np.float64) if noise_ahead else self.c
        return Program(*(np.array(v) for v in (self.a, self.b, c, self.s, self.g, self.alpha)))


def trace(scheduler: Any, num_inference_steps: int | None, **set_timesteps_kwargs: Any) -> Program:
    """The sampling program of a diffusers scheduler.

    Args:
        scheduler: any diffusers scheduler; it is copied and stays as it is.
        num_inference_steps, set_timesteps_kwargs: handed to the copy's `set_timesteps` (`sigmas`,
            `timesteps`, `mu`, ...); None is left out, for calls that give `sigmas` instead.

    Returns:
        Program with one row a model call: 2N - 1 for Heun.

    Raises:
        ValueError: this scheduler has no such rows; the message says why.

    Warns:
        UserWarning: it is only approximately of this form (clipping, thresholding).
    """
    traced = trace_rows(scheduler, None, num_inference_steps, **set_timesteps_kwargs)
    if traced.reason is not None:
        raise ValueError(traced.reason)
    if not traced.exact:
        message = f"{name_of(scheduler)} is not affine: its rows are off by {traced.error:.1e}"
        warnings.warn(message, UserWarning, stacklevel=2)
    return traced.program()


def trace_rows(
    scheduler: Any,
    timesteps: torch.Tensor | Sequence[Any] | None = None,
    num_inference_steps: int | None = None,
    *,
    step_kwargs: Mapping[str, Any] | None = None,
    also_outputs: tuple[str, ...] = (),
    **set_timesteps_kwargs: Any,
) -> Traced:
    """Rows of a scheduler that is set up already, or that is set up here, on a copy.

    The caller's scheduler, the global random state and the scheduler's device are left alone.
    Equal schedulers share one cached result.

    Args:
        scheduler: a diffusers scheduler as `set_timesteps` left it, its begin index included; one
            that has stepped since is taken back to there.
        timesteps: what the loop hands to `step`, in order; by default the scheduler's own, from
            its begin index on.
        num_inference_steps, set_timesteps_kwargs: when given, `set_timesteps` is called with them.
        step_kwargs: further arguments of `step` (`eta`, `s_churn`, ...), numbers; a generator and
            what the loop itself supplies (`prev_timestep`, ...) are ignored.
        also_outputs: arguments of `step` that the loop hands the model output to as well; where
            `pred_original_sample` is one, that output is the model's clean sample.

    Returns:
        Traced, always: where nothing can be traced its `reason` says why.
    """
    arguments = dict(set_timesteps_kwargs)
    if num_inference_steps is not None:
        arguments["num_inference_steps"] = num_inference_steps
    count = len(timesteps) if timesteps is not None else num_inference_steps or 1
    with _isolated():
        try:
            ready = fresh_copy(scheduler, device="cpu")
            if arguments:
                _set_timesteps(ready, arguments)
            loop = loop_timesteps(ready, timesteps)
            count = len(loop)
            given = (constant_arguments(step_kwargs), also_outputs)
            key = _key((type(ready), vars(ready), loop, given))
            traced = _cache.get(key)
            if traced is None:
                call = _Call(step_kwargs, also_outputs)
                traced = _traced(ready, loop, call, own_loop=timesteps is None)
                _remember(key, traced)
            return traced
        except NotTraceableError as why:
            return _reuse(count, str(why), "generator" in step_parameters(scheduler))


@dataclass
class _Call:
    """How the loop calls `step`, beside what it always hands it."""

    kwargs: Mapping[str, Any] | None
    also_outputs: tuple[str, ...]

    @property
    def predicts_clean(self) -> bool:
        return "pred_original_sample" in self.also_outputs


@dataclass
class _Recording:
    """One run on basis vectors and random data, of C columns each, with D noise draws."""

    full: Array  # (N, 2N + D): the row of step j over all x, all m and all draws
    owner: npt.NDArray[np.int64]  # (2N + D,): the step that each of these columns belongs to
    x: Array  # (N + 1, C): the random samples; step j makes x[j + 1] from x[j]
    m: Array  # (N, C)
    z: Array  # (D, C)


def _traced(ready: Any, timesteps: torch.Tensor, call: _Call, own_loop: bool) -> Traced:
    levels = levels_of(ready, timesteps)
    if call.predicts_clean:
        levels = levels.of_clean_samples()
    try:
        run = _record(ready, timesteps, call, levels)
    except NotTraceableError as why:
        # Some schedulers list the end of the last step as a timestep; their loops leave it out.
        at_end = isinstance(why.__cause__, IndexError) and why.step == len(timesteps) - 1 > 0
        if not (own_loop and at_end):
            raise
        return _traced(ready, timesteps[:-1], call, False)
    fine = np.isfinite(run.full).all(axis=1) & np.isfinite(run.x[1:]).all(axis=1)
    if not fine.all():
        step = int(np.argmin(fine))
        raise NotTraceableError(f"{name_of(ready)}.step gives no finite sample at step {step}")
    a, b, weights, carries = _shortened(run)
    error = _error(run, a, b, weights)
    g = 0.25 * levels.slope
    if levels.kind == "flow_prediction" and b[:, 0].sum() > 0:
        g = -g  # a velocity that points at the data
    order = getattr(ready, "order", None) or 1
    return Traced(
        a=a,
        b=b,
        c=np.sqrt((weights**2).sum(axis=1)),
        s=_positive(levels.s),
        g=np.where(np.isfinite(g), g, 0.0),
        alpha=np.maximum(np.nan_to_num(levels.alpha, nan=1.0, posinf=1.0), 0.0),
        error=error,
        exact=error < EXACT,
        stochastic=len(run.z) > 0,
        repeats_levels=len(set(timesteps.tolist())) < len(a) or order > 1 < len(a),
        reason=None,
        noise_weights=weights,
        carries_noise=carries,
    )


def _record(ready: Any, timesteps: torch.Tensor, call: _Call, levels: Levels) -> _Recording:
    """Steps copies of `ready` through the loop, once or twice.

    The first run hands `step` a generator of our own and looks whether it is used. Only where it
    is, a second one answers the draws itself, which makes every torch call of the loop slower.
    """
    import torch

    from .draws import Draws

    n, own = len(timesteps), torch.Generator().manual_seed(0)
    at_rest = own.get_state()
    width = max(4 * n, 64)
    shape = (2, width, 1, 1)
    random = np.random.default_rng(0)
    owners: list[int] = []
    draws: list[Array] = []

    def columns(column: int, values: Array) -> torch.Tensor:
        """(2, C, 1, 1): a basis vector and random values."""
        both = torch.zeros(shape, dtype=torch.float64)
        both[0, column : column + 1] = _UNIT
        both[1, :, 0, 0] = torch.from_numpy(values)
        return both

    def draw(value: torch.Tensor) -> torch.Tensor:
        if value.shape != shape:
            return value
        owners.append(j)
        draws.append(random.standard_normal(width))
        return columns(2 * n + len(draws) - 1, draws[-1])

    own_sampler = hasattr(ready, "noise_sampler")  # Brownian trees, which mix draws of all steps
    kind: Any = type(ready)
    at_once = own_sampler or _may_draw_globally(kind)
    for answered in (True,) if at_once else (False, True):
        scheduler = _with_own_lists(ready)
        if own_sampler:
            scheduler.noise_sampler = lambda *_: torch.randn(shape, dtype=torch.float64)
        generator = None if answered else own
        stepper = Stepper(scheduler, timesteps, call.kwargs, generator, call.also_outputs)
        full, x, m = np.zeros((n, width)), np.zeros((n + 1, width)), np.zeros((n, width))
        clean = 0.7 * random.standard_normal(width)
        x[0] = levels.alpha[0] * clean + levels.s[0] * random.standard_normal(width)
        with Draws(lambda _: own, draw) if answered else contextlib.nullcontext():
            for j in range(n):
                m[j] = _output(levels, j, x[j], clean, random)
                made = stepper(columns(n + j, m[j]), columns(j, x[j]))
                if not answered and not torch.equal(own.get_state(), at_rest):
                    break
                full[j], x[j + 1] = made.to(torch.float64).numpy()[:, :, 0, 0]
            else:
                break
    full /= _UNIT
    count = min(len(draws), width - 2 * n)  # draws beyond that have no column and show as error
    owner = np.concatenate([np.arange(n), np.arange(n), np.array(owners[:count], dtype=np.int64)])
    z = np.array(draws[:count]).reshape(count, width)
    return _Recording(full[:, : 2 * n + count], owner, x, m, z)


def _with_own_lists(ready: Any) -> Any:
    """A copy of a scheduler that remembers outputs in lists of its own."""
    scheduler = copy.copy(ready)
    for name, value in vars(ready).items():
        if isinstance(value, list):
            setattr(scheduler, name, list(value))
    return scheduler


@functools.cache
def _may_draw_globally(cls: type) -> bool:
    """Whether `step` might draw from torch's global generator: classes of the user's own, and those
    of diffusers that draw by other means than its `randn_tensor`, as some older ones do.
    """
    if not cls.__module__.startswith("diffusers."):
        return True
    draws = {"randn", "randn_like", "rand", "rand_like", "normal", "normal_"}
    members = (member for base in cls.__mro__ for member in vars(base).values())
    codes = (getattr(member, "__code__", None) for member in members)
    return any(code is not None and draws.intersection(code.co_names) for code in codes)


def _output(levels: Levels, j: int, x: Array, clean: Array, random: np.random.Generator) -> Array:
    """A random model output, like a denoiser's where p and q are known.

    The clean sample it stands for has a standard deviation of 0.7, and differs from call to call as
    far as there is noise left: so clipping to +-1 shows on these data as often as on real ones.
    """
    m = random.standard_normal(len(x))
    p, q = levels.p[j], levels.q[j]
    if not (np.isfinite(p) and np.isfinite(q) and q != 0):
        return m
    return (clean + 0.5 * min(levels.s[j], 1.0) * m - p * x) / q


def _shortened(run: _Recording) -> tuple[Array, Array, Array, bool]:
    """The rows as windows of the smallest H: a, b (N, H), noise weights (N, K), carries_noise.

    A solver that corrects its sample inwardly (UniPC, SASolver) shows rows that reach back to the
    start. On its own trajectory x_i equals row i - 1, so multiples of x_i - row_{i-1} may be added
    to a later row; those that cancel everything older than the window are found by least squares.
    """
    n = len(run.m)
    noise = np.arange(run.full.shape[1]) >= 2 * n
    rms = [np.sqrt((v**2).mean(axis=1)) for v in (run.x[:-1], run.m, run.z)]
    made = np.sqrt((run.x[1:] ** 2).mean(axis=1)) + 1e-300
    share = run.full * np.concatenate(rms) / made[:, None]  # each entry's part of the new sample
    lag = np.arange(n)[:, None] - run.owner
    used = np.abs(share) > _NOTHING
    longest = 1 + int(lag[used & ~noise].max(initial=0))
    carries = bool((used & noise & (lag > 0)).any())
    rows = run.full
    if longest > 4 or carries:
        for h in range(1, min(longest, _LONGEST) + 1):
            old = np.where(noise, lag > 0, lag >= h)
            shorter = _without_old(run.full, share, made, old, h)
            if shorter is not None:
                rows, longest = shorter, h
                break
    a, b = np.zeros((n, longest)), np.zeros((n, longest))
    for k in range(min(longest, n)):
        later = np.arange(k, n)
        a[later, k] = rows[later, later - k]
        b[later, k] = rows[later, n + later - k]
    weights = np.zeros((n, int(np.bincount(run.owner[noise], minlength=n).max())))
    for j in range(n):
        own = rows[j, noise & (run.owner == j)]
        weights[j, : len(own)] = own
    return a, b, weights, carries


def _without_old(
    full: Array, share: Array, made: Array, old: npt.NDArray[np.bool_], h: int
) -> Array | None:
    """`full` with what is old in each row cancelled by the fewest relations; None if it cannot."""
    rows = full.copy()
    for j in np.flatnonzero((np.abs(share) * old).max(axis=1) > _TOLERANCE).tolist():
        target = share[j, old[j]]
        for first in range(j, max(j - h, 0), -1):
            within = np.arange(first, j + 1)
            basis = share[within - 1][:, old[j]] * (made[within - 1] / made[j])[:, None]
            factors = np.linalg.lstsq(basis.T, target, rcond=None)[0]
            if np.abs(target - factors @ basis).max() <= _TOLERANCE:
                rows[j] -= factors @ full[within - 1]
                rows[j, within] += factors
                break
        else:
            return None
    return rows


def _error(run: _Recording, a: Array, b: Array, weights: Array) -> float:
    """The worst relative rms difference between a row and the step it stands for."""
    worst = 0.0
    drawn = run.owner[2 * len(run.m) :]
    for j in range(len(a)):
        back = j - np.arange(min(j + 1, a.shape[1]))
        own = run.z[drawn == j]
        row = a[j, : len(back)] @ run.x[back] + b[j, : len(back)] @ run.m[back]
        off = row + weights[j, : len(own)] @ own - run.x[j + 1]
        worst = max(worst, float(np.linalg.norm(off) / (np.linalg.norm(run.x[j + 1]) + 1e-300)))
    return worst


def _positive(s: Array) -> Array:
    """s with what is zero, negative or not finite replaced by its smallest proper value, or 1."""
    proper = np.isfinite(s) & (s > 0)
    return np.where(proper, s, s[proper].min() if proper.any() else 1.0)


def _reuse(count: int, reason: str, stochastic: bool) -> Traced:
    """No rows: the next sample is guessed to be this one."""
    zeros = np.zeros((count, 1))
    traced = Traced(
        a=zeros + 1,
        b=zeros,
        c=zeros[:, 0],
        s=zeros[:, 0] + 1,
        g=zeros[:, 0],
        alpha=zeros[:, 0] + 1,
        error=float("inf"),
        exact=False,
        stochastic=stochastic,
        repeats_levels=False,
        reason=reason,
        noise_weights=zeros[:, :0],
        carries_noise=False,
    )
    return _frozen(traced)


def _frozen(traced: Traced) -> Traced:
    for value in vars(traced).values():
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
    return traced


def _remember(key: Hashable, traced: Traced) -> None:
    """Replaces the cache as a whole, so that threads which meet here lose an entry at worst."""
    global _cache
    _cache = {**dict(list(_cache.items())[1 - _CACHE_SIZE :]), key: _frozen(traced)}


def _key(value: Any) -> Hashable:
    """Something hashable, equal for equal values; what it knows by identity it keeps alive."""
    if hasattr(value, "detach"):
        return (str(value.dtype), _key(value.detach().double().cpu().numpy()))
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return tuple((k, _key(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, types.FunctionType) and not (value.__closure__ or value.__defaults__):
        return value.__code__  # a lambda that each instance makes anew
    return (type(value), value if isinstance(value, Hashable) else object())


def _set_timesteps(scheduler: Any, arguments: Mapping[str, Any]) -> None:
    try:
        scheduler.set_timesteps(**arguments)
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).strip()[:200]}"
        raise NotTraceableError(f"{name_of(scheduler)}.set_timesteps raised {what}") from error


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Neither autograd nor the caller's autocast and default device reach what runs within."""
    import torch

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
