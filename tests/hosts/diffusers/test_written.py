"""Pipelines written by hand, in every shape that a denoising loop takes: whatever it is, the result
at tolerance 0 is the pipeline's own, and where the seam can carry it the windows are full.
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
from hosting import caught, distance, no_warnings, parallel, rounds_without_limit  # noqa: E402
from loops import FULL, Conditioned, cast, cast_after_the_first_step, scaled  # noqa: E402
from written import (  # noqa: E402
    ALPHAS,
    SHAPE,
    Form,
    Loop,
    N,
    Net,
    Written,
    begin,
    ddim,
    euler,
    flow,
    plain,
    written,
)

from parastep.diffusers.replicas import AsMade  # noqa: E402


def shorter_loop(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """Fewer steps than the scheduler has timesteps."""
    x = begin(pipe, steps + 5, generator)
    for t in pipe.scheduler.timesteps[3:-2]:
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
    return x


def run(pipe: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return pipe(generator=generator, **kwargs), generator.get_state()


def net_of(pipe: Any) -> Any:
    return next(m for m in pipe.denoiser.modules() if isinstance(m, Net)).calls


@pytest.mark.parametrize("name", FULL)
def test_loop(name: str) -> None:
    pipe = FULL[name]()
    with tiny.count_forwards(net_of(pipe)) as count:
        alone, state = run(pipe)
    calls, steps = count.own, N
    with no_warnings():
        together = parallel(pipe, 4)
        with tiny.count_forwards(net_of(pipe)) as count:
            result, end = run(together)
        assert torch.equal(result, alone) and torch.equal(end, state) and count.own == calls
        assert together.report.evaluations == [steps, steps - 1, steps - 2, steps - 3]
        together = parallel(pipe, 4, math.inf)
        with tiny.count_forwards(net_of(pipe)) as count:
            result, end = run(together)
        report = together.report
        assert report.rounds == rounds_without_limit(steps, 4) and torch.equal(end, state)
        if name != "varying calls":
            assert count.own == calls // steps * report.rounds
            assert count.everywhere == calls // steps * sum(report.evaluations)
    assert distance(result, alone) < 0.3, name
    together = parallel(pipe, 4, 0.05)
    with no_warnings():
        result, _ = run(together)
    assert distance(result, alone) < 0.05


def test_denoiser_of_torchscript() -> None:
    pipe = written(plain, torch.jit.trace(Net(), (torch.ones(SHAPE), torch.tensor(3))))
    alone, _ = run(pipe)
    with no_warnings():
        together = parallel(pipe, 3)
        assert torch.equal(run(together)[0], alone) and together.report.evaluations == [9, 8, 7]


def test_shorter_loop_than_the_schedulers() -> None:
    """The last windows reach beyond the end, which nobody could know."""
    pipe = written(shorter_loop)
    alone, _ = run(pipe)
    with no_warnings():
        together = parallel(pipe, 4)
        assert torch.equal(run(together)[0], alone) and together.report.rounds == N
        together = parallel(pipe, 4, math.inf)
        run(together)
    assert together.report.steps == N
    assert together.report.rounds == rounds_without_limit(N, 4)


def test_longer_loop_than_the_schedulers() -> None:
    """A second pass over the timesteps: beyond its end the leader is alone."""

    def twice(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
        x = plain(pipe, steps, generator)
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
        return x

    pipe = written(twice)
    alone, _ = run(pipe)
    together = parallel(pipe, 4, math.inf)
    result, _ = run(together)
    assert together.report.steps == 2 * N
    assert together.report.rounds == rounds_without_limit(N, 4) + N
    assert distance(result, alone) < 0.3
    assert torch.equal(run(parallel(pipe, 4))[0], alone)


def two_steps(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        m = pipe.denoiser(x, t)
        x = pipe.scheduler.step(m, t, x)[0]
        x = 0.5 * (x + pipe.scheduler.step(m, t, x)[0])
    return x


def step_first(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(0.1 * x, t, x)[0]
    return x


def changing_shape(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for i, t in enumerate(pipe.scheduler.timesteps):
        if i == 4:
            x = torch.nn.functional.interpolate(x, scale_factor=2.0)
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
    return x


def late_edit(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """The latents are edited between the denoiser's call and the step."""
    x = begin(pipe, steps, generator)
    for i, t in enumerate(pipe.scheduler.timesteps):
        m = pipe.denoiser(x, t)
        x = pipe.scheduler.step(m, t, x + (pipe.kick[0] if i == 5 else 0.0))[0]
    return x


