"""Several calls of step in one iteration: all its latents are one point of the core's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import tiny  # noqa: E402
from caching import caching  # noqa: E402
from hosting import caught, distance, host, no_warnings, parallel, rounds_without_limit  # noqa: E402
from written import ALPHAS, Net, begin, ddim, flow, written  # noqa: E402

from parastep.diffusers.iteration import Iteration  # noqa: E402

STEPS = 12


class Both(torch.nn.Module):
    """What is said of one latent depends on the other too."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.scale = Net(), scale

    def forward(self, x: Any, y: Any, t: Any) -> Any:
        shift = y.mean(dim=(1, 2, 3), keepdim=True)
        m, n = self.inner(x + shift, t), self.inner(y - 0.5 * x[..., :2, :2].mean(), t)
        return self.scale * m, self.scale * n


def pair(pipe: Any, generator: Any) -> Any:
    x = torch.randn(2, 4, 8, 8, generator=generator)
    return x, torch.randn(2, 4, 2, 2, generator=generator)


def two_schedulers(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """A latent of 256 values beside one of 16, and a copy of the scheduler."""
    pipe.scheduler.set_timesteps(steps)
    other, drawn = copy.deepcopy(pipe.scheduler), {}
    if isinstance(pipe.scheduler, diffusers.DDPMScheduler):
        drawn = {"generator": generator}
    x, y = pair(pipe, generator)
    for t in pipe.scheduler.timesteps:
        m, n = pipe.denoiser(x, y, t)
        x = pipe.scheduler.step(m, t, x, **drawn, return_dict=False)[0]
        y = other.step(n, t, y, **drawn, return_dict=False)[0]
    return torch.cat([x.flatten(1), y.flatten(1)], dim=1)


def other_levels(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    pipe.scheduler.set_timesteps(steps)
    copied = copy.deepcopy(pipe.scheduler)
    copied.set_timesteps(sigmas=torch.linspace(1, 0.01, steps).square().tolist())
    x, y = pair(pipe, generator)
    for t, u in zip(pipe.scheduler.timesteps, copied.timesteps):
        m, n = pipe.denoiser(x, y, t)
        x = pipe.scheduler.step(m, t, x, return_dict=False)[0]
        y = copied.step(n, u, y, return_dict=False)[0]
    return torch.cat([x.flatten(1), y.flatten(1)], dim=1)


def by_turns(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """The latents follow one another, from iteration to iteration."""
    pipe.scheduler.set_timesteps(steps)
    other = copy.deepcopy(pipe.scheduler)
    x, y = pair(pipe, generator)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.denoiser(x, y, t)[0], t, x, return_dict=False)[0]
        y = other.step(pipe.denoiser(x, y, t)[1], t, y, return_dict=False)[0]
    return torch.cat([x.flatten(1), y.flatten(1)], dim=1)


def one_more_later(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """From the third iteration on the second latent is stepped too."""
    pipe.scheduler.set_timesteps(steps)
    other = copy.deepcopy(pipe.scheduler)
    x, y = pair(pipe, generator)
    for i, t in enumerate(pipe.scheduler.timesteps):
        m, n = pipe.denoiser(x, y, t)
        x = pipe.scheduler.step(m, t, x, return_dict=False)[0]
        if i >= pipe.begins:
            y = other.step(n, t, y, return_dict=False)[0]
    return torch.cat([x.flatten(1), y.flatten(1)], dim=1)


def one_less_later(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    pipe.scheduler.set_timesteps(steps)
    other = copy.deepcopy(pipe.scheduler)
    x, y = pair(pipe, generator)
    for i, t in enumerate(pipe.scheduler.timesteps):
        m, n = pipe.denoiser(x, y, t)
        x = pipe.scheduler.step(m, t, x, return_dict=False)[0]
        if i < 4:
            y = other.step(n, t, y, return_dict=False)[0]
    return torch.cat([x.flatten(1), y.flatten(1)], dim=1)


def taken_back(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """A step for what the scheduler predicts, and the same one again."""
    x = begin(pipe, steps, generator)
    for t in pipe.scheduler.timesteps:
        m = pipe.denoiser(x, t)
        clean = pipe.scheduler.step(m, t, x, return_dict=False)[-1]
        pipe.scheduler._step_index -= 1
        x = pipe.scheduler.step(m + 0.01 * clean, t, x, return_dict=False)[0]
    return x


def run(pipe: Any, steps: int = STEPS) -> torch.Tensor:
    with torch.no_grad():
        return pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0))


CARRIED: dict[str, Callable[[], Any]] = {
    "flow": lambda: written(two_schedulers, Both(), flow()),
    "ddim": lambda: written(two_schedulers, Both(), ddim()),
    "remembers": lambda: written(
        two_schedulers, Both(), diffusers.DPMSolverMultistepScheduler(**ALPHAS)
    ),
    "draws": lambda: written(
        two_schedulers, Both(), diffusers.DDPMScheduler(**ALPHAS, clip_sample=False)
    ),
    "taken back": lambda: written(taken_back, scheduler=flow()),
}


@pytest.mark.parametrize("name", CARRIED)
def test_loop_that_is_carried(name: str) -> None:
    pipe = CARRIED[name]()
    alone = run(pipe)
    for tolerance in (0.0, 0.02, math.inf):
        together = parallel(pipe, 3, tolerance)
        with no_warnings():
            results = [run(together) for _ in range(2)]
        report = together.report
        assert torch.equal(*results) and report.steps == sum(report.accepted) == STEPS
        if tolerance == 0.0:
            assert torch.equal(results[0], alone) and report.evaluations == [12, 11, 10]
        elif tolerance == math.inf:
            assert report.rounds == rounds_without_limit(STEPS, 3)
        else:
            assert report.rounds < STEPS and distance(results[0], alone) < 0.02


def test_noise_of_all_latents_is_drawn_ahead() -> None:
    """In the order in which the host draws it: next to no drift where outputs are small."""
    scheduler = diffusers.DDPMScheduler(**ALPHAS, clip_sample=False)
    together = parallel(written(two_schedulers, Both(0.01), scheduler), 4, math.inf)
    run(together)
    drifts = [drift for drift in together.report.drift if math.isfinite(drift)]
    assert len(drifts) >= 8 and max(drifts[:4]) < 0.05


@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_a_small_latent_counts_as_a_large_one(weight: float) -> None:
    """A sound of 1/256 of the values has the same part in the distance, and bits stay."""
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(2, 256, 64, generator=generator).bfloat16()
    sound = weight * torch.randn(2, 64, generator=generator).bfloat16()
    form = Iteration([None] * 2, [True] * 2, [False] * 2, [(2, 256, 64), (2, 64)])
    point = form.joined([video, sound], torch.bfloat16)
    assert torch.equal(form.part(point, 0), video) and torch.equal(form.part(point, 1), sound)
    off = form.joined([video, sound + weight], torch.bfloat16).float() - point.float()
    assert off.square().mean().sqrt() == pytest.approx(weight, rel=0.02)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: written(other_levels, Both(), flow()), "from different noise levels"),
        (lambda: written(by_turns, Both(), flow()), "not in each"),
        (lambda: written(one_more_later, Both(), flow(), begins=1), "not in each"),
        (lambda: written(one_less_later, Both(), flow()), "fewer steps"),
        (
            lambda: written(taken_back, scheduler=diffusers.DPMSolverMultistepScheduler(**ALPHAS)),
            "taken back",
        ),
    ],
)
def test_loop_that_cannot_be_carried(make: Callable[[], Any], reason: str) -> None:
    pipe = make()
    alone = run(pipe)
    for tolerance in (0.0, 0.02):
        together = parallel(pipe, 3, tolerance)
        with caught() as texts:
            result = run(together)
        assert reason in together.report.fallback and together.report.fallback in texts[-1]
        assert torch.equal(result, alone) or (tolerance > 0 and distance(result, alone) < 0.02)


