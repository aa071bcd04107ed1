"""Strided rounds: more steps than ranks, answers between nodes, one device alone."""

import math

import numpy as np
import pytest
from cases import drawing, euler, exact, latents, noise_of, same, smooth
from mixture import Mixture, distance, karras, setting

import parastep
from parastep import InvalidError, Program

RANKS = [1, 2, 4, 8]


# ---- fewer rounds than steps over ranks ----------------------------------------------------------


@pytest.mark.parametrize("steps", [50, 200])
@pytest.mark.parametrize("ranks", RANKS)
def test_fewer_rounds_near_the_sequential_result(ranks, steps):
    program, denoiser, x = setting(steps)
    wanted = exact(program, denoiser, x)
    found, report = parastep.sample(program, denoiser, x, ranks=ranks)
    assert report.rounds < {1: 42, 2: 26, 4: 20, 8: 18}[ranks]
    assert report.interpolated > 0
    assert sum(report.accepted) == steps
    assert distance(found, wanted) < 0.05
    _, coarse = parastep.sample(program, denoiser, x, ranks=ranks, tolerance=0.3)
    assert coarse.rounds < report.rounds


@pytest.mark.parametrize("ranks", RANKS)
def test_rounds_hardly_depend_on_steps(ranks):
    rounds = []
    for steps in (50, 400):
        program, denoiser, x = setting(steps)
        rounds.append(parastep.sample(program, denoiser, x, ranks=ranks, tolerance=0.02)[1].rounds)
    assert rounds[1] < 2 * rounds[0]


def test_every_evaluation_is_on_the_timeline():
    program, denoiser, x = setting(60)
    _, report = parastep.sample(program, denoiser, x, ranks=3, tolerance=0.02)
    seen = sorted((record.step, record.rank) for record in report.timeline)
    assert seen == sorted(denoiser.calls)
    assert report.evaluations == [sum(rank == k for _, rank in denoiser.calls) for k in range(3)]
    taken = [record.step for record in report.timeline if record.accepted]
    assert len(taken) == len(set(taken)) == 60 - report.interpolated
    assert report.steps == sum(report.accepted)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_coarser_dtypes(dtype):
    program, denoiser, x = setting(50, dtype)
    wanted = exact(program, denoiser, x)
    found, report = parastep.sample(program, denoiser, x, ranks=4, tolerance=0.02)
    assert found.dtype == x.dtype and report.rounds < 50 / 2
    assert distance(found, wanted) < 0.1


# ---- the dial ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [0, "exact"])
@pytest.mark.parametrize("ranks", RANKS)
def test_tolerance_0_is_the_sequential_result(ranks, tolerance):
    program, denoiser, x = setting(30, "float32")
    wanted = exact(program, denoiser, x)
    found, report = parastep.sample(program, denoiser, x, ranks=ranks, tolerance=tolerance)
    assert same(found, wanted)
    assert report.rounds == 30 and report.interpolated == 0


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_stride_is_above_its_limit(limit):
    program, denoiser, x = setting(60)
    _, report = parastep.sample(program, denoiser, x, ranks=4, tolerance=0.1, max_stride=limit)
    for number in range(1, report.rounds):
        steps = sorted(record.step for record in report.timeline if record.round == number)
        assert all(b - a <= limit for a, b in zip(steps, steps[1:], strict=False))
    assert (report.interpolated == 0) == (limit == 1)


def test_names_are_points_on_the_dial():
    program, denoiser, x = setting(50)
    rounds = [
        parastep.sample(program, denoiser, x, ranks=4, tolerance=name)[1].rounds
        for name in ("exact", "high", "balanced", "fast")
    ]
    assert rounds == sorted(rounds, reverse=True) and rounds[0] == 50 and rounds[3] < 15


def test_what_is_no_tolerance_is_refused():
    program, denoiser, x = setting(5)
    for wrong in ("best", -1, math.nan):
        with pytest.raises(InvalidError, match="tolerance"):
            parastep.sample(program, denoiser, x, tolerance=wrong)
    with pytest.raises(InvalidError, match="max_stride: 0: must be 1"):
        parastep.sample(program, denoiser, x, max_stride=0)


# ---- where strides stay at 1 ---------------------------------------------------------------------


def test_noise_keeps_every_step_evaluated():
    program, x, z = drawing(20), latents(), noise_of(20)
    assert not program.strides
    options = {"ranks": 3, "tolerance": 0.05, "noise": z}
    found, report = parastep.sample(program, smooth, x, **options)
    wanted, alike = parastep.sample(program, smooth, x, max_stride=1, **options)
    assert same(found, wanted) and report.accepted == alike.accepted
    assert report.interpolated == 0


