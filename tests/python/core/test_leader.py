"""Leader and Follower themselves: the turn by hand, calls out of order, signals, forks, stub."""

import ast
import contextlib
import functools
import gc
import inspect
import math
import os
import pathlib
import signal
import threading
import time
import weakref

import numpy as np
import pytest
from cases import (
    drawing,
    euler,
    exact,
    latents,
    noise_of,
    resident_bytes,
    run_script,
    same,
    settle,
    smooth,
    tells_memory,
)

import parastep
from parastep import (
    AbandonedError,
    DtypeError,
    InvalidError,
    LostError,
    Program,
    ShapeError,
    StateError,
    _core,
)

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="no torch")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")

# Every step is evaluated by some rank; test_strided.py has the others.
Leader = functools.partial(_core.Leader, max_stride=1)


def serve(follower, denoiser=smooth):
    """Evaluates until the run is over."""
    with contextlib.suppress(AbandonedError):
        while (work := follower.next()) is not None:
            follower.submit([denoiser(point, step, follower.rank) for step, point in work])


@contextlib.contextmanager
def serving(leader, ranks, denoiser=smooth):
    """Followers of ranks 1 to ranks - 1 in threads, for the time of a with."""
    threads = []
    try:
        for rank in range(1, ranks):
            args = (leader.follower(rank), denoiser)
            threads.append(threading.Thread(target=serve, args=args, name=f"by hand {rank}"))
            threads[-1].start()
        yield
    finally:
        leader.finish()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


def one_step(leader, step, x, denoiser=smooth):
    """The turn of a loop: x_{j+1}."""
    m = leader.output()
    if not leader.ask(step, x, m):
        leader.submit(denoiser(x, step, 0))
    return leader.advance()


# ---- the stub ------------------------------------------------------------------------------------


def stub():
    path = pathlib.Path(parastep.__file__).with_name("_core.pyi")
    return {
        node.name: node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    }


def public(names):
    """Without what every class has."""
    return {name for name in names if not name.startswith("__") or "dlpack" in name}


def test_the_stub_names_what_the_module_has():
    assert set(stub()) == {name for name in dir(_core) if not name.startswith("__")}


@pytest.mark.parametrize("name", [name for name, kind in vars(_core).items() if type(kind) is type])
def test_the_stub_names_what_a_class_has(name):
    kind, node = getattr(_core, name), stub()[name]
    if issubclass(kind, Exception):
        assert [base.id for base in node.bases] == [base.__name__ for base in kind.__bases__]
    else:
        declared = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        assert public(declared) == public(vars(kind))


