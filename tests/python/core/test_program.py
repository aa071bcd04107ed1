"""Program: tables in and out, what is refused, the built solvers against their formulas."""

import copy
import math
import pickle
import threading

import numpy as np
import pytest
from cases import euler, exact, latents, smooth

import parastep
from parastep import InvalidError, Program, ShapeError

try:
    import torch
except ImportError:
    torch = None

TABLES = "abcsg"


def arrays(steps=5, history=3, seed=0):
    """Five tables that fit: no row reaches back before step 0."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, steps, history))
    for j in range(min(steps, history)):
        a[j, j + 1 :] = b[j, j + 1 :] = 0.0
    c, g = rng.standard_normal((2, steps))
    return {"a": a, "b": b, "c": c, "s": rng.uniform(0.1, 2.0, steps), "g": g}


def tables_of(program):
    return {name: getattr(program, name) for name in TABLES}


def assert_tables(program, tables):
    for name in TABLES:
        np.testing.assert_array_equal(getattr(program, name), tables[name], err_msg=name)


# ---- tables in and out ---------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "history"), [(1, 1), (1, 4), (5, 3), (200, 4)])
def test_tables_come_back(steps, history):
    tables = arrays(steps, history)
    program = Program(**tables)
    assert (len(program), program.steps, program.history) == (steps, steps, history)
    assert_tables(program, tables)
    for table in tables_of(program).values():
        assert table.dtype == np.float64


def test_defaults():
    program = Program(np.ones((4, 1)), np.ones((4, 1)))
    assert program.c.tolist() == [0.0] * 4
    assert program.s.tolist() == [1.0] * 4
    assert program.g.tolist() == [0.0] * 4
    assert_tables(Program(program.a, program.b, None, None, None), tables_of(program))


def test_signal_that_nobody_gave_is_what_noise_and_rows_tell():
    preserved, flow = cosine(12), np.linspace(1.0, 0.0, 13)
    built = {
        "preserved": Program.ddim(*preserved),
        "preserved, two steps": Program.dpmpp_2m(*preserved),
        "flow": Program.flow_euler(flow),
        "exploding": euler(12),
    }
    for name, program in built.items():
        found = Program(program.a, program.b, program.c, program.s, program.g)
        np.testing.assert_allclose(found.alpha, program.alpha, atol=1e-9, err_msg=name)
    given = Program(built["flow"].a, built["flow"].b, s=built["flow"].s, alpha=np.ones(12))
    assert given.alpha.tolist() == [1.0] * 12


def test_tables_are_copied_both_ways():
    tables = arrays()
    kept = {name: table.copy() for name, table in tables.items()}
    program = Program(**tables)
    for table in (*tables.values(), *tables_of(program).values()):
        table[:] = 7.0
    assert_tables(program, kept)


def test_nothing_can_be_set():
    program = euler()
    for name in (*TABLES, "steps", "history", "something"):
        with pytest.raises(AttributeError):
            setattr(program, name, 1)


@pytest.mark.parametrize(
    "convert",
    [
        np.ndarray.tolist,
        np.asfortranarray,
        lambda table: np.flip(np.flip(table).copy()),
        lambda table: table.astype(">f8"),
        lambda table: table.view(np.memmap),
        pytest.param(
            lambda table: torch.from_numpy(table),
            marks=pytest.mark.skipif(torch is None, reason="no torch"),
        ),
    ],
    ids=["lists", "fortran", "strides", "swapped", "subclass", "torch"],
)
def test_other_arrays(convert):
    tables = arrays()
    program = Program(**{name: convert(table) for name, table in tables.items()})
    assert_tables(program, tables)


def test_other_numbers():
    program = Program(np.ones((2, 1), "f4"), np.ones((2, 1), "i8"), s=np.array([1, 2], "u1"))
    assert program.s.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_copies_are_equal(clone):
    tables = arrays()
    program = clone(Program(**tables))
    assert type(program) is Program
    assert_tables(program, tables)


def test_repr():
    assert repr(Program(**arrays(5, 3))) == "<parastep.Program: 5 steps, memory 2>"


def test_many_threads_share_a_program():
    program, x = euler(20), latents()
    wanted = exact(program, smooth, x)
    found = [None] * 4

    def work(k):
        for _ in range(10):
            found[k] = exact(program, smooth, x)
            copy.copy(program)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        np.testing.assert_array_equal(result, wanted)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_coefficients_are_finite(name, value):
    tables = arrays()
    tables[name][-1] = value
    with pytest.raises(InvalidError, match=rf"\b{name}\b.*(nan|inf)"):
        Program(**tables)


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0])
def test_noise_scales_are_above_zero(value):
    tables = arrays()
    tables["s"][2] = value
    with pytest.raises(InvalidError, match=r"\bs\b.*above 0"):
        Program(**tables)


@pytest.mark.parametrize("name", "ab")
def test_rows_do_not_reach_back_before_step_0(name):
    tables = arrays()
    tables[name][1, 2] = 1e-9
    with pytest.raises(InvalidError, match="row 1 reaches back 2 steps, before step 0"):
        Program(**tables)


def test_tables_of_no_steps():
    with pytest.raises(InvalidError, match="step"):
        Program(np.ones((0, 1)), np.ones((0, 1)))
    with pytest.raises(InvalidError, match="history"):
        Program(np.ones((3, 0)), np.ones((3, 0)))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("a", (5,), "a: .*dimensions"),
        ("a", (5, 3, 1), "a: .*dimensions"),
        ("b", (5,), "b: .*dimensions"),
        ("b", (4, 3), "b: 4 .*5"),
        ("b", (5, 2), "b: 2 columns where a has 3"),
        ("c", (5, 1), "c: .*dimensions"),
        ("c", (4,), "c: 4 values where 5"),
        ("s", (6,), "s: 6 values where 5"),
        ("s", (), "s: .*dimensions"),
        ("g", (1,), "g: 1 values where 5"),
    ],
)
def test_shapes_fit_together(name, shape, words):
    tables = arrays()
    tables[name] = np.ones(shape)
    with pytest.raises(ShapeError, match=words):
        Program(**tables)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("value", ["text", [[1.0, 2.0], [1.0]], [1j], object(), ["x"]])
def test_what_is_no_array_of_numbers(name, value):
    tables = arrays()
    tables[name] = value
    with pytest.raises(InvalidError, match=rf"^{name}: cannot be read as float64") as caught:
        Program(**tables)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("missing", "ab")
def test_a_and_b_are_needed(missing):
    tables = arrays()
    with pytest.raises(TypeError, match="a and b"):
        Program(**{**tables, missing: None})
    del tables[missing]
    with pytest.raises(TypeError):
        Program(**tables)


@pytest.mark.parametrize("program", [None, 3, "euler", [1.0, 0.0], np.ones((2, 2))])
def test_a_run_needs_a_program(program):
    with pytest.raises(TypeError, match=r"program: .*parastep\.Program.*needed"):
        parastep.sample(program, smooth, latents())


# ---- solvers -------------------------------------------------------------------------------------


def cosine(steps):
    """Signal and noise scales of a variance-preserving schedule, ending in the clean sample."""
    t = np.linspace(0.98, 0.0, steps + 1) * math.pi / 2
    return np.cos(t), np.sin(t)


def straight(steps):
    """Scales of a flow from noise to data."""
    sigma = np.linspace(1.0, 0.0, steps + 1)
    return 1.0 - sigma, sigma


def follow(step, steps, x, denoiser):
    """x after `steps` of step(j, x_j, m_j)."""
    for j in range(steps):
        x = step(j, x, denoiser(x, j, 0))
    return x


def clean(prediction, alpha, s, x, m):
    """The sample without noise that an output stands for."""
    return {
        "noise": lambda: (x - s * m) / alpha,
        "flow": lambda: (x - s * m) / (alpha + s),
        "velocity": lambda: alpha * x - s * m,
        "sample": lambda: m,
    }[prediction]()


def scales_for(prediction, steps):
    return straight(steps) if prediction == "flow" else cosine(steps)


@pytest.mark.parametrize("prediction", ["noise", "flow", "velocity", "sample"])
def test_ddim(prediction):
    alpha, s = scales_for(prediction, 12)
    program = Program.ddim(alpha, s, prediction)
    x = latents(dtype="float64") / 10

    def step(j, x, m):
        x0 = clean(prediction, alpha[j], s[j], x, m)
        return alpha[j + 1] * x0 + s[j + 1] * (x - alpha[j] * x0) / s[j]

    np.testing.assert_allclose(exact(program, smooth, x), follow(step, 12, x, smooth), rtol=1e-9)
    np.testing.assert_array_equal(program.s, s[:-1])
    assert (program.g > 0).all()


def test_ddim_predicts_noise_unless_told():
    alpha, s = cosine(5)
    np.testing.assert_array_equal(Program.ddim(alpha, s).b, Program.ddim(alpha, s, "noise").b)
    np.testing.assert_allclose(Program.ddim(alpha, s).g, 0.25 / s[:-1])


@pytest.mark.parametrize("prediction", ["noise", "velocity", "sample"])
@pytest.mark.parametrize("steps", [8, 16])
def test_dpmpp_2m(steps, prediction):
    """With fewer than 15 steps the last one is of first order, as hosts have it."""
    alpha, s = cosine(steps)
    s = s + 1e-3  # the rate is finite at the end too
    rate = np.log(alpha / s)
    program = Program.dpmpp_2m(alpha, s, prediction)
    x, older = latents(dtype="float64") / 10, []

    def step(j, x, m):
        x0 = clean(prediction, alpha[j], s[j], x, m)
        h, guess = rate[j + 1] - rate[j], x0
        if older and not (steps < 15 and j == steps - 1):
            r = (rate[j] - rate[j - 1]) / h
            guess = (1 + 1 / (2 * r)) * x0 - older[-1] / (2 * r)
        older.append(x0)
        return s[j + 1] / s[j] * x - alpha[j + 1] * math.expm1(-h) * guess

    found = exact(program, smooth, x)
    np.testing.assert_allclose(found, follow(step, steps, x, smooth), rtol=1e-7, atol=1e-9)
    assert program.history == 2


def test_dpmpp_2m_ends_in_the_clean_sample():
    alpha, s = cosine(6)
    program = Program.dpmpp_2m(alpha, s, "sample")
    x = exact(program, lambda x, step, rank: x * 0 + 3.0, latents(dtype="float64"))
    np.testing.assert_allclose(x, 3.0)


@pytest.mark.parametrize("build", [Program.euler, Program.flow_euler])
def test_euler(build):
    sigma = np.array([1.0, 0.7, 0.5, 0.1, 0.0])
    program = build(sigma)
    x = latents(dtype="float64")
    found = exact(program, smooth, x)
    wanted = follow(lambda j, x, m: x + (sigma[j + 1] - sigma[j]) * m, 4, x, smooth)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    np.testing.assert_array_equal(program.s, sigma[:-1])
    np.testing.assert_allclose(program.g, 0.25 / sigma[:-1])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_integrates_polynomials(order):
    """Once its history is full, order k integrates outputs of degree k - 1 in sigma exactly."""
    sigma = np.array([9.0, 7.5, 6.5, 4.0, 3.5, 2.0, 0.5, 0.0])
    program = Program.adams_bashforth(sigma, order)
    assert program.history == order

    def polynomial(degree, anti=0):
        return lambda t: t ** (degree + anti) / (degree + anti if anti else 1)

    for degree in range(order):
        value, integral = polynomial(degree), polynomial(degree, 1)
        for j in range(order - 1, len(program)):
            outputs = [value(sigma[j - k]) for k in range(order)]
            change = float(np.dot(program.b[j], outputs))
            assert math.isclose(change, integral(sigma[j + 1]) - integral(sigma[j]), rel_tol=1e-9)
    np.testing.assert_array_equal(program.a[:, 0], 1.0)
    np.testing.assert_array_equal(program.a[:, 1:], 0.0)


def test_adams_bashforth_of_order_1_is_euler():
    sigma = np.linspace(5.0, 0.0, 8)
    np.testing.assert_allclose(Program.adams_bashforth(sigma, 1).b, Program.euler(sigma).b)
    np.testing.assert_array_equal(
        Program.adams_bashforth(sigma).b, Program.adams_bashforth(sigma, order=2).b
    )


@pytest.mark.parametrize("build", [Program.euler, Program.flow_euler, Program.adams_bashforth])
@pytest.mark.parametrize(
    ("sigmas", "error"),
    [
        ([1.0], InvalidError),
        ([], InvalidError),
        ([1.0, -0.5], InvalidError),
        ([1.0, 0.0, -1.0], InvalidError),
        ([math.nan, 0.0], InvalidError),
        ([math.inf, 0.0], InvalidError),
        ([[1.0, 0.0]], ShapeError),
        (1.0, ShapeError),
        (None, TypeError),
        ("x", InvalidError),
    ],
)
def test_sigmas_that_are_refused(build, sigmas, error):
    with pytest.raises(error):
        build(sigmas)


@pytest.mark.parametrize("build", [Program.ddim, Program.dpmpp_2m])
@pytest.mark.parametrize(
    ("alpha", "s", "error"),
    [
        ([0.0, 1.0], [1.0], ShapeError),
        ([0.0], [1.0], InvalidError),
        ([], [], InvalidError),
        ([0.5, 1.0], [0.0, 0.0], InvalidError),
        ([0.5, 1.0], [-0.5, 0.0], InvalidError),
        ([0.5, math.nan], [0.5, 0.0], InvalidError),
        ([0.5, 1.0], [math.inf, 0.0], InvalidError),
        ([[0.5, 1.0]], [[0.5, 0.0]], ShapeError),
        (None, [1.0, 0.0], TypeError),
        ([0.5, 1.0], None, TypeError),
    ],
)
def test_scales_that_are_refused(build, alpha, s, error):
    with pytest.raises(error):
        build(alpha, s)


@pytest.mark.parametrize("prediction", ["eps", "", "Noise"])
def test_predictions_have_names(prediction):
    with pytest.raises(InvalidError, match="prediction: .*'noise', 'flow', 'velocity'"):
        Program.ddim([0.5, 1.0], [0.5, 0.0], prediction)


@pytest.mark.parametrize("sigmas", [[0.5, 1.0, 0.0], [1.0, 0.5, 0.5]])
def test_levels_of_adams_bashforth_decrease(sigmas):
    with pytest.raises(InvalidError, match="must decrease"):
        Program.adams_bashforth(sigmas)


@pytest.mark.parametrize("order", [0, 5, -1])
def test_orders_of_adams_bashforth(order):
    with pytest.raises(InvalidError, match=f"order {order}"):
        Program.adams_bashforth([1.0, 0.5, 0.0], order)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs(steps):
    """Fewer steps than the solver's history."""
    sigma = np.linspace(1.0, 0.0, steps + 1)
    assert len(Program.adams_bashforth(sigma, 4)) == steps
    alpha, s = cosine(steps)
    assert len(Program.dpmpp_2m(alpha, s)) == steps
