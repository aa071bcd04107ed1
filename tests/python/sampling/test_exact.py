"""parastep.sample where all goes well: exactness, rounds, guesses, reports, tensors, threads."""

import array
import contextlib
import contextvars
import functools
import gc
import json
import math
import pickle
import sys
import threading
import tracemalloc
from collections import defaultdict

import numpy as np
import pytest
from cases import (
    RANKS,
    Gaussian,
    bits,
    drawing,
    euler,
    exact,
    latents,
    noise_of,
    resident_bytes,
    same,
    settle,
    smooth,
    tells_memory,
)

import parastep
from parastep import InvalidError, Program, Report, ShapeError, _core

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="no torch")

# Every step is evaluated by some rank; test_strided.py has the others.
sample = functools.partial(parastep.sample, max_stride=1)

DTYPES = [
    "float32",
    "float16",
    "float64",
    *(
        pytest.param(f"torch.{name}", marks=needs_torch)
        for name in ("float32", "float16", "bfloat16", "float64")
    ),
]


def multistep(steps):
    """A solver that reads older outputs."""
    return Program.adams_bashforth(np.linspace(10.0, 0.0, steps + 1), 3)


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
    found, report = sample(program, smooth, x, ranks=ranks, tolerance=0)
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
        found, report = sample(program, smooth, x, ranks=ranks, tolerance=0)
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

    _, report = sample(euler(5), nothing, latents() * 0, ranks=3, tolerance=0)
    assert report.accepted == [1] * 5
    assert report.drift[2:] == [0.0] * 3


@pytest.mark.parametrize("ranks", RANKS)
def test_noise_leaves_the_result_exact(ranks):
    program, x, z = drawing(7), latents(), noise_of(7)
    found, report = sample(program, smooth, x, ranks=ranks, tolerance=0, noise=z)
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
        found, report = sample(program, smooth, x, ranks=3, tolerance=0)
        assert same(found, exact(program, smooth, x)), shape
        assert report.failures == [], shape


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
        sample(program, denoiser, part, ranks=4, tolerance=0)[1].drift
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
    found, _ = sample(program, smooth, x, ranks=3, tolerance=0, noise=convert(z))
    assert same(found, exact(program, smooth, x, noise=z))


def test_noise_of_a_program_that_draws_none_changes_nothing():
    x, z = latents(), noise_of(6)
    z[:] = np.nan
    found, report = sample(euler(6), smooth, x, ranks=3, tolerance=0, noise=z)
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
    [{"ranks": 1}, {"ranks": 4}, {"ranks": 4, "tolerance": 0}, {"ranks": 3, "policy": "paper"}],
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


# ---- tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", pytest.param("torch.bfloat16", marks=needs_torch)])
def test_tensors_are_private(dtype):
    """What a denoiser keeps is never overwritten, and what it writes is seen by nobody."""
    program, x = euler(8), latents(dtype=dtype)
    lock, kept = threading.Lock(), []

    def keeping(x, step, rank):
        output = smooth(x, step, rank)
        with lock:
            kept.extend((tensor, bits(tensor)) for tensor in (x, output))
        return output

    found, _ = sample(program, keeping, x, ranks=4, tolerance=0)
    kept.append((found, bits(found)))
    sample(program, smooth, latents(dtype=dtype, seed=5), ranks=4)
    for tensor, before in kept:
        assert bits(tensor) == before
    places = [
        np.asarray(t).__array_interface__["data"][0]
        if torch is None or not isinstance(t, torch.Tensor)
        else t.data_ptr()
        for t, _ in kept
    ]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_denoiser_may_edit_its_input(dtype, ranks):
    program, x = multistep(7), latents(dtype=dtype)
    before = bits(x)

    def editing(x, step, rank):
        output = smooth(x, step, rank)
        x *= 0
        x += 1e3
        return output

    found, _ = sample(program, editing, x, ranks=ranks, tolerance=0)
    assert same(found, exact(program, smooth, x))
    assert bits(x) == before


def in_place(x, step, rank):
    x *= 0.125
    return x