def parameters_of(node):
    """Names of the parameters of a function in the stub, and their defaults."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    found = zip([*plain, *args.kwonlyargs], [*defaults, *args.kw_defaults])
    return {
        arg.arg: inspect.Parameter.empty if value is None else ast.literal_eval(value)
        for arg, value in found
        if arg.arg not in ("self", "cls")
    }


def functions():
    for name, node in stub().items():
        if isinstance(node, ast.FunctionDef):
            yield name, getattr(_core, name), node
        elif not issubclass(getattr(_core, name), Exception):
            for part in node.body:
                made = part.name == "__new__"
                has = getattr(_core, name) if made else getattr(getattr(_core, name), part.name)
                if callable(has) and part.name != "__len__":
                    yield f"{name}.{part.name}", has, part


@pytest.mark.parametrize("name", [name for name, _, _ in functions()])
def test_the_stub_has_the_signatures(name):
    has, node = next(parts[1:] for parts in functions() if parts[0] == name)
    found = {
        key: parameter.default
        for key, parameter in inspect.signature(has).parameters.items()
        if key != "self"
    }
    assert found == parameters_of(node)
    assert inspect.getdoc(has)


def test_the_package_is_typed():
    assert pathlib.Path(parastep.__file__).with_name("py.typed").exists()


# ---- the module ----------------------------------------------------------------------------------


def test_exceptions_are_the_fitting_built_ins():
    pairs = {
        "ShapeError": ValueError,
        "InvalidError": ValueError,
        "DeviceError": ValueError,
        "DtypeError": TypeError,
        "DeadlineError": TimeoutError,
        "LostError": ConnectionError,
        "OutOfMemoryError": MemoryError,
        "UnsupportedError": NotImplementedError,
        "StateError": RuntimeError,
        "InterruptedRunError": InterruptedError,
        "NotFiniteError": ArithmeticError,
    }
    for name, kind in pairs.items():
        error = getattr(parastep, name)
        assert issubclass(error, kind) and issubclass(error, parastep.Error)
        assert error.__module__ == "parastep"
        assert str(error("some words")) == "some words"


def test_build_info():
    info = parastep.build_info()
    assert info["version"] == parastep.__version__
    assert info["backends"]["cpu"] == "found"
    assert "threads" in info["transports"]


def test_import_starts_nothing_and_needs_numpy_alone():
    script = """
        import sys, threading
        import parastep
        assert threading.active_count() == 1
        assert not {"torch", "diffusers", "matplotlib"} & set(sys.modules)
        import numpy as np
        program = parastep.Program.euler(np.linspace(1, 0, 5))
        x, report = parastep.sample(program, lambda x, step, rank: x, np.ones(3), ranks=3)
        assert "torch" not in sys.modules
    """
    done = run_script(script)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_clock_is_monotonic():
    times = [_core.now_ns() for _ in range(100)]
    assert times == sorted(times) and times[0] < _core.now_ns() + 1


# ---- the turn by hand ----------------------------------------------------------------------------


def test_a_leader_alone():
    program, x = euler(5), latents()
    leader = Leader(program, x)
    given = x
    for step in range(5):
        x = one_step(leader, step, x)
    assert same(x, exact(program, smooth, given))
    report = leader.report()
    assert (report["rounds"], report["accepted"], report["answered"]) == (5, [1] * 5, 0)


def test_an_answer_needs_no_model_run():
    program, x = euler(7), latents()
    leader = Leader(program, x, ranks=3, tolerance=math.inf)
    said = []
    with serving(leader, 3):
        for step in range(7):
            m = leader.output()
            m[:] = np.nan
            said.append(leader.ask(step, x, m))
            if said[-1]:
                assert np.isfinite(m).all()
            else:
                leader.submit(smooth(x, step, 0))
            x = leader.advance()
    assert said == [False, False, True, True, False, True, True]
    options = {"ranks": 3, "tolerance": math.inf, "max_stride": 1}
    wanted, _ = parastep.sample(program, smooth, latents(), **options)
    assert same(x, wanted)


def test_without_room_for_an_answer_the_host_evaluates():
    program, x = euler(6), latents()
    leader = Leader(program, x, ranks=3, tolerance=math.inf)
    with serving(leader, 3):
        for step in range(6):
            assert leader.ask(step, x, None) is False
            leader.submit(smooth(x, step, 0))
            x = leader.advance()
    assert same(x, exact(program, smooth, latents()))
    assert leader.report()["evaluations"] == [6, 1, 1]  # step 0 verifies them in any case


def test_beyond_the_program_the_host_evaluates():
    x = latents()
    leader = Leader(euler(2), x, ranks=2, tolerance=math.inf)
    with serving(leader, 2):
        for step in range(5):
            asked = leader.ask(step, x, leader.output())
            assert asked is False or step < 2
            if not asked:
                leader.submit(x)
    report = leader.report()
    assert report["steps"] == 2 and len(report["accepted"]) == 2 and len(report["drift"]) == 2


def test_an_answer_is_amended():
    """The host edited the latent after the ask: m = f(x^) + g (x - x^) at the new x."""
    program, x = euler(4), latents(dtype="float64")
    points = {}
    leader = Leader(program, x, ranks=2, tolerance=math.inf)

    def keeping(x, step, rank):
        points[step] = x
        return smooth(x, step, rank)

    with serving(leader, 2, keeping):
        for step in range(2):
            x = one_step(leader, step, x)
        m = leader.output()
        assert leader.ask(2, x, m)
        edited = x + 0.5
        spent = leader.amend(edited, m)
        distance = edited - points[2]
        np.testing.assert_allclose(m, smooth(points[2], 2, 1) + program.g[2] * distance, rtol=1e-12)
        rms = np.sqrt((distance**2).mean(axis=(1, 2))).max()
        report = leader.report()
        assert report["drift"][2] == pytest.approx(rms / program.s[2], rel=1e-9)
        assert spent == report["cost"][2] * report["drift"][2]
        np.testing.assert_allclose(leader.advance(), edited + program.b[2, 0] * m, rtol=1e-12)


def test_a_latent_is_amended_before_its_output():
    program, x = euler(3), latents(dtype="float64")
    leader = _core.Leader(program, x)
    leader.ask(0, x)
    assert math.isnan(leader.amend(x + 1))
    leader.submit(smooth(x, 0, 0))
    np.testing.assert_allclose(
        leader.advance(), x + 1 + program.b[0, 0] * smooth(x, 0, 0), rtol=1e-12
    )


@pytest.mark.parametrize("slots", [[2, 1], [1, 2], [2, 3], [4, 4]])
def test_ranks_with_several_slots(slots):
    """All steps of a rank come as one batch; the leader's own beside the exact one."""
    program, x, batches = euler(17), latents(), []
    leader = Leader(program, x, ranks=2, slots=slots, tolerance=math.inf)

    def own(follower):
        while (work := follower.next()) is not None:
            batches.append(len(work))
            assert [step for step, _ in work] == sorted(step for step, _ in work)
            follower.submit([smooth(point, step, 1) for step, point in work])

    thread = threading.Thread(target=own, args=(leader.follower(1),))
    thread.start()
    for step in range(17):
        if not leader.ask(step, x, leader.output()):
            work = leader.work()
            assert len(work) <= slots[0] - 1
            if work:
                leader.fill([smooth(point, later, 0) for later, point in work])
            leader.submit(smooth(x, step, 0))
        x = leader.advance()
    leader.finish()
    thread.join(20)
    report = leader.report()
    assert report["rounds"] == 1 + math.ceil(16 / sum(slots))
    assert max(batches) == slots[1] and batches[0] == 1
    assert report["failures"] == []


