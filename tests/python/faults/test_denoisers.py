"""Denoisers that fail: a follower's costs its place alone, and at tolerance 0 no bit of the result;
what the leader's raises, the caller gets.
"""

import gc
import math
import threading
import warnings

import numpy as np
import pytest
from cases import (
    Gaussian,
    drawing,
    euler,
    exact,
    latents,
    lost,
    noise_of,
    same,
    sample,
    settle,
    smooth,
)
from faulty import RANKS, STEPS, Trouble, evaluates, faulty_at, raising

import parastep
from parastep import DenoiserError, DtypeError, FollowerWarning, LostError, ShapeError

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="no torch")

X = latents()


# ---- a denoiser that fails, on every rank at every step ------------------------------------------


# What a denoiser does instead of returning its output: on rank 0 the error; on others the status of
# the failure and words of its text.
FAULTS = {
    "raises": (raising, Trouble, "it is broken", "FAILED", "Trouble: it is broken"),
    "exits": (lambda m: exit(3), SystemExit, "3", "FAILED", "SystemExit: 3"),
    "none": (lambda m: None, DenoiserError, "returned None at step {step}", "FAILED", "NoneType"),
    "list": (lambda m: [m], DtypeError, "step {step} is of type list", "FAILED", "type list"),
    "smaller": (
        lambda m: m[:1],
        ShapeError,
        r"output at step {step}: shape \(1, 3, 4\) where the latents are \(2, 3, 4\)",
        "FAILED",
        "ShapeError: the denoiser's output: shape (1, 3, 4)",
    ),
    "flat": (lambda m: m.ravel(), ShapeError, r"shape \(24,\)", "FAILED", "ShapeError"),
    "integers": (lambda m: m.astype("i4"), DtypeError, "int32", "FAILED", "DtypeError"),
}


def check_failure(report, rank, step, status, words):
    """One line, of this rank at this step."""
    (line,) = report.failures
    assert (line.rank, line.step, line.status) == (rank, step, status)
    assert words in line.text


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("name", FAULTS)
def test_what_fails_on_the_leader_is_raised(name, step):
    fault, error, words, _, _ = FAULTS[name]
    denoiser = faulty_at(0, step, fault)
    with pytest.raises(error, match=words.format(step=step)):
        parastep.sample(euler(STEPS), denoiser, X, ranks=RANKS, tolerance="rehearse")


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("rank", range(1, RANKS))
@pytest.mark.parametrize("name", FAULTS)
def test_what_fails_on_a_follower_costs_its_place_alone(name, rank, step):
    fault, _, _, status, words = FAULTS[name]
    denoiser = faulty_at(rank, step, fault)
    found, report = sample(euler(STEPS), denoiser, X, ranks=RANKS, tolerance="rehearse")
    assert same(found, exact(euler(STEPS), smooth, X))
    assert denoiser.happened == evaluates(rank, step)
    if denoiser.happened:
        check_failure(report, rank, step, status, words)
    else:
        assert report.failures == []
    assert report.rounds == STEPS and report.fallback is None


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("rank", range(1, RANKS))
def test_a_follower_with_outputs_of_another_dtype(rank, step):
    """float16 would fit in; but the leader's are float32."""
    denoiser = faulty_at(rank, step, lambda m: m.astype("f2"))
    found, report = sample(euler(STEPS), denoiser, X, ranks=RANKS, tolerance="rehearse")
    assert same(found, exact(euler(STEPS), smooth, X))
    if evaluates(rank, step):
        check_failure(report, rank, step, "DTYPE", "float16")


def test_a_leader_with_outputs_of_another_dtype():
    """It may have any that fits, but the same at every step; its first decides for all ranks."""
    for step in range(1, STEPS):
        with pytest.raises(DtypeError, match=f"step {step} is float16 where float32 is expected"):
            denoiser = faulty_at(0, step, lambda m: m.astype("f2"))
            parastep.sample(euler(STEPS), denoiser, X, ranks=RANKS, tolerance="rehearse")
    with pytest.raises(DtypeError, match="step 0 is float64 where float32 is expected"):
        parastep.sample(euler(STEPS), lambda x, j, k: x.astype("f8"), X, ranks=RANKS)


