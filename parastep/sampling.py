"""`sample`: the loop of a caller that has no host, the program itself being the sampler."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from . import _core
from .messages import SerialWarning, describe, warn_of
from .options import Options
from .quiet import thread_name
from .report import Report
from .speculation import CROWDED, give_room, out_of_memory, with_room
from .stacking import Stacking
from .threads import HostContext, Task
from .tolerance import Tolerance

Denoiser = Callable[[Any, Any, int], Any]


def serve(follower: _core.Follower, denoiser: Stacking) -> None:
    """A follower's thread: evaluates what it is given until the run is over."""
    try:
        while (work := follower.next()) is not None:
            follower.submit(denoiser.all(work, follower.rank))
    except BaseException as error:
        # Whatever it is, the leader is told and goes on without us, if it has not done so already.
        follower.fail(describe(error))


def _check_noise(program: _core.Program, noise: Any) -> None:
    """One tensor a step where the program draws; their shape is checked where they are used."""
    if noise is None:
        if program.c.any():
            raise _core.InvalidError("noise: the program draws noise: give it, (N, *x.shape)")
        return
    try:
        steps = len(noise)
    except TypeError:
        kind = type(noise).__name__
        raise _core.InvalidError(
            f"noise: {kind}: give one tensor or a sequence of them, (N, *x.shape)"
        ) from None
    if steps != len(program):
        raise _core.ShapeError(f"noise: {steps} steps where the program has {len(program)}")
    for step in range(steps):
        if noise[step] is None:  # which the core takes for no noise
            raise _core.DtypeError(f"noise: None at step {step}: a tensor is needed for every step")


def _give_noise(leader: _core.Leader, noise: Any, given: int, step: int) -> int:
    """Hands the leader the noise its next guesses may pass; returns the first step not given."""
    for later in range(max(given, step), leader.horizon):
        leader.noise(later, noise[later])
    return max(given, leader.horizon)


def _create(program: _core.Program, x: Any, options: Options, **ranks: Any) -> _core.Leader:
    return with_room(partial(_core.Leader, program, x, **ranks, **options.for_core()))


def _steps_shown(steps: int, progress: bool) -> Iterable[int]:
    """The numbers of the steps, with a bar of tqdm's if one is wanted: it counts steps, of which
    a round takes several at once.
    """
    if not progress:
        return range(steps)
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        text = "progress needs tqdm, which is not installed: pip install tqdm"
        raise ImportError(text) from error
    return tqdm(range(steps), unit="step")


def _slots_of(slots: int | Sequence[int] | str, ranks: int, x: Any) -> list[int] | None:
    """Evaluations a round of each of the core's ranks, of which "batch" has one; None where every
    one has one.
    """
    if isinstance(slots, str) and slots != "batch":
        raise _core.InvalidError(f"slots: {slots!r}: must be 'batch', or a number for each rank")
    if isinstance(slots, str):
        found = [ranks]
    else:
        found = [slots] * ranks if isinstance(slots, int) else list(slots)
    if all(count == 1 for count in found):
        return None if isinstance(slots, (int, str)) else found
    if len(x.shape) < 2:
        raise _core.ShapeError(f"x: {tuple(x.shape)}: a batch needs a first dimension of its items")
    return found


def _one_with_room(leader: _core.Leader, denoiser: Stacking, x: Any, step: int) -> Any:
    """The output at x; where the others have left no memory for it, they are done with."""
    try:
        return denoiser.one(x, step, 0)
    except out_of_memory():
        if denoiser.alone:
            raise
    leader.stop(CROWDED)
    denoiser.wait_until_idle()
    give_room()
    return denoiser.one(x, step, 0)


def _evaluate(leader: _core.Leader, denoiser: Stacking, x: Any, step: int, shares: bool) -> Any:
    """The leader's output at x, and beside it those of its further slots, handed in."""
    ahead = leader.work()
    if ahead and shares:
        m, *outputs = denoiser.all([(step, x), *ahead], 0)
    else:
        m = _one_with_room(leader, denoiser, x, step)
        outputs = denoiser.all(ahead, 0) if ahead else []
    if ahead:
        leader.fill(outputs)
    return m


def _run(
    leader: _core.Leader,
    steps: Iterable[int],
    denoiser: Stacking,
    x: Any,
    first: Any,
    shares: bool,
    noise: Any,
) -> Any:
    """The leader's loop; what its own denoiser call raises is raised.

    `first`: the output of step 0 where it is known. `shares`: what the leader evaluates at the true
    latent may be part of a batch.
    """
    given = 0
    for step in steps:
        if noise is not None:
            given = _give_noise(leader, noise, given, step)
        while (answered := leader.ask(step, x, leader.output())) is None:
            leader.fill(denoiser.all(leader.work(), 0))
            leader.submit(None)
        if not answered:
            m = _evaluate(leader, denoiser, x, step, shares) if first is None else first
            first = None
            if m is None:
                raise _core.DenoiserError(f"the denoiser returned None at step {step} on rank 0")
            leader.submit(m)
        x = leader.advance(None if noise is None else noise[step])
    return x