def test_moved_points_are_measured():
    """Drift is told against the point that a follower says it really evaluated."""
    program, x = euler(3), latents(dtype="float64")
    leader = _core.Leader(program, x, ranks=2, tolerance=0)
    moved = {}

    def shifting(follower):
        while (work := follower.next()) is not None:
            ((step, point),) = work
            if step > 0:
                point = point + 0.25
            moved[step] = point
            follower.submit([smooth(point, step, 1)], points=[point])

    thread = threading.Thread(target=shifting, args=(leader.follower(1),))
    thread.start()
    for step in range(3):
        if step == 2:
            rms = np.sqrt(((x - moved[2]) ** 2).mean(axis=(1, 2))).max()
        x = one_step(leader, step, x)
    leader.finish()
    thread.join(20)
    report = leader.report()
    assert report["drift"][2] == pytest.approx(rms / program.s[2], rel=1e-9)
    assert report["failures"] == []


def test_speculation_stops_when_told():
    program, x = euler(8), latents()
    leader = Leader(program, x, ranks=3, tolerance=math.inf)
    with serving(leader, 3):
        for step in range(8):
            if step == 5:
                leader.stop("the guidance changed")
                leader.stop("something later")
            x = one_step(leader, step, x)
    report = leader.report()
    assert report["fallback"] == "the guidance changed"
    assert report["accepted"] == [1, 3, 1, 1, 1, 1]


def test_a_rank_is_left_out_when_told():
    program, x = euler(6), latents()
    leader = _core.Leader(program, x, ranks=3, tolerance=0)
    with serving(leader, 3):
        for step in range(6):
            if step == 2:
                leader.leave_out(1, "its fan is too loud")
                leader.leave_out(1, "twice is fine")
            x = one_step(leader, step, x)
    assert same(x, exact(program, smooth, latents()))
    report = leader.report()
    assert report["failures"] == [(1, 2, "FAILED", "its fan is too loud")]
    assert report["evaluations"][2] > report["evaluations"][1]
    for rank in (0, 3, -1):
        with pytest.raises(InvalidError, match=f"rank {rank}: must be 1 to 2"):
            _core.Leader(program, x, ranks=3).leave_out(rank, "no such rank")


def test_the_noise_that_guesses_may_pass():
    leader = _core.Leader(drawing(9), latents(), ranks=3)
    z = noise_of(1)[0]
    assert leader.horizon == 2
    for step in (-1, 2, 8, 100):
        with pytest.raises(InvalidError, match=f"noise of step {step}"):
            leader.noise(step, z)
    leader.noise(0, z)
    leader.noise(1, z)
    with pytest.raises(ShapeError, match="noise: shape"):
        leader.noise(0, z[0])
    with pytest.raises(DtypeError, match="noise: dtype float64"):
        leader.noise(0, z.astype("f8"))
    for rank in (1, 2):
        leader.leave_out(rank, "nobody is there")
    leader.ask(0, latents())
    leader.submit(latents())
    assert leader.horizon == 3


def test_outputs_have_the_dtype_of_the_first():
    x = latents(dtype="float64")
    leader = _core.Leader(euler(3), x)
    assert leader.output().dtype == "float64"
    leader.ask(0, x)
    leader.submit(x.astype("float32"))
    m = leader.output()
    assert (m.dtype, m.shape, type(m)) == ("float32", x.shape, np.ndarray)
    with pytest.raises(DtypeError, match="m_out: dtype float64 where float32 is needed"):
        leader.ask(1, x, x * 0)
    leader.ask(1, x, m)
    with pytest.raises(DtypeError, match="output at step 1 is float64 where float32 is expected"):
        leader.submit(x)
    leader.submit(m)