@needs_torch
@pytest.mark.parametrize(
    "fault",
    [
        lambda m: m.to("meta"),
        lambda m: m[:, :1],
        lambda m: m.numpy().tolist(),
        lambda m: m.to(torch.int64),
        lambda m: m.to_sparse(),
    ],
    ids=["meta", "shape", "list", "dtype", "sparse"],
)
def test_outputs_of_torch_that_are_refused(fault):
    x = latents(dtype="torch.float32")
    for rank in (0, 2):
        denoiser = faulty_at(rank, 3, fault)
        if rank == 0:
            with pytest.raises((parastep.Error, RuntimeError), match="the denoiser's output"):
                parastep.sample(euler(STEPS), denoiser, x, ranks=RANKS, tolerance="rehearse")
        else:
            found, report = sample(euler(STEPS), denoiser, x, ranks=RANKS, tolerance="rehearse")
            assert same(found, exact(euler(STEPS), smooth, x))
            assert lost(report) == [rank]


@pytest.mark.parametrize("policy", ["verified", "paper"])
@pytest.mark.parametrize("tolerance", [0.02, math.inf])
def test_failures_with_speculation(policy, tolerance):
    """What a lost rank was to evaluate is evaluated by another."""
    steps, denoiser = 20, Gaussian(20)
    wanted = exact(euler(steps), denoiser, X)
    options = {"ranks": RANKS, "policy": policy, "tolerance": tolerance}
    for rank in range(1, RANKS):
        for step in range(0, steps, 3):

            def failing(x, j, k, rank=rank, step=step):
                if k == rank and j >= step:
                    raise Trouble
                return denoiser(x, j, k)

            found, report = sample(euler(steps), failing, X, **options)
            assert lost(report) in ([], [rank])
            assert sum(report.accepted) == steps
            assert np.linalg.norm(found - wanted) < 0.3 * np.linalg.norm(wanted)


# ---- what is said of a failure -------------------------------------------------------------------


def test_one_warning_a_failure():
    def failing(x, step, rank):
        if (rank, step) in ((1, 2), (3, 0)):
            raise Trouble("out of coffee")
        return smooth(x, step, rank)

    with pytest.warns(FollowerWarning) as caught:
        _, report = parastep.sample(euler(STEPS), failing, X, ranks=RANKS, tolerance="rehearse")
    assert [str(warning.message) for warning in caught] == [
        "rank 3 was left out at step 0 (FAILED): Trouble: out of coffee",
        "rank 1 was left out at step 2 (FAILED): Trouble: out of coffee",
    ]
    assert {warning.filename for warning in caught} == {__file__}
    assert [line.rank for line in report.failures] == [3, 1]
    assert report.to_dict()["failures"][0] == {
        "rank": 3,
        "step": 0,
        "status": "FAILED",
        "text": "Trouble: out of coffee",
    }
    assert "2 ranks left out" in str(report)


def test_warnings_may_be_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FollowerWarning, match="rank 2"):
            parastep.sample(euler(STEPS), faulty_at(2, 0, raising), X, ranks=RANKS)


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError("\n\n  late\nlater"), "ValueError: late"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 1000), "ValueError: " + "x" * 100),
        (ValueError("é" * 1000), "ValueError: " + "é" * 60),
        (ValueError("😀" * 1000), "ValueError: " + "😀" * 30),
        (ValueError("lone \ud800 surrogate"), "ValueError: lone \\ud800 surrogate"),
        (ValueError("a %s %n b"), "ValueError: a %s %n b"),
        (KeyError("key"), "KeyError: 'key'"),
        (Unprintable(), "Unprintable: (no message: its __str__ raised ValueError)"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (StopIteration(3), "StopIteration: 3"),
        (SystemExit(), "SystemExit"),
        (parastep.AbandonedError("not the core's own"), "AbandonedError: not the core's own"),
    ],
)
def test_words_of_any_exception(error, text):
    def failing(x, step, rank):
        if rank == 1:
            raise error
        return smooth(x, step, rank)

    found, report = sample(euler(STEPS), failing, X, ranks=2, tolerance="rehearse")
    assert same(found, exact(euler(STEPS), smooth, X))
    (line,) = report.failures
    assert (line.rank, line.step) == (1, 0)
    assert line.text.startswith(text) and line.status == "FAILED"


