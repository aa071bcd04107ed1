"""A leader and its followers by hand: the turn of a loop, and who serves it."""

import contextlib
import functools
import threading
import time

from cases import euler, latents, smooth

from parastep import AbandonedError, _core

# Every step is evaluated by some rank; sampling/test_strided.py has the others.
Leader = functools.partial(_core.Leader, max_stride=1)

X = latents()


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


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