@pytest.mark.parametrize(
    ("m_out", "error", "words"),
    [
        (lambda x: x[:1].copy(), ShapeError, "m_out: shape"),
        (lambda x: x.T.copy().T, InvalidError, "m_out is written in place.*contiguous"),
        (lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape), InvalidError, "read-only"),
        (lambda x: x.astype("f8"), DtypeError, "m_out: dtype float64"),
        (lambda x: [1.0], DtypeError, "m_out is of type list"),
        pytest.param(
            lambda x: torch.from_numpy(x.copy()).requires_grad_(),
            InvalidError,
            "m_out .*requires grad",
            marks=needs_torch,
        ),
    ],
)
def test_where_answers_cannot_be_written(m_out, error, words):
    x = latents()
    leader = Leader(euler(4), x)
    leader.ask(0, x)
    leader.submit(x)
    with pytest.raises(error, match=words):
        leader.ask(1, x, m_out(x))
    assert leader.ask(1, x, leader.output()) is False


# ---- calls out of order --------------------------------------------------------------------------


def leader_at(stage, ranks=1):
    """A leader of four steps: "made", "asked", "submitted", "advanced", "ended" or "finished"."""
    x = latents()
    leader = _core.Leader(drawing(4), x, ranks=ranks)
    for rank in range(1, ranks):
        leader.leave_out(rank, "nobody is there")
    if stage != "made":
        leader.ask(0, x)
    if stage in ("submitted", "advanced", "ended"):
        leader.submit(x)
    if stage in ("advanced", "ended"):
        leader.advance()
    for step in range(1, 4 if stage == "ended" else 0):
        leader.ask(step, x)
        leader.submit(x)
    if stage == "finished":
        leader.finish()
    return leader


X = latents()
OUT_OF_ORDER = [
    ("made", "submit", (X,), StateError, "submit: the run waits for the ask of step 0"),
    ("made", "advance", (), StateError, "no step"),
    ("made", "amend", (X,), StateError, "amend"),
    ("made", "work", (), StateError, "work: the run waits for the ask of step 0"),
    ("made", "fill", ([],), StateError, "work"),
    ("made", "ask", (1, X), InvalidError, "step 1 where step 0 is next"),
    ("made", "ask", (-1, X), InvalidError, "step -1 where step 0 is next"),
    ("asked", "ask", (0, X), StateError, "ask: the run waits for the output of step 0"),
    ("asked", "ask", (1, X), StateError, "ask: the run waits for the output of step 0"),
    ("asked", "advance", (), StateError, "advance: the run waits for the output of step 0"),
    ("asked", "fill", ([X],), ShapeError, "outputs: 1 tensors for 0 steps"),
    ("submitted", "submit", (X,), StateError, "submit: the run waits for the ask of step 1"),
    ("submitted", "ask", (0, X), InvalidError, "step 0 where step 1 is next"),
    ("submitted", "ask", (2, X), InvalidError, "step 2 where step 1 is next"),
    ("submitted", "amend", (X, X.copy()), StateError, "step 0 was not answered"),
    ("advanced", "work", (), StateError, "work: the run waits for the ask of step 1"),
    ("ended", "noise", (4, X), InvalidError, "noise of step 4"),
    *(
        ("finished", name, args, StateError, f"{name}: the run is over")
        for name, args in [
            ("ask", (1, X)),
            ("submit", (X,)),
            ("amend", (X,)),
            ("advance", ()),
            ("work", ()),
        ]
    ),
    ("finished", "follower", (1,), InvalidError, "rank 1"),
]


@pytest.mark.parametrize(("stage", "method", "args", "error", "words"), OUT_OF_ORDER)
def test_calls_out_of_order(stage, method, args, error, words):
    leader = leader_at(stage)
    with pytest.raises(error, match=words):
        getattr(leader, method)(*args)


@pytest.mark.parametrize("stage", ["made", "asked", "submitted", "advanced", "ended", "finished"])
def test_what_may_be_called_at_any_time(stage):
    leader = leader_at(stage, ranks=2)
    assert leader.report()["steps"] == 4
    assert leader.output().shape == X.shape
    assert leader.horizon <= 4
    leader.stop("enough")
    leader.leave_out(1, "enough")
    leader.finish()
    leader.finish()
    report = leader.report()
    assert report["fallback"] == "enough"
    assert report["seconds"] == leader.report()["seconds"]


