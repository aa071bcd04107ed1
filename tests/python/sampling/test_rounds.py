"""Rounds and what they cost: windows, guesses, drift and acceptance, and the report of them."""

import functools
import json
import math
import pickle
from collections import defaultdict

import numpy as np
import pytest
from cases import RANKS, Gaussian, drawing, euler, exact, latents, noise_of, same, smooth

import parastep
from parastep import Report

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="no torch")

# Every step is evaluated by some rank; test_strided.py has the others.
sample = functools.partial(parastep.sample, max_stride=1)


# ---- no limit: everything is accepted ------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", pytest.param("torch.bfloat16", marks=needs_torch)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("steps", [1, 2, 5, 9, 17])
def test_rounds_without_a_limit(steps, ranks, dtype):
    denoiser = Gaussian(steps)
    program, x = euler(steps), latents(dtype=dtype)
    found, report = sample(program, denoiser, x, ranks=ranks, tolerance=math.inf)
    windows = math.ceil((steps - 1) / ranks)
    assert report.rounds == 1 + windows
    assert (
        report.accepted
        == [1, *([ranks] * (windows - 1)), steps - 1 - ranks * (windows - 1)][: 1 + windows]
    )
    assert report.evaluations[0] == report.rounds
    assert report.answered == steps - report.rounds
    assert type(found) is type(x)
    assert report.failures == []


@pytest.mark.parametrize("warmup", [1, 3, 5, 40])
@pytest.mark.parametrize("ranks", RANKS)
def test_rounds_of_the_published_rule(warmup, ranks):
    steps = 20
    options = {"ranks": ranks, "policy": "paper", "warmup": warmup, "tolerance": 0}
    _, report = sample(euler(steps), Gaussian(steps), latents(), **options)
    warm = min(warmup, steps)
    windows = math.ceil((steps - warm) / ranks)
    last = steps - warm - ranks * (windows - 1)
    assert report.accepted == [1] * warm + [ranks] * max(0, windows - 1) + [last] * (windows > 0)
    assert sum(report.accepted) == steps


def published_rule(program, denoiser, x, ranks, warmup):
    """Algorithm of arXiv 2505.14741: each rank reuses its own last output up to its own step."""
    b, steps = program.b[:, 0], len(program)
    for j in range(min(warmup, steps)):
        output = denoiser(x, j, 0)
        x = x + b[j] * output
    own = [output] * ranks
    for i in range(warmup, steps, ranks):
        window = min(ranks, steps - i)
        guesses = [x + b[i : i + k].sum() * own[k] for k in range(window)]
        own[:window] = [denoiser(guesses[k], i + k, k) for k in range(window)]
        for k in range(window):
            x = x + b[i + k] * own[k]
    return x


@pytest.mark.parametrize("warmup", [1, 5])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_published_rule_is_followed(warmup, ranks):
    program, denoiser, x = euler(21), Gaussian(21), latents(dtype="float64")
    found, _ = sample(program, denoiser, x, ranks=ranks, policy="paper", warmup=warmup)
    wanted = published_rule(program, denoiser, x, ranks, warmup)
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert np.abs(found - exact(program, denoiser, x)).max() > 1e-3


# ---- between: guesses, drift, acceptance ---------------------------------------------------------


def run_recorded(denoiser, *args, **kwargs):
    """(x, report, points) with points[step, rank] the last point evaluated so."""
    points = {}

    def recorded(x, step, rank):
        points[step, rank] = x.copy()
        return denoiser(x, step, rank)

    return (*sample(args[0], recorded, *args[1:], **kwargs), points)


