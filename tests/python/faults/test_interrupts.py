"""Ctrl-C, wherever it meets a run: it is raised, and the next run is as good as any."""

import pytest
from cases import run_script

INTERRUPTED = """
    import os, random, signal, sys, threading, time
    import numpy as np
    import parastep
    from cases import euler, exact, latents, same, settle, smooth

    x, wanted = latents(), exact(euler(6), smooth, latents())
    back = threading.Event()

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)

    def check_next():
        found, report = parastep.sample(euler(6), smooth, x, ranks=4, tolerance="rehearse")
        assert same(found, wanted) and not report.failures, report

    def must_be_interrupted(denoiser, **options):
        try:
            parastep.sample(euler(6), denoiser, x, ranks=4, tolerance="rehearse", **options)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("not interrupted")
        check_next()
        back.set()
        settle()
        check_next()
        back.clear()
"""


def test_ctrl_c_in_the_leaders_forward():
    script = (
        INTERRUPTED
        + """
    for step in range(6):
        def denoiser(x, j, rank):
            if rank == 0 and j == step:
                interrupt()
                time.sleep(30)
            return smooth(x, j, rank)

        must_be_interrupted(denoiser)
    """
    )
    done = run_script(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("deadline", [None, 1000.0])
def test_ctrl_c_while_the_leader_waits(deadline):
    """For a follower in its denoiser, in every round that this one evaluates in."""
    script = (
        INTERRUPTED
        + """
    for step in (0, 2, 3, 4, 5):
        def denoiser(x, j, rank):
            if rank == 1 and j == step:
                threading.Timer(0.06, interrupt).start()
                back.wait(60)
            return smooth(x, j, rank)

        must_be_interrupted(denoiser, deadline=eval(sys.argv[1]))
    """
    )
    done = run_script(script, deadline)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ctrl_c_at_any_moment():
    script = (
        INTERRUPTED
        + """
    def denoiser(x, j, rank):
        time.sleep(0.001)
        return smooth(x, j, rank)

    def swallowed(raised):  # Python ignores what interrupts a callback of its own weak references
        global interrupts
        assert raised.exc_type is KeyboardInterrupt, raised
        assert raised.object.__module__ == "_weakrefset", raised
        interrupts += 1

    random.seed(int(sys.argv[1]))
    sys.unraisablehook = swallowed
    interrupts = 0
    for _ in range(40):
        timer = threading.Timer(random.uniform(0, 0.015), interrupt)
        try:
            timer.start()
            parastep.sample(euler(6), denoiser, x, ranks=4, tolerance="rehearse")
            timer.join()
            time.sleep(0.001)  # where it comes late
        except KeyboardInterrupt:
            interrupts += 1
        timer.join()
        settle()
        check_next()
    assert interrupts == 40, interrupts
    """
    )
    done = run_script(script, 1)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_process_ends_while_a_follower_hangs():
    """At the end, and in the middle of a run that was interrupted: no thread keeps the process."""
    script = (
        INTERRUPTED
        + """
    def denoiser(x, j, rank):
        if rank == 1 and j == 2:
            threading.Timer(0.06, interrupt).start()
            back.wait(60)
        return smooth(x, j, rank)

    try:
        parastep.sample(euler(6), denoiser, x, ranks=4, tolerance="rehearse")
    except KeyboardInterrupt:
        print("interrupted")
    """
    )
    done = run_script(script, timeout=40)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