def test_a_refused_call_changes_nothing():
    program, x = euler(4), latents()
    leader = _core.Leader(program, x, ranks=3, tolerance=0)
    with serving(leader, 3):
        for step in range(4):
            for method, args in [
                (leader.submit, (x,)),
                (leader.ask, (step + 1, x)),
                (leader.ask, (step, x[0])),
                (leader.ask, (step, None)),
                (leader.ask, (step, x, x[0].copy())),
            ]:
                with pytest.raises(parastep.Error):
                    method(*args)
            assert not leader.ask(step, x, leader.output())
            for method, args in [
                (leader.submit, (x[0],)),
                (leader.submit, (x.astype("f8"),)),
                (leader.submit, (None,)),
                (leader.ask, (step, x)),
                (leader.advance, ()),
            ]:
                with pytest.raises(parastep.Error):
                    method(*args)
            leader.submit(smooth(x, step, 0))
            with pytest.raises(parastep.Error):
                leader.advance(x[0])
            x = leader.advance()
    assert same(x, exact(program, smooth, latents()))
    assert leader.report()["failures"] == []


@pytest.mark.parametrize("rank", [0, -1, 3, 100])
def test_ranks_without_a_follower(rank):
    leader = _core.Leader(euler(3), latents(), ranks=3)
    with pytest.raises(InvalidError, match=f"rank {rank}: must be 1 to 2, each taken once"):
        leader.follower(rank)


def test_a_follower_is_taken_once():
    leader = _core.Leader(euler(3), latents(), ranks=3)
    assert [leader.follower(rank).rank for rank in (1, 2)] == [1, 2]
    with pytest.raises(InvalidError, match="rank 1"):
        leader.follower(1)
    for rank in ("1", None, 1.5):
        with pytest.raises(TypeError):
            leader.follower(rank)


def test_followers_are_made_by_leaders_alone():
    with pytest.raises(TypeError):
        _core.Follower()
    for kind in (_core.Leader, _core.Follower, Program):
        with pytest.raises(TypeError):
            type("Sub", (kind,), {})


@pytest.mark.parametrize(
    ("slots", "error"),
    [
        ([1], InvalidError),
        ([1, 1, 1], InvalidError),
        ([1, 0], InvalidError),
        ([17, 1], InvalidError),
        ([1, 10**20], InvalidError),
        ([1, 1.0], TypeError),
        ([1, None], TypeError),
        ("ab", TypeError),
        (2, TypeError),
    ],
)
def test_slots_that_do_not_fit(slots, error):
    with pytest.raises(error, match="slots"):
        _core.Leader(euler(3), latents(), ranks=2, slots=slots)


# ---- a follower's side ---------------------------------------------------------------------------


@contextlib.contextmanager
def follower_with_work(ranks=2, step=0, **options):
    """(leader, follower 1) with the work of step 0 waiting; the leader is in another thread."""
    x = latents()
    leader = _core.Leader(euler(4), x, ranks=ranks, tolerance=0, **options)
    follower, errors = leader.follower(1), []

    def lead():
        try:
            leader.ask(0, x)
            leader.submit(smooth(x, 0, 0))
            leader.finish()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=lead)
    thread.start()
    try:
        yield leader, follower, errors
    finally:
        del follower
        thread.join(20)
        assert not thread.is_alive()


def failures_of(leader):
    return [(rank, step, status) for rank, step, status, _ in leader.report()["failures"]]


def test_work_is_answered_once():
    with follower_with_work() as (leader, follower, errors):
        with pytest.raises(StateError, match="no work was taken"):
            follower.submit([X])
        ((step, point),) = follower.next()
        assert step == 0 and same(point, X)
        with pytest.raises(StateError, match="were not submitted"):
            follower.next()
        follower.submit([smooth(point, 0, 1)])
        with pytest.raises(StateError, match="no work was taken"):
            follower.submit([X])
        assert follower.next() is None
        assert follower.next() is None
        follower.fail("too late to matter")
    assert leader.report()["failures"] == [] and errors == []


BAD_OUTPUTS = [
    ([], ShapeError, "0 tensors for 1 steps"),
    ([X, X], ShapeError, "2 tensors for 1 steps"),
    ([X[:1]], ShapeError, r"output: shape \(1, 3, 4\) where the latents are \(2, 3, 4\)"),
    ([X.astype("f8")], DtypeError, "dtype float64 does not fit a run of float32 latents"),
    ([X.astype("i4")], DtypeError, "output has dtype int32"),
    ([None], DtypeError, "output is of type NoneType"),
    ([[1.0]], DtypeError, "output is of type list"),
    (None, TypeError, "a sequence of tensors"),
    (3, TypeError, "a sequence of tensors"),
]


