"""The turn of a Leader by hand: asked, evaluated or answered, advanced; and what it reports."""

import math
import threading

import numpy as np
import pytest
from cases import drawing, euler, exact, latents, noise_of, same, settle, smooth
from mixture import setting
from turns import Leader, one_step, serving

import parastep
from parastep import DtypeError, InvalidError, ShapeError, _core

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="no torch")


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


def test_threads_by_hand_have_left():
    settle()
    assert [t.name for t in threading.enumerate() if t.name.startswith("by hand")] == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_edit_where_a_round_begins_is_evaluated(ranks):
    """No guess is there to show it, and one made from the edited latent would not."""
    steps, begun = 40, 0
    for at in range(8, steps - 2):
        program, denoiser, x = setting(steps)
        leader = _core.Leader(program, x, ranks=ranks, tolerance=0.04)
        with serving(leader, ranks, denoiser):
            for step in range(steps):
                before = leader.report()
                if step == at:
                    x = x + 5.0
                while (answered := leader.ask(step, x, leader.output())) is None:
                    assert step != at
                    leader.fill([denoiser(point, later, 0) for later, point in leader.work()])
                    leader.submit(None)
                if step == at:
                    assert not answered
                    begun += sum(before["accepted"]) == step
                if not answered:
                    leader.submit(denoiser(x, step, 0))
                x = leader.advance()
    assert begun > 0