@pytest.mark.parametrize("error", [Trouble("once"), KeyboardInterrupt(), SystemExit(2)])
def test_the_leaders_exception_is_the_one_that_is_raised(error):
    def failing(x, step, rank):
        if rank == 0 and step == 3:
            raise error
        return smooth(x, step, rank)

    with pytest.raises(type(error)) as caught:
        parastep.sample(euler(STEPS), failing, X, ranks=RANKS)
    assert caught.value is error
    assert caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize("step", range(STEPS))
def test_a_lost_follower_may_be_an_error(step):
    denoiser = faulty_at(1, step, raising)
    options = {"ranks": RANKS, "tolerance": "rehearse", "on_failure": "raise"}
    if not evaluates(1, step):
        parastep.sample(euler(STEPS), denoiser, X, **options)
        return
    with pytest.raises(LostError, match=f"rank 1 was lost at step {step}: Trouble: it is broken"):
        parastep.sample(euler(STEPS), denoiser, X, **options)


# ---- many failures -------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(STEPS))
def test_the_leader_goes_on_alone(step):
    def failing(x, j, rank):
        if rank > 0 and j >= step:
            raise Trouble
        return smooth(x, j, rank)

    found, report = sample(euler(STEPS), failing, X, ranks=RANKS, tolerance="rehearse")
    assert same(found, exact(euler(STEPS), smooth, X))
    assert all(line.step >= step for line in report.failures)
    if step == 0:
        assert lost(report) == [1, 2, 3] and report.evaluations == [STEPS, 0, 0, 0]


def test_one_rank_is_lost_after_another():
    steps = 12

    def failing(x, step, rank):
        if rank > 0 and step >= 3 * rank:
            raise Trouble(f"rank {rank}")
        return smooth(x, step, rank)

    found, report = sample(euler(steps), failing, X, ranks=RANKS, tolerance="rehearse")
    assert same(found, exact(euler(steps), smooth, X))
    assert lost(report) == [1, 2, 3]
    assert {line.rank: line.text for line in report.failures} == {
        rank: f"Trouble: rank {rank}" for rank in (1, 2, 3)
    }


def test_any_faults_at_any_place():
    """Ranks that fail, send rubbish or NaN at random, one run after another in one process."""
    rng = np.random.default_rng(3)
    program, wanted = drawing(9), None
    z = noise_of(9)
    wanted = exact(program, smooth, X, noise=z)
    faults = [FAULTS[name][0] for name in FAULTS]
    faults.append(lambda m: m * np.nan)
    for _ in range(40):
        plan = rng.integers(-20, len(faults), (6, 9))

        def denoiser(x, step, rank, plan=plan):
            kind, output = plan[rank, step], smooth(x, step, rank)
            return faults[kind](output) if rank > 0 and kind >= 0 else output

        found, report = sample(program, denoiser, X, ranks=6, tolerance="rehearse", noise=z)
        assert same(found, wanted)
        assert 0 not in lost(report)


def test_threads_that_cannot_start(monkeypatch):
    start = threading.Thread.start

    def refusing(self):
        if self.name == "parastep-2":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refusing)
    with pytest.raises(RuntimeError, match="can't start"):
        parastep.sample(euler(4), smooth, X, ranks=4)