def test_programs_that_can_be_strided():
    flat = np.ones((6, 1))
    levels = np.linspace(5.0, 1.0, 6)
    assert euler(6).strides
    assert Program(flat, flat, s=levels).strides
    assert not Program(flat, flat).strides  # all on one level
    assert not Program(flat, flat, s=levels[[0, 1, 1, 2, 3, 4]]).strides  # Heun
    back = np.array([[1.0, 0.0], [0.0, 1.0]] * 3)
    assert not Program(back, back, s=levels).strides  # a midpoint is left for the step before it
    assert not Program(flat, flat, c=np.ones(6), s=levels).strides
    # The level is s over alpha.
    assert Program(flat, flat, s=levels[::-1], alpha=np.linspace(1.0, 50.0, 6) ** 2).strides


class Rough:
    """An output that no step tells about the next."""

    def __call__(self, x, step, rank):
        return np.random.default_rng(step).standard_normal(x.shape).astype(x.dtype)


@pytest.mark.parametrize("steps", [12, 64])
@pytest.mark.parametrize("ranks", RANKS)
def test_rounds_do_not_add_up_beyond_the_steps(ranks, steps):
    program, _, x = setting(steps)
    wanted = exact(program, Rough(), x)
    found, report = parastep.sample(program, Rough(), x, ranks=ranks, tolerance=1e-9)
    assert report.rounds <= steps + steps // 32 + 3
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_rough_beginning_does_not_cost_the_rest_its_strides():
    program, smooth, x = setting(60)

    def denoiser(x, step, rank):
        rough = Rough()(x, step, rank) if step < 15 else 0
        return smooth(x, step, rank) + rough

    wanted = exact(program, denoiser, x)
    found, report = parastep.sample(program, denoiser, x, ranks=1, tolerance=0.02)
    assert 15 <= report.rounds < 45 and report.interpolated >= 15
    assert distance(found, wanted) < 0.02


@pytest.mark.parametrize("tolerance", [0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03])
@pytest.mark.parametrize("steps", [20, 28, 40, 50])
def test_one_device_gains_whatever_its_first_evaluation_ahead_comes_to(steps, tolerance):
    """One that is lost before anything was saved would leave the rest of the run to the host: so
    guesses are tried first, and what was evaluated ahead is kept while the host evaluates alone.
    """
    program, denoiser, x = setting(steps)
    wanted = exact(program, denoiser, x)
    found, report = parastep.sample(program, denoiser, x, ranks=1, tolerance=tolerance)
    assert report.rounds < steps if steps > 20 and tolerance >= 0.01 else report.rounds <= steps
    assert distance(found, wanted) < 0.05


@pytest.mark.parametrize("rough", [1, 2, 15])
@pytest.mark.parametrize("tolerance", [0.002, 0.01, 0.04])
@pytest.mark.parametrize("steps", [100, 150, 200])
def test_one_device_gains_in_many_steps_however_they_begin(steps, tolerance, rough):
    """Its first stride could be of several steps: one that no guess was tried for might be lost."""
    program, smooth, x = setting(steps)

    def denoiser(x, step, rank):
        return smooth(x, step, rank) + (0.1 * Rough()(x, step, rank) if step < rough else 0)

    wanted = exact(program, denoiser, x)
    found, report = parastep.sample(program, denoiser, x, ranks=1, tolerance=tolerance)
    assert report.rounds < steps * 0.6
    assert distance(found, wanted) < 0.05


# ---- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [2, 9, 25])
def test_a_follower_that_raises_costs_speed_alone(when):
    program, plain, x = setting(50)
    wanted = exact(program, plain, x)
    broken = Mixture(karras(50))

    def denoiser(x, step, rank):
        if rank == 2 and step >= when:
            raise RuntimeError("out of order")
        return broken(x, step, rank)

    with pytest.warns(parastep.FollowerWarning, match="out of order"):
        found, report = parastep.sample(program, denoiser, x, ranks=4, tolerance=0.01)
    assert [line.rank for line in report.failures] == [2]
    assert report.rounds < 40 and distance(found, wanted) < 0.05


def test_a_follower_whose_outputs_are_nan():
    program, plain, x = setting(50)
    wanted = exact(program, plain, x)

    def denoiser(x, step, rank):
        m = plain(x, step, rank)
        return m * np.nan if rank == 1 and step > 10 else m

    with pytest.warns(parastep.FollowerWarning):
        found, report = parastep.sample(program, denoiser, x, ranks=4, tolerance=0.01)
    assert np.isfinite(found).all() and distance(found, wanted) < 0.05
    assert [line.status for line in report.failures] == ["NOT_FINITE"]


def test_all_followers_gone():
    program, plain, x = setting(50)
    wanted = exact(program, plain, x)

    def denoiser(x, step, rank):
        if rank > 0 and step > 20:
            raise RuntimeError("out of order")
        return plain(x, step, rank)

    with pytest.warns(parastep.FollowerWarning):
        found, report = parastep.sample(program, denoiser, x, ranks=3, tolerance=0.01)
    assert len(report.failures) == 2 and report.rounds < 50
    assert distance(found, wanted) < 0.05
