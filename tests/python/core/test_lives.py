"""Leaders and followers that end in any order, and threads that meet in one of them."""

import contextlib
import gc
import threading
import weakref

import numpy as np
import pytest
from cases import euler, latents, resident_bytes, same, smooth, tells_memory
from turns import X, serve, wait_for

from parastep import AbandonedError, InvalidError, ShapeError, StateError, _core

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