@pytest.mark.parametrize("order", [0, 1])
def test_guesses_go_on_from_known_outputs(order):
    """Two ranks, all accepted: rounds at steps 1, 3, 5; all but the first know two outputs."""
    program, denoiser = euler(8), Gaussian(8)
    x, outputs = {0: latents(dtype="float64")}, {}
    _, report, points = run_recorded(
        denoiser, program, x[0], ranks=2, order=order, tolerance=math.inf
    )
    assert report.accepted == [1, 2, 2, 2, 1]
    for j in range(8):
        if (j, 0) in points:
            np.testing.assert_allclose(points[j, 0], x[j], rtol=1e-12)
            outputs[j] = denoiser(x[j], j, 0)
        else:
            reused = outputs[j - 2]
            if order == 1 and j > 2:
                reused = reused + 0.75 * (outputs[j - 2] - outputs[j - 3])
            guess = x[j - 1] + program.b[j - 1, 0] * reused
            np.testing.assert_allclose(points[j, 1], guess, rtol=1e-12)
            outputs[j] = denoiser(guess, j, 1) + program.g[j] * (x[j] - guess)
            drift = np.sqrt(((x[j] - guess) ** 2).mean(axis=(1, 2))).max() / program.s[j]
            assert report.drift[j] == pytest.approx(drift, rel=1e-9)
        x[j + 1] = x[j] + program.b[j, 0] * outputs[j]


