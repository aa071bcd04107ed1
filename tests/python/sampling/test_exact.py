"""Tolerance 0: the sequential result to the bit, whatever the program, dtype, shape and ranks."""

import functools
import math

import numpy as np
import pytest
from cases import (
    DTYPES,
    RANKS,
    bits,
    drawing,
    euler,
    exact,
    latents,
    multistep,
    noise_of,
    same,
    smooth,
)

import parastep
from parastep import InvalidError, Program, ShapeError

# Every step is evaluated by some rank; test_strided.py has the others.
sample = functools.partial(parastep.sample, max_stride=1)


def evaluations_at_0(steps, ranks):
    """Of each rank with nothing accepted: step 0, then a window at every later step."""
    return [steps if k == 0 else 1 + max(0, steps - 1 - k) for k in range(ranks)]


# ---- tolerance 0: the sequential result ----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_tolerance_0_is_exact(dtype, ranks):
    steps = 6
    program, x = multistep(steps), latents(dtype=dtype)
    before = bits(x)
    found, report = sample(program, smooth, x, ranks=ranks, tolerance="rehearse")
    assert same(found, exact(program, smooth, x))
    assert bits(x) == before
    assert (report.steps, report.ranks, report.rounds) == (steps, ranks, steps)
    assert report.accepted == [1] * steps
    assert report.evaluations == evaluations_at_0(steps, ranks)
    assert report.answered == 0
    assert report.failures == []
    assert report.fallback is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_rank_is_the_plain_loop(dtype):
    program, x = euler(12), latents(dtype=dtype)
    found, wanted = exact(program, smooth, x), x
    for j in range(12):
        b = np.asarray(program.b[j, 0], dtype)
        wanted = wanted + b * smooth(wanted, j, 0)
    assert same(found, wanted)


def builders():
    t = np.linspace(0.95, 0.02, 14) * math.pi / 2
    alpha, s = np.cos(t), np.sin(t)
    for prediction in ("noise", "velocity", "sample"):
        yield f"ddim {prediction}", Program.ddim(alpha, s, prediction)
        yield f"dpmpp_2m {prediction}", Program.dpmpp_2m(alpha, s, prediction)
    yield "ddim flow", Program.ddim(1 - np.sin(t), s, "flow")
    yield "euler", Program.euler(s / alpha)
    yield "flow_euler", Program.flow_euler(s)
    for order in (1, 2, 3, 4):
        yield f"adams_bashforth {order}", Program.adams_bashforth(s / alpha, order)
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-0.2, 0.5, (2, 13, 3))
    for j in range(2):
        a[j, j + 1 :] = b[j, j + 1 :] = 0.0
    yield "any rows", Program(a, b, s=rng.uniform(0.5, 2.0, 13), g=rng.uniform(0.0, 0.5, 13))


@pytest.mark.parametrize("name", [name for name, _ in builders()])
def test_any_program(name):
    program, x = dict(builders())[name], latents(dtype="float64") / 10
    wanted = exact(program, smooth, x)
    for ranks in (2, 4, 8):
        found, report = sample(program, smooth, x, ranks=ranks, tolerance="rehearse")
        assert same(found, wanted) and report.accepted == [1] * 13
        for policy, warm in (("verified", 1), ("paper", 3)):
            options = {"ranks": ranks, "policy": policy, "warmup": warm, "tolerance": math.inf}
            _, report = sample(program, smooth, x, **options)
            assert report.rounds == warm + math.ceil((13 - warm) / ranks)
            assert report.failures == []
        found, report = sample(program, smooth, x, ranks=ranks, tolerance=1e-3)
        assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


def test_tolerance_0_accepts_not_even_a_perfect_guess():
    def nothing(x, step, rank):
        return np.zeros_like(x)

    _, report = sample(euler(5), nothing, latents() * 0, ranks=3, tolerance="rehearse")
    assert report.accepted == [1] * 5
    assert report.drift[2:] == [0.0] * 3