@pytest.mark.parametrize(("outputs", "error", "words"), BAD_OUTPUTS)
def test_outputs_that_do_not_fit_may_be_replaced(outputs, error, words):
    with follower_with_work() as (leader, follower, errors):
        ((_, point),) = follower.next()
        with pytest.raises(error, match=words):
            follower.submit(outputs)
        with pytest.raises((ShapeError, DtypeError, TypeError)):
            follower.submit([point], points=outputs if outputs is not None else 1)
        follower.submit([smooth(point, 0, 1)])
        assert follower.next() is None
    assert leader.report()["failures"] == [] and errors == []


def test_a_sequence_may_change_while_it_is_read():
    """By its own items, or by another thread where there is no GIL."""

    class Emptying:
        def __dlpack__(self, **kwargs):
            outputs.clear()
            gc.collect()
            return X.__dlpack__(**kwargs)

        def __index__(self):
            slots.clear()
            gc.collect()
            return 1

    outputs, slots = [Emptying()], [Emptying(), 1]
    with follower_with_work() as (_, follower, errors):
        follower.next()
        follower.submit(outputs)
        assert follower.next() is None and outputs == []
    program = Program.euler(np.linspace(1, 0, 4))
    _core.Leader(program, X, ranks=2, slots=slots).finish()
    assert slots == [] and errors == []


def test_a_follower_may_fail():
    with follower_with_work() as (leader, follower, errors):
        follower.fail("with no work at hand it answers the next message")
        follower.fail("and again, though nobody listens")
        assert follower.next() is None
    assert failures_of(leader) == [(1, 0, "FAILED")] and errors == []
    assert leader.report()["failures"][0][3] == "with no work at hand it answers the next message"


def test_a_dropped_follower_is_lost():
    with follower_with_work() as (leader, follower, errors):
        follower.next()
        del follower
        gc.collect()
    # The with statement's own reference went last.
    assert failures_of(leader) == [(1, 0, "LOST")] and errors == []


def test_an_abandoned_follower_is_told():
    with follower_with_work(deadline=0.05) as (leader, follower, errors):
        ((_, point),) = follower.next()
        wait_for(lambda: len(failures_quietly(leader)) == 1)
        with pytest.raises(AbandonedError, match="went on without"):
            follower.submit([point])
        assert follower.next() is None
    assert failures_of(leader) == [(1, 0, "DEADLINE")] and errors == []


def test_a_lost_follower_may_be_an_error():
    with follower_with_work(on_failure="raise") as (leader, follower, errors):
        follower.fail("no more")
    assert len(errors) == 1 and type(errors[0]) is LostError
    assert str(errors[0]) == "rank 1 was lost at step 0: no more"
    with pytest.raises(StateError, match="the run is over"):
        leader.ask(1, X)
    assert failures_of(leader) == [(1, 0, "FAILED")]


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def failures_quietly(leader):
    """Failures so far, of a leader that another thread may be inside of."""
    try:
        return leader.report()["failures"]
    except StateError:
        return []


@pytest.mark.parametrize("text", ["é" * 200, "日本" * 100, "x" + "😀" * 60, "", "a\0b"])
def test_reasons_in_any_language(text):
    """They are cut to the room there is, inside a character where it happens so."""
    leader = _core.Leader(euler(3), X, ranks=3)
    leader.leave_out(1, text) if "\0" not in text else None
    leader.stop(text)
    with follower_with_work() as (other, follower, errors):
        follower.fail(text)
    begin = text.split("\0")[0][:30]
    for found in (leader.report()["fallback"], other.report()["failures"][0][3]):
        assert (found or "").startswith(begin)
    assert errors == []
    with follower_with_work(on_failure="raise") as (_, follower, errors):
        follower.fail(text)
    assert type(errors[0]) is LostError and begin in str(errors[0])


@pytest.mark.parametrize("reason", [None, 3, b"bytes"])
def test_reasons_are_text(reason):
    leader = _core.Leader(euler(3), X, ranks=2)
    follower = leader.follower(1)
    for call in (leader.stop, follower.fail, lambda r: leader.leave_out(1, r)):
        with pytest.raises(TypeError):
            call(reason)


# ---- lives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["made", "asked", "submitted"])
def test_a_dropped_leader_lets_its_followers_leave(stage):
    x, left = latents(), threading.Event()
    leader = _core.Leader(euler(4), x, ranks=2)

    def body(follower):
        serve(follower)
        left.set()

    thread = threading.Thread(target=body, args=(leader.follower(1),))
    thread.start()
    if stage != "made":
        leader.ask(0, x)
    if stage == "submitted":
        leader.submit(smooth(x, 0, 0))
        leader.ask(1, x, leader.output())
    del leader
    gc.collect()
    assert left.wait(20)
    thread.join(20)


