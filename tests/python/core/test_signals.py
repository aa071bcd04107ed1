"""A signal that comes while somebody waits: its exception is raised, and no work is lost."""

import contextlib
import os
import signal
import threading

import pytest
from cases import euler
from turns import X, failures_of

from parastep import AbandonedError, StateError, _core


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