@pytest.mark.parametrize("tolerance", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_tolerance_trades_rounds_for_distance(ranks, tolerance):
    steps = 40
    program, denoiser, x = euler(steps), Gaussian(steps), latents((4, 64))
    wanted = exact(program, denoiser, x)
    found, report = sample(program, denoiser, x, ranks=ranks, tolerance=tolerance)
    assert 1 + math.ceil((steps - 1) / ranks) <= report.rounds < steps
    assert sum(report.accepted) == steps
    assert report.answered == steps - report.rounds
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < tolerance
    spent = np.multiply(report.drift, report.cost)
    begins = np.cumsum([0, *report.accepted])
    for first, after in zip(begins, begins[1:]):
        answered = spent[first + 1 : after].sum()
        assert answered < tolerance
        if after < steps and not math.isnan(spent[after]):
            assert answered + spent[after] >= tolerance  # rejected: a round began here


def test_a_larger_tolerance_takes_no_more_rounds():
    program, denoiser, x = euler(40), Gaussian(40), latents((4, 64))
    rounds = [
        sample(program, denoiser, x, ranks=4, tolerance=tolerance)[1].rounds
        for tolerance in (0, 0.005, 0.05, 0.5, math.inf)
    ]
    assert rounds == sorted(rounds, reverse=True)
    assert rounds[0] == 40 and rounds[-1] == 11


def test_drift_is_the_largest_of_the_batch():
    """At tolerance 0 guesses do not depend on the batch, so drifts can be compared item by item."""
    program, denoiser = euler(10), Gaussian(10)
    x = latents((3, 50), "float64") * np.array([[1.0], [5.0], [0.1]])
    drifts = [
        sample(program, denoiser, part, ranks=4, tolerance="rehearse")[1].drift
        for part in (x, *(x[k : k + 1] for k in range(3)))
    ]
    together, alone = np.array(drifts[0]), np.array(drifts[1:])
    assert np.isnan(together[:2]).all() and not np.isnan(together[2:]).any()
    np.testing.assert_array_equal(together, alone.max(axis=0))
    assert not np.array_equal(alone[0], alone[1])


def test_guesses_use_the_noise_to_come():
    """Outputs that never change make every guess right, if it draws what the sampler will draw."""
    program, x, z = drawing(12), latents(dtype="float64"), noise_of(12, dtype="float64")

    def constant(x, step, rank):
        return x * 0 + 0.25

    found, report = sample(program, constant, x, ranks=4, tolerance=1e-9, noise=z)
    assert report.rounds == 1 + math.ceil(11 / 4)
    assert np.nanmax(report.drift) < 1e-9
    np.testing.assert_allclose(found, exact(program, constant, x, noise=z), rtol=1e-12)


@pytest.mark.parametrize("convert", [list, tuple, lambda z: np.asfortranarray(z)])
def test_kinds_of_noise(convert):
    program, x, z = drawing(6), latents(), noise_of(6)
    found, _ = sample(program, smooth, x, ranks=3, tolerance="rehearse", noise=convert(z))
    assert same(found, exact(program, smooth, x, noise=z))


def test_noise_of_a_program_that_draws_none_changes_nothing():
    x, z = latents(), noise_of(6)
    z[:] = np.nan
    found, report = sample(euler(6), smooth, x, ranks=3, tolerance="rehearse", noise=z)
    assert same(found, exact(euler(6), smooth, x))
    assert report.failures == []


def test_the_same_seed_gives_the_same_result():
    """Timing never decides a value."""
    program, denoiser, x = euler(30), Gaussian(30), latents()
    runs = [sample(program, denoiser, x, ranks=5) for _ in range(5)]
    for found, report in runs:
        assert same(found, runs[0][0])
        assert report.accepted == runs[0][1].accepted
        np.testing.assert_array_equal(report.drift, runs[0][1].drift)


# ---- the report ----------------------------------------------------------------------------------


def check_timeline(report):
    """Every evaluation is there, every step was taken from one of them."""
    seen, counts = defaultdict(list), [0] * report.ranks
    for record in report.timeline:
        assert 0 <= record.begin <= record.end <= report.seconds
        assert 0 <= record.rank < report.ranks
        assert 0 <= record.step < report.steps
        assert 0 <= record.round < report.rounds
        counts[record.rank] += 1
        seen[record.step].append(record)
    assert counts == report.evaluations
    for step in range(report.steps):
        assert [record.accepted for record in seen[step]].count(True) == 1, step
    own = [record for record in report.timeline if record.rank == 0]
    assert [record.round for record in own] == list(range(report.rounds))
    assert [record.step for record in own] == list(np.cumsum([0, *report.accepted[:-1]]))


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": 1},
        {"ranks": 4},
        {"ranks": 4, "tolerance": "rehearse"},
        {"ranks": 3, "policy": "paper"},
    ],
)
def test_report(options):
    x = latents((2, 100))
    _, report = sample(euler(15), Gaussian(15), x, **options)
    assert type(report) is Report
    assert (report.steps, report.ranks, report.interpolated) == (15, options["ranks"], 0)
    assert len(report.evaluations) == options["ranks"]
    assert len(report.drift) == 15
    assert sum(report.accepted) == 15 and len(report.accepted) == report.rounds
    assert report.seconds > 0
    followers = sum(report.evaluations[1:])
    assert report.bytes_sent == 2 * followers * x.nbytes
    assert report.speedup == 15 / report.rounds
    assert (report.failures, report.fallback, report.not_finite) == ([], None, 0)
    assert f"15 steps in {report.rounds} rounds on {options['ranks']} rank" in str(report)
    check_timeline(report)


def test_a_report_as_a_dict():
    _, report = sample(euler(9), Gaussian(9), latents(), ranks=4)
    plain = report.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["drift"][0] is None
    assert plain["timeline"][0].keys() == {"rank", "step", "round", "begin", "end", "accepted"}
    for name in ("steps", "rounds", "evaluations", "interpolated", "accepted", "seconds"):
        assert plain[name] == getattr(report, name)
    for name in ("bytes_sent", "failures", "fallback"):
        assert plain[name] == getattr(report, name)
    again = pickle.loads(pickle.dumps(report))
    assert again.to_dict() == plain


def test_a_drift_beyond_all_numbers_is_still_json():
    report = Report(steps=3, drift=[math.nan, math.inf, 0.5])
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["drift"] == [None, None, 0.5]
    assert math.isnan(report.speedup)


def test_outputs_that_are_not_finite_are_counted():
    """They go to the sampler unchanged, as they would without us."""

    def broken(x, step, rank):
        return np.full_like(x, -math.inf if step == 3 else 0.0)

    found, report = sample(euler(5), broken, latents(), ranks=1)
    assert report.not_finite == 1
    assert not np.isfinite(found).any()
