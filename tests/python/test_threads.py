"""Many threads at once, with a GIL or without one (`make test-freethreaded PYTHON=...`)."""

import subprocess
import sys
import sysconfig
import threading

import numpy as np
import pytest

import parastep
from parastep import StateError, _core

FREE = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
X = np.random.default_rng(0).standard_normal((2, 3, 5)).astype("f4")
PROGRAM = parastep.Program.flow_euler(np.linspace(1.0, 0.0, 13))


def denoiser(x, step, rank):
    return np.sin(x) * (1.0 + 0.01 * step)


def at_once(count, body):
    """What `body(k)` returned or raised in each of so many threads that begin together."""
    gate, found = threading.Barrier(count), [None] * count

    def run(k):
        gate.wait(20)
        try:
            found[k] = body(k)
        except Exception as error:
            found[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


@pytest.mark.skipif(not FREE, reason="this Python has a GIL")
def test_importing_leaves_the_gil_off():
    code = "import sys, parastep, parastep._core; sys.exit(sys._is_gil_enabled())"
    options = ["-W", "error::RuntimeWarning"]
    subprocess.run([sys.executable, *options, "-c", code], check=True, timeout=60)


def test_runs_at_once_share_a_program():
    expected = {
        tolerance: parastep.sample(PROGRAM, denoiser, X, ranks=3, tolerance=tolerance)
        for tolerance in (0.0, 0.02)
    }

    def body(k):
        tolerance = (0.0, 0.02)[k % 2]
        for _ in range(6):
            x, report = parastep.sample(PROGRAM, denoiser, X, ranks=3, tolerance=tolerance)
            assert np.array_equal(x, expected[tolerance][0])
            assert report.rounds == expected[tolerance][1].rounds

    assert at_once(6, body) == [None] * 6


def test_a_leader_lets_one_thread_in_at_a_time():
    leader = _core.Leader(PROGRAM, X, ranks=1, max_stride=1)

    def body(k):
        entered = 0
        for _ in range(200):
            try:
                entered += leader.report()["steps"] == len(PROGRAM)
            except StateError as error:
                assert "another call is inside" in str(error)
        return entered

    entered = at_once(4, body)
    assert all(isinstance(count, int) for count in entered) and sum(entered) > 0
    assert leader.ask(0, X, leader.output()) is False
    leader.finish()


def test_a_follower_is_given_once():
    for _ in range(20):
        leader = _core.Leader(PROGRAM, X, ranks=3, max_stride=1)
        given = at_once(4, lambda k: take(leader))  # noqa: B023
        assert sum(isinstance(one, _core.Follower) for one in given) == 1
        leader.finish()


def take(leader):
    """Rank 1's end, however often another thread is inside just now."""
    while True:
        try:
            return leader.follower(1)
        except StateError:
            continue
        except parastep.InvalidError as error:
            return error


def test_a_capsule_is_taken_once():
    for _ in range(50):
        capsule = X.__dlpack__()
        found = at_once(4, lambda k: _core.copy(capsule))  # noqa: B023
        taken = [one for one in found if not isinstance(one, Exception)]
        assert len(taken) == 1 and np.array_equal(np.from_dlpack(taken[0]), X)
        assert all("used already" in str(one) for one in found if one is not taken[0])


def test_a_list_is_emptied_while_it_is_read():
    leader = _core.Leader(PROGRAM, X, ranks=2, max_stride=1)
    follower = leader.follower(1)
    outputs, over = [X], threading.Event()

    def empty():
        while not over.is_set():
            outputs.clear()
            outputs.append(X)

    def serve():
        while follower.next() is not None:
            while True:
                try:
                    follower.submit(outputs)
                    break
                except parastep.ShapeError as error:
                    assert "0 tensors for 1 steps" in str(error)

    other = threading.Thread(target=empty)
    other.start()

    def lead():
        for step in range(len(PROGRAM)):
            if not leader.ask(step, X, leader.output()):
                leader.submit(X)
        leader.finish()

    try:
        assert at_once(2, lambda k: (serve, lead)[k]()) == [None, None]
    finally:
        over.set()
        other.join()
    assert leader.report()["failures"] == []