def test_a_leader_in_a_cycle_is_collected():
    class Latents(np.ndarray):
        pass

    x = latents().view(Latents)
    x.leader = _core.Leader(euler(4), x, ranks=2)
    x.follower = x.leader.follower(1)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_followers_outlive_their_leader():
    leader = _core.Leader(euler(4), X, ranks=3)
    followers = [leader.follower(rank) for rank in (1, 2)]
    leader.ask(0, X)
    works = [follower.next() for follower in followers]
    del leader
    gc.collect()
    for follower, ((_, point),) in zip(followers, works):
        assert same(point, X)
        with pytest.raises(AbandonedError):
            follower.submit([point])
        assert follower.next() is None


def test_a_leader_that_was_refused_leaves_nothing():
    for _ in range(3):
        for options in ({"tolerance": -1}, {"ranks": 3, "slots": [1, 1, 17]}):
            with pytest.raises(InvalidError):
                _core.Leader(euler(4), X, **options)
        with pytest.raises(ShapeError, match="empty latent"):
            _core.Leader(euler(4), X[:0], ranks=8)


@pytest.mark.skipif(not tells_memory(), reason="memory cannot be told")
def test_leaders_without_a_run_give_their_memory_back():
    """Whether finished or not, with ends that nobody took and with some that were."""
    program, x = euler(3), latents((4, 2**15))  # 512 kB, a link is twice that

    def work(times):
        for k in range(times):
            leader = _core.Leader(program, x, ranks=4)
            follower = leader.follower(2)
            if k % 3 == 0:
                leader.finish()
            if k % 3 == 1:
                del leader
            del follower

    work(12)
    before = resident_bytes()
    work(60)
    assert resident_bytes() - before < 20e6


# ---- one thread at a time ------------------------------------------------------------------------


def test_one_thread_at_a_time():
    """While the leader waits for a follower, no other thread may call it; nor a follower's end."""
    leader = _core.Leader(euler(4), X, ranks=2)
    follower = leader.follower(1)
    leader.ask(0, X)
    waiting = threading.Thread(target=leader.submit, args=(X,))
    waiting.start()
    work = follower.next()

    def is_inside():
        with contextlib.suppress(StateError):
            leader.report()
            return False
        return True

    wait_for(is_inside)
    for call in (
        lambda: leader.ask(1, X),
        lambda: leader.submit(X),
        leader.advance,
        leader.finish,
        leader.report,
        leader.work,
        lambda: leader.stop("now"),
        lambda: leader.horizon,
        lambda: leader.follower(1),
    ):
        with pytest.raises(StateError, match="one thread at a time"):
            call()
    follower.submit([work[0][1]])
    waiting.join(20)
    idle = threading.Thread(target=serve, args=(follower,))
    idle.start()

    def is_taken():
        with pytest.raises(StateError) as caught:
            follower.submit([])
        return "one thread at a time" in str(caught.value)

    wait_for(is_taken)
    leader.finish()
    idle.join(20)
    assert leader.report()["failures"] == []


def test_a_tensor_that_calls_back():
    class Meddling:
        def __dlpack__(self, **kwargs):
            leader.finish()

    leader = _core.Leader(euler(4), X)
    with pytest.raises(InvalidError, match="x cannot be read") as caught:
        leader.ask(0, Meddling())
    assert isinstance(caught.value.__cause__, StateError)
    assert leader.ask(0, X) is False


# ---- signals -------------------------------------------------------------------------------------


class Stop(Exception):
    """What the handler of a signal raises."""


@contextlib.contextmanager
def handler_of(action):
    """SIGUSR1 does action, then raises Stop."""

    def handle(number, frame):
        action()
        raise Stop

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def kick():
    os.kill(os.getpid(), signal.SIGUSR1)


def test_a_leader_that_waits_is_interrupted():
    leader = _core.Leader(euler(4), X, ranks=2)
    follower = leader.follower(1)
    leader.ask(0, X)
    ((_, point),) = follower.next()
    with handler_of(lambda: None):
        threading.Timer(0.05, kick).start()
        with pytest.raises(Stop):
            leader.submit(X)
    with pytest.raises(StateError, match="the run is over"):
        leader.ask(1, X)
    leader.finish()
    with pytest.raises(AbandonedError):
        follower.submit([point])
    assert leader.report()["failures"] == []


def test_an_interrupt_counts_where_the_reply_came_meanwhile():
    """The handler itself lets the follower reply: the wait has succeeded when the check fails."""
    leader = _core.Leader(euler(4), X, ranks=2)
    follower = leader.follower(1)
    leader.ask(0, X)
    ((_, point),) = follower.next()
    with handler_of(lambda: follower.submit([point])):
        threading.Timer(0.05, kick).start()
        with pytest.raises(Stop):
            leader.submit(X)
    leader.finish()
    assert follower.next() is None