def late_edit_in_place(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for i, t in enumerate(pipe.scheduler.timesteps):
        m = pipe.denoiser(x, t)
        x.add_(pipe.kick[0] if i == 5 else 0.0)
        x = pipe.scheduler.step(m, t, x)[0]
    return x


class Stateful(torch.nn.Module):
    """Its output depends on how often it was called, and it counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        self.count += 1
        return self.inner(x, t) * (1 + 0.01 * self.count)


class Drawing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        return self.inner(x, t) + 0.01 * torch.randn_like(x)


def own_scheduler(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """The pipeline puts another scheduler in, at its every call."""
    pipe.scheduler = euler()
    return scaled(pipe, steps, generator)


def gradients(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """Guidance by the gradient of a loss through the denoiser."""
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            m = pipe.denoiser(x, t)
            (slope,) = torch.autograd.grad((m**2).sum(), x)
        x = pipe.scheduler.step(m.detach() + 0.1 * slope, t, x.detach())[0]
    return x


def gradients_later(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for i, t in enumerate(pipe.scheduler.timesteps):
        with torch.set_grad_enabled(i > 3):
            x = x.detach().requires_grad_(i > 3)
            m = pipe.denoiser(x, t)
            if i > 3:
                m = m + 0.1 * torch.autograd.grad((m**2).sum(), x)[0]
        x = pipe.scheduler.step(m.detach(), t, x.detach())[0]
    return x


class Stranger(diffusers.configuration_utils.ConfigMixin):
    """No class of diffusers' own, and names of its own for what step takes."""

    config_name = "scheduler_config.json"

    def __init__(self, **config: Any) -> None:
        self.inner = diffusers.DDIMScheduler(**config)
        self.set_timesteps = self.inner.set_timesteps

    @property
    def timesteps(self) -> torch.Tensor:
        return self.inner.timesteps

    def step(self, eps: Any, when: Any, x: Any) -> Any:
        return self.inner.step(eps, when, x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: written(two_steps), "two steps"),
        (lambda: written(step_first), "before a denoiser"),
        (lambda: written(changing_shape), "the latents became"),
        (lambda: written(own_scheduler), "did not step"),
        (lambda: written(gradients), "gradients"),
        (lambda: written(gradients_later), "gradients"),
        (lambda: written(plain, scheduler=Stranger(**ALPHAS, clip_sample=False)), "step"),
    ],
)
def test_loop_that_cannot_be_carried(make: Callable[[], Any], reason: str) -> None:
    pipe = make()
    alone, state = run(pipe)
    for tolerance in (0.0, math.inf):
        together = parallel(pipe, 3, tolerance)
        with caught() as texts:
            result, end = run(together)
        assert reason in together.report.fallback and reason in texts[-1]
        assert len(texts) == 1 + len(together.report.failures) and torch.equal(end, state)
        if tolerance == 0:
            assert torch.equal(result, alone)
        else:
            assert distance(result, alone) < 0.5


@pytest.mark.parametrize("loop", [late_edit, late_edit_in_place])
def test_edit_between_denoiser_and_step(loop: Loop) -> None:
    """Followers that edit alike are told so. An edit of the leader's alone is seen when it is too
    late to evaluate: rebased, told, and serial from there on.
    """
    pipe = written(loop, kick=[4.0])
    alone, _ = run(pipe)
    with no_warnings():
        assert torch.equal(run(parallel(pipe, 3))[0], alone)
        together = parallel(pipe, 3, math.inf)
        run(together)
        assert together.report.drift[5] < 0.2  # windows of three from step 1 on: it was guessed
        for replica in together._ranks._replicas.values():
            replica.kick[0] = 0.0
        run(together)
    assert together.report.drift[5] > 3.5
    together = parallel(pipe, 3, 20.0)
    run(together)
    for replica in together._ranks._replicas.values():
        replica.kick[0] = 0.0
    with caught() as texts:
        result, _ = run(together)
    assert distance(result, alone) < 0.2 and together.report.drift[5] > 3.5
    assert len(texts) == 1 and "edited the latents after" in texts[0]
    assert together.report.accepted[-3:] == [1, 1, 1]