def test_a_step_too_many_is_refused_where_nothing_was_evaluated() -> None:
    """Its output would be an earlier iteration's: an error, and no other picture."""
    pipe = written(one_more_later, Both(), flow(), begins=7)
    alone = run(pipe)
    assert torch.equal(run(parallel(pipe, 3)), alone)
    with pytest.raises(ValueError, match="cannot be run in parallel"):
        run(parallel(pipe, 5, math.inf))
    assert torch.equal(run(parallel(pipe, 3)), alone)


@pytest.mark.parametrize("scale", [0.0, 0.15])
def test_tokens_with_timesteps_of_their_own(scale: float) -> None:
    """Those of the condition do not move, whether they are noised anew or not: as many rounds."""
    case, pipe = tiny.CASES["ltx_condition"], host("ltx_condition")
    kwargs = {"steps": 20, "image_cond_noise_scale": scale}
    alone = tiny.run(pipe, case.kwargs(**kwargs))
    together = parallel(pipe, 4, 0.02)
    with no_warnings():
        result = tiny.run(together, case.kwargs(**kwargs))
    assert distance(result, alone) < 0.02 and together.report.rounds <= 12
    assert max(together.report.drift[2:]) < 0.1
    exact = parallel(pipe, 3)
    with no_warnings():
        assert torch.equal(tiny.run(exact, case.kwargs(**kwargs)), alone)
    assert exact.report.evaluations == [20, 19, 18]