@pytest.mark.parametrize("denoiser", [lambda x, step, rank: x, in_place], ids=["same", "in place"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_denoiser_may_return_its_input(dtype, denoiser):
    program, x = multistep(7), latents(dtype=dtype)
    plain = (lambda x, step, rank: x * 0.125) if denoiser is in_place else lambda x, s, r: x * 1
    found, report = sample(program, denoiser, x, ranks=4, tolerance=0)
    assert same(found, exact(program, plain, x))
    assert report.failures == []


@pytest.mark.parametrize("dtype", ["float32", pytest.param("torch.float32", marks=needs_torch)])
def test_a_denoiser_may_return_one_buffer_every_time(dtype):
    program, x = multistep(7), latents(dtype=dtype)
    buffers = [x * 0 for _ in range(4)]  # one a rank

    def reusing(x, step, rank):
        buffers[rank][...] = smooth(x, step, rank)
        return buffers[rank]

    found, _ = sample(program, reusing, x, ranks=4, tolerance=0)
    assert same(found, exact(program, smooth, x))


LAYOUTS = {
    "fortran": np.asfortranarray,
    "reversed": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "every other": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "transposed": lambda x: x.transpose(2, 0, 1).copy().transpose(1, 2, 0),
    "swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "unaligned": lambda x: (
        np.frombuffer(b"." + x.tobytes(), "u1")[1:].view(x.dtype).reshape(x.shape)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Of x, of outputs and of noise; tensors that come out are plain."""
    lay = LAYOUTS[layout]
    program, x, z = drawing(6), latents(), noise_of(6)

    def laid_out(x, step, rank):
        assert x.flags.c_contiguous and x.flags.writeable and x.dtype.isnative
        return lay(smooth(x, step, rank))

    options = {"ranks": 3, "tolerance": 0, "noise": [lay(step) for step in z]}
    found, report = sample(program, laid_out, lay(x), **options)
    assert same(found, exact(program, smooth, x, noise=z))
    assert report.failures == []


@needs_torch
@pytest.mark.parametrize(
    "lay",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x[0, 0, 0].expand(x.shape),
        lambda x: x.clone().requires_grad_(),
        lambda x: torch.nn.Parameter(x.clone()),
        lambda x: x.to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "every other", "expanded", "requires grad", "parameter", "channels last"],
)
def test_layouts_of_torch(lay):
    x = latents((2, 3, 4, 5), "torch.float32")
    plain = lay(x).detach().contiguous()

    def laid_out(x, step, rank):
        assert x.is_contiguous() and not x.requires_grad and type(x) is torch.Tensor
        return lay(smooth(x, step, rank))

    def contiguous(x, step, rank):
        return lay(smooth(x, step, rank)).detach().contiguous()

    found, report = sample(multistep(6), laid_out, lay(x), ranks=3, tolerance=0)
    assert same(found, exact(multistep(6), contiguous, plain))
    assert report.failures == []


@needs_torch
def test_outputs_with_a_graph():
    model = torch.nn.Linear(4, 4)
    x = latents(dtype="torch.float32")

    def denoiser(x, step, rank):
        output = model(x)
        assert output.requires_grad
        return output

    found, report = sample(euler(6), denoiser, x, ranks=3, tolerance=0)
    assert same(found, exact(euler(6), denoiser, x))
    assert not found.requires_grad and report.failures == []


@needs_torch
@pytest.mark.parametrize("m", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("x", ["float32", "float16", "bfloat16", "float64"])
def test_outputs_of_another_dtype(x, m):
    """As far as 4 bytes an element, or x's own size, go."""
    program, start = multistep(7), latents(dtype=f"torch.{x}")

    def denoiser(x, step, rank):
        return smooth(x, step, rank).to(getattr(torch, m))

    found, report = sample(program, denoiser, start, ranks=4, tolerance=0)
    assert same(found, exact(program, denoiser, start))
    assert report.failures == []
    _, report = sample(program, denoiser, start, ranks=4, tolerance=math.inf)
    assert report.rounds == 3 and report.failures == []


def other_kinds():
    values = latents((12,))
    yield "Tensor", _core._roundtrip(values), _core.Tensor
    yield "capsule", _core._roundtrip(values).__dlpack__(), _core.Tensor
    yield "buffer", array.array("f", values), _core.Tensor
    yield "memoryview", memoryview(values), _core.Tensor


@pytest.mark.parametrize("kind", [name for name, _, _ in other_kinds()])
def test_other_kinds_of_tensors(kind):
    given, wanted = next(parts[1:] for parts in other_kinds() if parts[0] == kind)
    types = set()

    def denoiser(x, step, rank):
        types.add(type(x))
        return smooth(np.asarray(x), step, rank)

    found, report = sample(euler(6), denoiser, given, ranks=3, tolerance=0)
    assert types == {wanted} and type(found) is wanted
    assert bits(found) == bits(exact(euler(6), smooth, latents((12,))))
    assert report.failures == []


def test_large_latents():
    x = latents((3, 5, 1001))
    found, _ = sample(multistep(5), smooth, x, ranks=4, tolerance=0)
    assert same(found, exact(multistep(5), smooth, x))


# ---- threads and their context -------------------------------------------------------------------


def seen_by_ranks(look, ranks=4, steps=6, x=None):
    """What look() gives on every rank, each asked several times."""
    seen, lock = defaultdict(set), threading.Lock()

    def denoiser(x, step, rank):
        with lock:
            seen[rank].add(look())
        return x * 0.5

    x = latents() if x is None else x
    _, report = sample(euler(steps), denoiser, x, ranks=ranks, tolerance=0)
    assert report.failures == [] and sorted(seen) == list(range(ranks))
    return [seen[rank] for rank in range(ranks)]


def test_rank_0_is_the_callers_thread_and_each_other_has_its_own():
    names = seen_by_ranks(lambda: threading.current_thread().name)
    assert names == [{threading.current_thread().name}, *({f"parastep-{k}"} for k in (1, 2, 3))]
    assert seen_by_ranks(lambda: threading.current_thread().daemon)[1:] == [{True}] * 3


def test_context_variables_are_handed_on():
    variable = contextvars.ContextVar("variable", default="nothing")
    token = variable.set("the caller's")
    assert seen_by_ranks(variable.get) == [{"the caller's"}] * 4
    variable.reset(token)


def test_context_variables_set_by_followers_stay_theirs():
    variable = contextvars.ContextVar("variable", default="nobody")

    def look():
        before = variable.get()
        variable.set(threading.current_thread().name)
        return before

    seen = seen_by_ranks(look)
    own = threading.current_thread().name
    assert seen == [{"nobody", own}, *({"nobody", f"parastep-{k}"} for k in (1, 2, 3))]
    assert variable.get() == own


def torch_modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        str(torch.empty(0).device),
    )


@needs_torch
@pytest.mark.parametrize(
    "enter",
    [
        list,
        lambda: [torch.no_grad()],
        lambda: [torch.inference_mode()],
        lambda: [torch.inference_mode(), torch.inference_mode(False)],
        lambda: [torch.autocast("cpu", torch.bfloat16)],
        lambda: [torch.autocast("cpu", torch.float16, cache_enabled=False), torch.no_grad()],
        lambda: [torch.device("meta")],
    ],
    ids=["none", "no_grad", "inference", "nested", "autocast", "half", "device"],
)
def test_torch_modes_are_handed_on(enter):
    x = latents(dtype="torch.float32")
    with contextlib.ExitStack() as stack:
        for mode in enter():
            stack.enter_context(mode)
        wanted = torch_modes()
        assert seen_by_ranks(torch_modes, x=x) == [{wanted}] * 4
    assert torch_modes() == (True, False, False, None, "cpu")


@needs_torch
def test_threads_of_torch_are_left_alone():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        seen_by_ranks(torch.get_num_threads, x=latents(dtype="torch.float32"))
        assert torch.get_num_threads() == 3
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
    finally:
        torch.set_num_threads(before)


@needs_torch
def test_a_number_of_threads_for_followers_alone():
    from parastep.threads import HostContext

    before, seen = torch.get_num_threads(), []

    def look():
        seen.append(torch.get_num_threads())

    HostContext().start(look, "counted", before + 1).join()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before + 1, before]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_may_sample_at_once(threads):
    program, denoiser = euler(12), Gaussian(12)
    starts = [latents(seed=k) for k in range(threads)]
    wanted = [sample(program, denoiser, x, ranks=3)[0] for x in starts]
    found, barrier = {}, threading.Barrier(threads)

    def work(k):
        barrier.wait()
        for _ in range(5):
            found[k] = sample(program, denoiser, starts[k], ranks=3)[0]

    workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for k in range(threads):
        assert same(found[k], wanted[k])


def test_a_denoiser_may_sample():
    inner = euler(4)

    def nested(x, step, rank):
        refined, report = sample(inner, smooth, x, ranks=2, tolerance=0)
        assert report.failures == []
        return smooth(refined, step, rank)

    x = latents()
    found, report = sample(euler(5), nested, x, ranks=3, tolerance=0)
    assert same(found, exact(euler(5), nested, x))
    assert report.failures == []


def test_denoisers_of_all_kinds():
    class Callable:
        def __call__(self, x, step, rank):
            return smooth(x, step, rank)

        def method(self, x, step, rank):
            return smooth(x, step, rank)

    def outputs():
        output = None
        while True:
            output = smooth(*(yield output))

    generators = {rank: outputs() for rank in range(3)}
    for generator in generators.values():
        next(generator)
    x = latents()
    wanted = exact(euler(5), smooth, x)
    for denoiser in [
        Callable(),
        Callable().method,
        functools.partial(lambda rate, x, step, rank: smooth(x, step, rank), 1.0),
        lambda x, step, rank: generators[rank].send((x, step, rank)),
        lambda *args: smooth(*args),
    ]:
        found, report = sample(euler(5), denoiser, x, ranks=3, tolerance=0)
        assert same(found, wanted)
        assert report.failures == []


# ---- nothing is left behind ----------------------------------------------------------------------


def test_references_are_given_back():
    program, x, z, denoiser = drawing(6), latents(), noise_of(6), Gaussian(6)
    things = (program, x, z, denoiser)

    def work():
        for ranks in (1, 4):
            for tolerance in (0, 0.02, math.inf):
                options = {"ranks": ranks, "tolerance": tolerance, "noise": z}
                sample(program, denoiser, x, **options)

    work()
    gc.collect()
    before = [sys.getrefcount(thing) for thing in things]
    for _ in range(3):
        work()
    gc.collect()
    assert [sys.getrefcount(thing) for thing in things] == before
    settle()


def test_memory_does_not_grow():
    """200 runs: what one run forgot of its arrays, its links or its report would show."""
    program, denoiser, x = euler(6), Gaussian(6), latents((2, 500))

    def work(times):
        for _ in range(times):
            sample(program, denoiser, x, ranks=3)
        gc.collect()

    tracemalloc.start()
    try:
        work(50)
        before, _ = tracemalloc.get_traced_memory()
        work(150)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000  # a point alone is 4 kB a step and run
    settle()


@pytest.mark.skipif(not tells_memory(), reason="memory cannot be told")
def test_memory_of_the_core_does_not_grow():
    program, denoiser, x = euler(3), Gaussian(3), latents((4, 2**15))  # 512 kB

    def work(times):
        for _ in range(times):
            sample(program, denoiser, x, ranks=3)
        gc.collect()

    work(20)
    before = resident_bytes()
    work(100)
    assert resident_bytes() - before < 30e6  # a link is 1 MB, an arena more


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
    found, report = sample(euler(3), smooth, latents(), ranks=256, tolerance=0)
    assert same(found, exact(euler(3), smooth, latents()))
    assert report.evaluations == evaluations_at_0(3, 256)
    assert report.failures == []


def test_a_deadline_without_end():
    found, report = sample(euler(4), smooth, latents(), ranks=3, tolerance=0, deadline=math.inf)
    assert same(found, exact(euler(4), smooth, latents())) and report.failures == []