def test_nested_failures():
    """A follower's own run fails on its follower: a warning there, and nothing here."""
    inner = faulty_at(1, 1, raising)

    def nested(x, step, rank):
        refined, _ = sample(euler(3), inner, x, ranks=2, tolerance="rehearse")
        return smooth(refined, step, rank)

    found, report = sample(euler(4), nested, X, ranks=3, tolerance="rehearse")
    plain = exact(euler(4), lambda x, j, k: smooth(exact(euler(3), smooth, x), j, k), X)
    assert same(found, plain)
    assert report.failures == []


def test_references_are_given_back_after_failures():
    class Output(np.ndarray):
        """Counts those alive."""

        alive = 0

        def __array_finalize__(self, parent):
            Output.alive += 1

        def __del__(self):
            Output.alive -= 1

    def failing(x, step, rank):
        output = smooth(x, step, rank).view(Output)
        if (rank, step) in ((1, 1), (2, 3)):
            return output[:1]
        if (rank, step) == (3, 0):
            raise Trouble(output)
        return output

    for leader_fails in (False, True):
        if leader_fails:
            with pytest.raises(ShapeError):
                sample(euler(4), lambda x, j, k: failing(x, j, k)[: 2 - (j == 2)], X, ranks=4)
        else:
            sample(euler(4), failing, X, ranks=4, tolerance="rehearse")
        settle()
        gc.collect()
        assert Output.alive == 0


# ---- numbers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("rank", range(1, RANKS))
def test_a_followers_nan_is_never_an_answer(rank, step, value):
    def broken(m):
        m[0, 0, 0] = value
        return m

    for tolerance in (0, math.inf):
        denoiser = faulty_at(rank, step, broken)
        found, report = sample(euler(STEPS), denoiser, X, ranks=RANKS, tolerance=tolerance)
        assert np.isfinite(found).all()
        assert lost(report) in ([], [rank])
        if tolerance == 0:
            assert same(found, exact(euler(STEPS), smooth, X))
        elif denoiser.happened:
            status = "DIFFERS" if step == 0 else "NOT_FINITE"
            check_failure(report, rank, step, status, "")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", range(STEPS))
def test_the_leaders_nan_goes_to_the_sampler_unchanged(step, value):
    def broken(x, j, rank):
        return np.full_like(x, value) if j >= step else smooth(x, j, rank)

    for tolerance in (0, math.inf):
        found, _ = sample(euler(STEPS), broken, X, ranks=RANKS, tolerance=tolerance)
        assert not np.isfinite(found).any()
    found, report = sample(euler(STEPS), broken, X, ranks=RANKS, tolerance="rehearse")
    assert same(found, exact(euler(STEPS), broken, X))
    assert report.not_finite == STEPS - step


def test_a_latent_of_nan():
    x = np.full_like(X, np.nan)
    found, report = sample(euler(STEPS), smooth, x, ranks=RANKS, tolerance="rehearse")
    assert same(found, exact(euler(STEPS), smooth, x))
    assert report.not_finite == STEPS


# ---- another function ----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", range(1, RANKS))
@pytest.mark.parametrize("change", [lambda m: m + 0.01, lambda m: m * 1.01, lambda m: m * 0])
def test_a_follower_with_another_function(rank, change):
    """It would be accepted later, if its first output did not give it away."""
    denoiser = faulty_at(rank, 0, change)
    _, report = sample(euler(STEPS), denoiser, X, ranks=RANKS, tolerance=math.inf)
    check_failure(report, rank, 0, "DIFFERS", "other weights")
    assert report.evaluations[rank] <= 1


def test_rounding_is_not_another_function():
    def rounding(x, step, rank):
        return smooth(x, step, rank) * np.float32(1 + rank * 2e-7)

    found, report = parastep.sample(euler(STEPS), rounding, X, ranks=RANKS, tolerance="rehearse")
    assert same(found, exact(euler(STEPS), smooth, X))
    assert report.failures == []