def some_held(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
    """The first two tokens are clean: by their timesteps step leaves them where they are."""
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(2, 8, 4, generator=generator)
    free = torch.ones(2, 8)
    free[:, :2] = 0
    for t in pipe.scheduler.timesteps:
        m = pipe.denoiser(x.transpose(1, 2), t).transpose(1, 2)
        given = {"per_token_timesteps": t * free, "return_dict": False}
        x = pipe.scheduler.step(-m, t, x, **given)[0]
    return x


def test_guesses_know_which_tokens_are_held() -> None:
    pipe = written(some_held, scheduler=flow())
    alone = run(pipe, 20)
    for tolerance in (0.0, 0.02, math.inf):
        together = parallel(pipe, 4, tolerance)
        with no_warnings():
            result = run(together, 20)
        if tolerance == 0.0:
            assert torch.equal(result, alone) and together.report.evaluations == [20, 19, 18, 17]
            assert max(together.report.drift[2:]) < 0.1  # a held token that moves makes 0.2
        elif tolerance == math.inf:
            assert distance(result, alone) < 0.1
        else:
            assert distance(result, alone) < 0.02 and together.report.rounds < 15


@pytest.mark.parametrize("name", ["ltx2", "cosmos_v2w", "skyreels_df", "ltx_condition"])
def test_in_worker_processes(name: str) -> None:
    if name not in tiny.CASES:
        pytest.skip("this version of diffusers has no such pipeline")
    case, pipe = tiny.CASES[name], host(name)
    alone = tiny.run(pipe, case.kwargs())
    for tolerance in (0.0, 0.02):
        with parallel(pipe, 3, tolerance, mode="processes") as together, no_warnings():
            result = tiny.run(together, case.kwargs())
        report = together.report
        if tolerance == 0.0:
            assert torch.equal(result, alone) and report.evaluations == [12, 11, 10]
        else:
            assert distance(result, alone) < 0.02 and report.rounds < 12


def test_sound_is_as_near_as_the_picture() -> None:
    if "ltx2" not in tiny.CASES:
        pytest.skip("this version of diffusers has no LTX-2")
    case, pipe = tiny.CASES["ltx2"], host("ltx2")
    alone = pipe(**case.kwargs(steps=30))
    with parallel(pipe, 4, 0.02) as together, no_warnings():
        found = together(**case.kwargs(steps=30))
    assert together.report.rounds < 20
    assert distance(found.frames, alone.frames) < 0.01
    assert distance(found.audio, alone.audio) < 0.01


@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_a_cache_that_is_filled_between_loops(mode: str) -> None:
    """Followers that enter the call again fill theirs again."""
    pipe = caching()
    alone = run_caching(pipe)
    options = {"mode": mode, "max_stride": None}
    with parallel(pipe, 2, "high", **options) as together, no_warnings():
        result = run_caching(together)
    report = together.report
    assert max(map(distance, result, alone)) < 1e-4 and report.rounds < 100
    assert report.evaluations[1] > 30


def test_a_cache_that_an_iteration_fills() -> None:
    """Each iteration reads what the first one wrote."""
    pipe = caching()
    alone = run_caching(pipe, late=True)
    with parallel(pipe, 2, "high", max_stride=None) as together, caught() as texts:
        result = run_caching(together, late=True)
    assert max(map(distance, result, alone)) < 1e-4
    assert "handed again" in together.report.fallback and len(texts) == 1


def run_caching(pipe: Any, **given: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(generator=generator, num_inference_steps=40, **given)