@pytest.mark.parametrize(
    "name", ["edited after", "edited in place", "result edited in place", "shrunk before", "cast"]
)
def test_drift_is_that_of_the_point_really_evaluated(name: str) -> None:
    """A follower's loop edits the guess as the leader's edits the latents: next to no drift one
    step ahead, where the edit itself would be a large one.
    """
    pipe = FULL[name]()
    together = parallel(pipe, 2, math.inf)
    run(together, num_inference_steps=40)
    assert max(together.report.drift[2::2]) < 0.01


def test_noise_is_drawn_ahead() -> None:
    """Guesses of a stochastic sampler know the noise that it is going to add."""
    quiet = Form(lambda m: 0.01 * m)
    pipe = written(unwrapped_noisy, quiet, diffusers.DDPMScheduler(**ALPHAS, clip_sample=False))
    together = parallel(pipe, 4, math.inf)
    run(together)
    drift = [value for value in together.report.drift if math.isfinite(value)]
    assert len(drift) == 6 and max(drift[:3]) < 0.05
    assert together.report.rounds == rounds_without_limit(N, 4)


def unwrapped_noisy(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.denoiser(x, t), t, x, generator=generator)[0]
    return x


def test_rounding_of_latents_is_no_drift() -> None:
    """Of latents in bfloat16 the rounding is left out, whatever way the loop keeps them; what it
    does to the outputs is not.
    """
    rounds = []
    for loop in (plain, cast, cast_after_the_first_step):
        together = parallel(written(loop, scheduler=flow()), 4, "high")
        with no_warnings():
            run(together, num_inference_steps=40)
        rounds.append(together.report.rounds)
    assert max(rounds[1:]) <= rounds[0] + 9 < 25


