"""Forks: a child samples as any process does, and refuses a run that it was born with."""

import os

import pytest
from cases import run_script

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


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
        found, report = parastep.sample(euler(6), smooth, x, ranks=4, tolerance="rehearse")
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
    found, report = parastep.sample(euler(6), forking, x, ranks=4, tolerance="rehearse")
    assert same(found, exact(euler(6), smooth, x)) and not report.failures
    """
    )
    done = run_script(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