def sample(
    program: _core.Program,
    denoiser: Denoiser,
    x: Any,
    *,
    ranks: int = 4,
    slots: int | Sequence[int] | str = 1,
    tolerance: Tolerance = "balanced",
    policy: str = "verified",
    max_stride: int | None = None,
    warmup: int = 5,
    order: int = 1,
    noise: Any = None,
    deadline: float | None = None,
    on_failure: str = "continue",
    progress: bool = False,
) -> tuple[Any, Report]:
    """Samples from x with `ranks` evaluations at a time; returns (x_N, report).

    `denoiser(x, step, rank) -> m` is the guided output at latent x, of the shape of x; rank 0 is
    called in this thread, the others in threads of their own, at the same time.  Its tensors are of
    the kind of x (torch, NumPy, anything that speaks DLPack) and private to the call.  The first
    dimension of x is the batch where it has others: drift is taken per item.

    `slots` says how many steps of a round a rank evaluates: a number, or one for each rank.  Where
    there are several, the denoiser is called once for them: with x (S B, ...), S latents of B items
    end to end, and with `step` a tuple of S indices, item k B + b being of step[k]; it returns
    (S B, ...).  One step alone comes as without slots.  "batch" is for one device: there are no
    threads, and `ranks` steps of a round are one call in this thread, with rank 0.  The evaluation
    at the true latent is part of such calls, but never at tolerance 0.  Before the run the denoiser
    is tried with a batch: where it raises, or its outputs are not those that it gives one by one,
    that is a SerialWarning, `report.unbatched` says why, and a rank evaluates one step a round.

    What a drift costs is judged by the program's `s` and `alpha`, with x = alpha x0 + s eps:

        Program(a, b, s=sigma, alpha=numpy.ones(N))             variance explodes (EDM, k-diffusion)
        Program(a, b, s=s, alpha=numpy.sqrt(1 - s**2))          variance is preserved (DDPM, DDIM)
        Program(a, b, s=sigma, alpha=1 - sigma)                 flows (rectified flow, SD3, Flux)

    Where alpha is left out it is inferred from s and the rows: 1 where s exceeds 1, else one of the
    other two. Without s everything counts as signal, and far larger errors pass at one tolerance.

    `tolerance`, `policy`, `max_stride`, `warmup`, `order`, `deadline` and `on_failure` are those of
    `parastep.options.Options`; a follower that is lost is a FollowerWarning and a line in the
    report.  `noise`, (N, *x.shape), is needed where the program draws.  `progress` shows a bar that
    counts steps.

    Raises ShapeError, DtypeError, DeviceError, InvalidError (subclasses of parastep.Error and of
    the fitting built-in) for arguments that do not fit, and whatever the denoiser raises on rank 0.
    """
    if not callable(denoiser):
        raise TypeError(f"denoiser: {type(denoiser).__name__}: must be callable as (x, step, rank)")
    options = Options(tolerance, policy, max_stride, warmup, order, deadline, on_failure)
    x = _core.copy(x)  # taken in once, which is all that a DLPack capsule allows
    each = None if slots == 1 else _slots_of(slots, ranks, x)
    ranks = 1 if slots == "batch" else ranks
    create = partial(_create, program, x, options)
    asked = ranks
    if options.untouched:
        _core.Leader(program, np.zeros(1, np.float32), ranks=ranks, slots=each)  # only checked
        ranks, each = 1, None
    leader = create(ranks=ranks, slots=each)
    _check_noise(program, noise)
    stacking, first = Stacking(denoiser), None
    if each is not None and max(each) > 1:
        first = stacking.one(_core.copy(x), 0, 0)
        stacking.verify(x, first, max(each), len(program))
        leader = leader if stacking.unbatched is None else create(ranks=ranks)
    steps = _steps_shown(len(program), progress)
    stacking.alone = ranks == 1
    context = HostContext()
    lanes: dict[int, threading.Thread | Task] = {}
    try:
        for rank in range(1, ranks):
            follower = leader.follower(rank)
            body = partial(serve, follower, stacking)
            lanes[rank] = context.start(body, thread_name(rank), device=getattr(x, "device", None))
        result = _run(leader, steps, stacking, x, first, not options.exact, noise)
    finally:
        leader.finish()
    report = Report.from_core(leader.report(), options.verified_at)
    report.add_idle(asked, options.idle_reason(asked))
    report.forwards, report.unbatched = stacking.forwards, stacking.unbatched
    for line in report.failures:
        lanes.pop(line.rank, None)  # it may be hanging; daemon threads do not keep the process
    for thread in lanes.values():
        thread.join(timeout=1.0)
    warn_of(report)
    if report.unbatched is not None:
        warnings.warn(f"steps one by one: {report.unbatched}", SerialWarning, stacklevel=2)
    return result, report