@pytest.mark.parametrize("ranks", RANKS)
def test_noise_leaves_the_result_exact(ranks):
    program, x, z = drawing(7), latents(), noise_of(7)
    found, report = sample(program, smooth, x, ranks=ranks, tolerance="rehearse", noise=z)
    assert same(found, exact(program, smooth, x, noise=z))
    assert not same(found, exact(program, smooth, x, noise=0 * z))
    assert report.evaluations == evaluations_at_0(7, ranks)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("policy", ["verified", "paper"])
def test_more_ranks_than_steps(steps, order, policy):
    program, x = multistep(steps), latents()
    options = {"ranks": 8, "order": order, "policy": policy, "warmup": steps, "tolerance": 0}
    found, report = sample(program, smooth, x, **options)
    assert same(found, exact(program, smooth, x))
    assert report.rounds == steps
    assert sum(report.accepted) == steps
    assert report.failures == []


def test_shapes():
    """The first dimension is the batch where there are others."""
    program = euler(5)
    for shape in [(), (1,), (5,), (1, 1), (3, 1), (1, 5), (2, 3, 4, 5), (1,) * 8, (2,) * 8]:
        x = latents(shape)
        found, report = sample(program, smooth, x, ranks=3, tolerance="rehearse")
        assert same(found, exact(program, smooth, x)), shape
        assert report.failures == [], shape


# ---- arguments -----------------------------------------------------------------------------------


def test_noise_is_needed_where_the_program_draws():
    with pytest.raises(InvalidError, match=r"noise: .*give it, \(N, \*x.shape\)"):
        sample(drawing(5), smooth, latents())


@pytest.mark.parametrize(
    ("noise", "error", "words"),
    [
        (noise_of(4), ShapeError, "noise: 4 steps where the program has 5"),
        (noise_of(6), ShapeError, "noise: 6 steps where the program has 5"),
        (noise_of(5, (2, 3)), ShapeError, r"noise: shape \(2, 3\).*\(2, 3, 4\)"),
        (noise_of(5, (2, 3, 1)), ShapeError, r"noise: shape \(2, 3, 1\).*\(2, 3, 4\)"),
        (noise_of(5, dtype="float64"), parastep.DtypeError, "noise: dtype float64 .*float32"),
        (np.ones(5, "f"), ShapeError, r"noise: shape \(\)"),
        ([None] * 5, parastep.DtypeError, "noise: None at step 0"),
        (["z"] * 5, parastep.DtypeError, "noise is of type str, not a tensor"),
        (1.0, InvalidError, r"noise: float: .*\(N, \*x.shape\)"),
        ((k for k in range(5)), InvalidError, "noise: generator: "),
        (np.float32(1), InvalidError, "noise: float32: "),
    ],
)
@pytest.mark.parametrize("ranks", [1, 3])
def test_noise_that_does_not_fit(noise, error, words, ranks):
    with pytest.raises(error, match=words):
        sample(drawing(5), smooth, latents(), noise=noise, ranks=ranks)
    sample(drawing(5), smooth, latents(), noise=noise_of(5), ranks=ranks)


def test_only_ranks_that_are_asked_for():
    for ranks in (np.int64(3), True):
        _, report = sample(euler(4), smooth, latents(), ranks=ranks)
        assert report.ranks == int(ranks)


def test_many_ranks():
    found, report = sample(euler(3), smooth, latents(), ranks=256, tolerance="rehearse")
    assert same(found, exact(euler(3), smooth, latents()))
    assert report.evaluations == evaluations_at_0(3, 256)
    assert report.failures == []


def test_a_deadline_without_end():
    found, report = sample(
        euler(4), smooth, latents(), ranks=3, tolerance="rehearse", deadline=math.inf
    )
    assert same(found, exact(euler(4), smooth, latents())) and report.failures == []
