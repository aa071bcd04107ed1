"""Followers that pass iterations by the pipeline's own `interrupt`: the same points are evaluated,
and where a loop does not stand it, all of it is walked through.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import tiny  # noqa: E402
from hosting import host, no_warnings, own, parallel  # noqa: E402
from written import SHAPE, N, Net, Written, begin, ddim, plain  # noqa: E402


class Walked:
    """A denoiser's calls, those that were left out among them, in the followers' threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from parastep.diffusers.follower import Follower

        self.iterations = 0
        original = Follower._stepped

        def counted(follower: Any, *args: Any) -> Any:
            self.iterations += 1
            return original(follower, *args)

        monkeypatch.setattr(Follower, "_stepped", counted)


class Interruptible(Written):
    """A written pipeline that can be interrupted, as most of the library's."""

    _interrupt = False

    @property
    def interrupt(self) -> bool:
        return self._interrupt


def interruptible(loop: Any, scheduler: Any = None) -> Any:
    pipe = type("Interruptible", (Interruptible,), {"loop": loop})(Net(), scheduler or ddim())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def looping(
    shown: Callable[..., Any] = lambda x, generator: x, after: Callable[..., Any] = lambda x, i: x
) -> Callable[..., Any]:
    """The loop that most have: the denoiser is shown `shown` of the latents, and `after` edits."""

    def loop(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
        x = begin(pipe, steps, generator)
        for i, t in enumerate(pipe.scheduler.timesteps):
            if pipe.interrupt:
                continue
            m = pipe.denoiser(shown(x, generator), t)
            x = after(pipe.scheduler.step(m, t, x)[0], i)
        return x

    return loop


usual = looping()
drawing = looping(shown=lambda x, g: x + 0.1 * torch.randn(SHAPE, generator=g))
edited = looping(after=lambda x, i: x * (1 - 0.01 * i))


def read_twice(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        if pipe.interrupt:
            continue
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
        if pipe.interrupt:
            break
    return x


def left(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """Interrupted, it leaves."""
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        if pipe.interrupt:
            break
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
    return x


def late(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """Not looked at in the first half."""
    x = begin(pipe, steps, generator)
    for i, t in enumerate(pipe.scheduler.timesteps):
        if i != 1 and pipe.interrupt:
            continue
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
        if i == 1 and pipe.interrupt:
            break
    return x


def call(pipe: Any, steps: int = N) -> torch.Tensor:
    return pipe(steps, generator=torch.Generator().manual_seed(3))


def told(pipe: Any, ranks: int = 4, **options: Any) -> tuple[torch.Tensor, Any]:
    with parallel(pipe, ranks, math.inf, **options) as runs, no_warnings():
        return call(runs), runs.report


def test_a_loop_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    walked = Walked(monkeypatch)
    expected, report = told(interruptible(plain))
    through = walked.iterations
    result, again = told(interruptible(usual))
    assert torch.equal(result, expected)
    assert again.rounds == report.rounds and again.evaluations == report.evaluations
    assert through > walked.iterations - through >= sum(again.evaluations[1:])


@pytest.mark.parametrize("loop", [read_twice, left, late, drawing, edited])
def test_a_loop_that_cannot_be_passed_gives_the_same(loop: Any) -> None:
    """As the same loop does where `interrupt` is no property, and nothing can be passed."""

    def unhooked(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
        return loop(pipe, steps, generator)

    pipe = interruptible(unhooked)
    type(pipe).interrupt = False
    expected, report = told(pipe)
    result, again = told(interruptible(loop))
    assert torch.equal(result, expected)
    assert again.rounds == report.rounds and not again.failures


@pytest.mark.parametrize("ranks", [1, 3])
def test_going_back_is_a_call_that_is_passed(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided rounds go back in the loop; each of these enters the call again."""
    walked = Walked(monkeypatch)
    with parallel(interruptible(plain), ranks, 0.05, max_stride=None) as runs:
        expected, through = call(runs, 40), walked.iterations
    with parallel(interruptible(usual), ranks, 0.05, max_stride=None) as runs:
        assert torch.equal(call(runs, 40), expected)
    assert walked.iterations - through < through


def test_the_pipelines_own_interrupt_still_works() -> None:
    """Set by a callback of the user, on the leader's pipe: the loop goes on without steps."""
    pipe = host("sd3")
    kwargs = tiny.CASES["sd3"].kwargs()

    def stop(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i == 3
        return given

    expected = tiny.run(pipe, kwargs | {"callback_on_step_end": stop})
    with parallel(pipe, 3) as runs:
        kwargs = tiny.CASES["sd3"].kwargs()
        assert torch.equal(tiny.run(runs, kwargs | {"callback_on_step_end": stop}), expected)


def test_nothing_of_it_is_left() -> None:
    pipe = interruptible(usual)
    before = threading.active_count()
    with parallel(pipe, 3) as runs:
        call(runs)
        replicas = list(runs._ranks._replicas.values())
        kinds = [type(replica) for replica in replicas]
        call(runs)
        assert [type(replica) for replica in replicas] == kinds
    assert type(pipe).__name__ == "Interruptible" and threading.active_count() == before


INTERRUPTIBLE = ("sd", "sd_img2img", "sd_inpaint", "sdxl", "sd3", "flux", "cogvideox_dpm", "wan")


@pytest.mark.parametrize("name", INTERRUPTIBLE)
def test_real_pipelines_evaluate_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from parastep.diffusers.skipping import Skipping

    pipe, results = host(name), []
    assert isinstance(getattr(type(pipe), "interrupt", None), property)
    steps = own(name).steps
    for _ in range(2):
        with parallel(pipe, 4, math.inf) as runs:
            results.append(tiny.run(runs, tiny.CASES[name].kwargs()))
            assert runs.report.steps == steps
        monkeypatch.setattr(Skipping, "check", lambda *args: True)  # from now on nothing is passed
    assert torch.equal(*results)