def test_follower_whose_loop_is_shorter() -> None:
    """Beyond its end it has no output: it is left out when the leader asks for one."""

    def by_list(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
        x = begin(pipe, steps, generator)
        for t in pipe.scheduler.timesteps[: pipe.lengths[0]]:
            x = pipe.scheduler.step(pipe.denoiser(x, t), t, x)[0]
        return x

    pipe = written(by_list, lengths=[N])
    alone, _ = run(pipe)
    for tolerance in (0.0, math.inf):
        together = parallel(pipe, 3, tolerance)
        run(together)
        together._ranks._replicas[1].lengths[0] = 5
        with caught() as texts:
            result, _ = run(together)
        assert [line.rank for line in together.report.failures] == [1] and len(texts) == 1
        assert torch.equal(result, alone) if tolerance == 0 else distance(result, alone) < 0.1


LOCK = threading.Lock()


def locked(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    with LOCK:
        return plain(pipe, steps, generator)


def test_followers_that_wait_for_what_the_leader_holds() -> None:
    """They cannot reach their loop before the leader has left its own: it does not wait forever."""
    pipe = written(locked)
    alone, _ = run(pipe)
    together = parallel(pipe, 3, deadline=0.2)
    with caught() as texts:
        result, _ = run(together)
    assert torch.equal(result, alone) and len(texts) == 3
    assert "nobody is left" in together.report.fallback
    assert {(line.step, line.text) for line in together.report.failures} == {
        (0, "it has not reached its loop within 0.2 s")
    }


def noise_as_condition(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x, given = begin(pipe, steps, generator), torch.randn(SHAPE)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.denoiser(given, x, t), t, x)[0]
    return x


def test_going_back_draws_the_same_again() -> None:
    """A lost rank sends others back to the call's beginning, where conditioning is drawn."""
    pipe = written(noise_as_condition, Conditioned())
    together, given, calls = parallel(pipe, 4, math.inf), [], []
    run(together)

    def fail(module: Any, args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("lost")

    replicas = together._ranks._replicas
    replicas[1].denoiser.register_forward_pre_hook(fail)
    replicas[3].denoiser.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    for k in (1, 3):  # the hooks are part of what going back restores
        type(replicas[k]).as_made = AsMade(replicas[k])
    with caught() as texts:
        run(together, num_inference_steps=20)
    assert len(texts) == 1 and len(given) == together.report.evaluations[3] > 5
    assert all(torch.equal(condition, given[0]) for condition in given)


@pytest.mark.parametrize("denoiser", [Stateful, Drawing])
def test_denoiser_that_is_no_function(denoiser: type) -> None:
    """At tolerance 0 the leader's own state and draws are as if followers were not there."""
    results = []
    for ranks in (0, 3):
        pipe = written(plain, denoiser())
        called = parallel(pipe, ranks) if ranks else pipe
        torch.manual_seed(4)
        with caught():
            results.append([*run(called), *run(called), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_with_gradients() -> None:
    """A call without no_grad still has the pipeline's own values."""
    kind = type("Open", (Written,), {"loop": plain, "__call__": Written.__call__.__wrapped__})
    pipe = kind(Net(), ddim())
    alone, _ = run(pipe)
    with no_warnings():
        together = parallel(pipe, 3)
        result, _ = run(together)
        assert torch.equal(result, alone) and result.requires_grad
        assert together.report.evaluations == [9, 8, 7]
        together = parallel(pipe, 3, math.inf)
        run(together)
        assert together.report.rounds == rounds_without_limit(N, 3)


@pytest.mark.parametrize("name", ["model", "unet", "net", "backbone", "eps_model", "decoder"])
def test_names_of_the_denoiser(name: str) -> None:
    class Named(diffusers.DiffusionPipeline):
        def __init__(self, scheduler: Any, text_encoder: Any, **parts: Any) -> None:
            super().__init__()
            self.register_modules(scheduler=scheduler, text_encoder=text_encoder, **parts)

        @torch.no_grad()
        def __call__(self, num_inference_steps: int = N, generator: Any = None) -> torch.Tensor:
            x = begin(self, num_inference_steps, generator)
            shift = self.text_encoder(torch.ones(SHAPE), torch.tensor(3))
            shift.mul_(2.0)  # in place, on every rank
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(getattr(self, name)(x + 0 * shift, t) + shift, t, x)[0]
            return x

    pipe = Named(ddim(), Net(), **{name: Net()})
    alone, _ = run(pipe)
    with no_warnings():
        together = parallel(pipe, 3)
        with tiny.count_forwards(pipe.text_encoder.calls) as count:
            assert torch.equal(run(together)[0], alone)
        assert count.own == count.everywhere == 1
        assert together.report.evaluations == [9, 8, 7]
        together = parallel(pipe, 3, math.inf)
        run(together)
        assert together.report.rounds == rounds_without_limit(N, 3)


def test_positional_arguments_and_defaults() -> None:
    class Loose(Written):
        loop = plain

        @torch.no_grad()
        def __call__(self, *args: Any, generator: Any = None, **kwargs: Any) -> torch.Tensor:
            assert args == ("a", 2) and kwargs == {"steps": 5}
            return plain(self, kwargs["steps"], generator)

    pipe = Loose(Net(), ddim())
    generator = torch.Generator().manual_seed(1)
    alone = pipe("a", 2, generator=generator, steps=5)
    generator = torch.Generator().manual_seed(1)
    with no_warnings():
        together = parallel(pipe, 3)
        result = together("a", 2, generator=generator, steps=5)
    assert torch.equal(result, alone) and together.report.evaluations == [5, 4, 3]


def fills_a_cache(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    x = plain(pipe, steps, generator)
    pipe.denoiser(x, 0)
    return x


def test_a_call_after_the_last_step_is_no_round() -> None:
    """Nobody steps with it; the core is not asked beyond its program."""
    pipe = written(fills_a_cache)
    alone, _ = run(pipe)
    for tolerance, rounds in (("rehearse", N), (math.inf, rounds_without_limit(N, 3))):
        together = parallel(pipe, 3, tolerance)
        with no_warnings():
            result, _ = run(together)
        assert tolerance == math.inf or torch.equal(result, alone)
        assert together.report.rounds == rounds and together.report.steps == N


def followers_raise(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    if threading.current_thread().name.startswith("parastep-"):
        raise KeyError("of a follower")
    return plain(pipe, steps, generator)


def test_a_lane_that_never_ran_is_no_round() -> None:
    together = parallel(written(followers_raise), 3, 0.02, max_stride=None)
    with caught():
        together(num_inference_steps=20, generator=torch.Generator().manual_seed(0))
    report = together.report
    assert (report.rounds, report.steps, report.evaluations) == (20, 20, [20, 0, 0])
    assert len(report.failures) == 3 and "nobody is left" in report.fallback
    assert "KeyError: 'of a follower'" in report.fallback