def test_a_follower_that_waits_is_interrupted():
    leader = _core.Leader(euler(4), X, ranks=2)
    follower = leader.follower(1)
    with handler_of(lambda: None):
        threading.Timer(0.05, kick).start()
        with pytest.raises(Stop):
            follower.next()
        threading.Timer(0.05, kick).start()
        with pytest.raises(Stop):
            follower.fail("nothing to answer")
    leader.ask(0, X)
    ((_, point),) = follower.next()
    follower.submit([point])
    leader.submit(X)
    assert leader.report()["failures"] == []


def test_work_that_comes_with_an_interrupt_is_not_lost():
    leader = _core.Leader(euler(4), X, ranks=2)
    follower = leader.follower(1)
    with handler_of(lambda: leader.ask(0, X)):
        threading.Timer(0.05, kick).start()
        with pytest.raises(Stop):
            follower.next()
    follower.fail("interrupted")
    leader.submit(X)
    assert failures_of(leader) == [(1, 0, "FAILED")]


# ---- forks ---------------------------------------------------------------------------------------

FORK = """
    import os, sys, threading, warnings
    import numpy as np
    import parastep
    from cases import euler, exact, latents, same, smooth
    from parastep import _core

    warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads about

    def in_child(body):
        child = os.fork()
        if child == 0:
            try:
                body()
            except BaseException as error:
                print("child:", repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    def check_sample():
        x = latents()
        found, report = parastep.sample(euler(6), smooth, x, ranks=4, tolerance=0)
        assert same(found, exact(euler(6), smooth, x)) and not report.failures, report
"""


@needs_fork
def test_a_child_may_sample():
    script = (
        FORK
        + """
    in_child(check_sample)       # after import alone
    check_sample()
    in_child(check_sample)       # after a run
    in_child(lambda: in_child(check_sample))
    check_sample()
    """
    )
    done = run_script(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_fork
def test_a_run_carried_into_a_child_is_refused():
    script = (
        FORK
        + """
    import gc
    x = latents()
    leader = _core.Leader(euler(6), x, ranks=3, tolerance=0)
    served, idle = leader.follower(1), leader.follower(2)

    def serve(follower):
        while (work := follower.next()) is not None:
            follower.submit([smooth(point, step, 1) for step, point in work])

    threads = [threading.Thread(target=serve, args=(f,)) for f in (served, idle)]
    for thread in threads:
        thread.start()

    def refused():
        calls = {
            "ask": lambda: leader.ask(1, x),
            "amend": lambda: leader.amend(x),
            "submit": lambda: leader.submit(x),
            "noise": lambda: leader.noise(1, x),
            "advance": leader.advance,
            "work": leader.work,
            "fill": lambda: leader.fill([]),
            "stop": lambda: leader.stop("now"),
            "leave_out": lambda: leader.leave_out(1, "now"),
            "finish": leader.finish,
            "report": leader.report,
            "horizon": lambda: leader.horizon,
            "follower": lambda: leader.follower(1),
            "next": idle.next,
            "submit ": lambda: idle.submit([x]),
            "fail": lambda: idle.fail("now"),
        }
        for name, call in calls.items():
            try:
                call()
            except parastep.StateError as error:
                assert "another process" in str(error) and str(error).startswith(name.strip())
            else:
                raise AssertionError(name)
        check_sample()

    def dropped():
        global leader, served, idle
        leader = served = idle = None
        gc.collect()
        check_sample()

    latest = x
    for step in range(6):
        m = leader.output()
        assert not leader.ask(step, latest, m)
        in_child(refused)
        leader.submit(smooth(latest, step, 0))
        latest = leader.advance()
        in_child(refused)
    in_child(dropped)
    leader.finish()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert same(latest, exact(euler(6), smooth, x))
    assert leader.report()["failures"] == []
    """
    )
    done = run_script(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_fork
def test_a_child_of_a_denoiser():
    """Forked in the middle of a run, in the leader's thread."""
    script = (
        FORK
        + """
    def forking(x, step, rank):
        if rank == 0 and step == 2:
            in_child(check_sample)
        return smooth(x, step, rank)

    x = latents()
    found, report = parastep.sample(euler(6), forking, x, ranks=4, tolerance=0)
    assert same(found, exact(euler(6), smooth, x)) and not report.failures
    """
    )
    done = run_script(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_threads_by_hand_have_left():
    settle()
    assert [t.name for t in threading.enumerate() if t.name.startswith("by hand")] == []
