"""Followers that hang or are slow: left behind at the deadline, and not before."""

import threading
import time

import pytest
from cases import euler, exact, latents, lost, same, sample, smooth
from faulty import evaluates, faulty_at

import parastep
from parastep import LostError

X = latents()
DEADLINE = 0.5  # what a follower in good health never needs here


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("rank", [1, 2])
def test_a_follower_that_hangs_is_left_behind(rank, step):
    """It comes back when the run is over, to find that nobody waits; the others go on meanwhile."""
    if not evaluates(rank, step, 4):
        return
    back, hung = threading.Event(), threading.Event()

    def hang(output):
        hung.set()
        assert back.wait(30)
        return output

    try:
        options = {"ranks": 3, "tolerance": "rehearse", "deadline": DEADLINE}
        found, report = sample(euler(4), faulty_at(rank, step, hang), X, **options)
        names = [thread.name for thread in threading.enumerate()]
        assert hung.is_set() and f"parastep-{rank}" in names
    finally:
        back.set()
    assert same(found, exact(euler(4), smooth, X))
    lines = {line.rank: (line.step, line.status) for line in report.failures}
    assert lines[rank] == (step, "DEADLINE")


@pytest.mark.parametrize("when", ["before the next round", "in a later round"])
def test_a_follower_comes_back_in_mid_run(when):
    """Its late output is for nobody, whichever round the leader has reached."""
    back, abandoned = threading.Event(), threading.Event()

    def denoiser(x, step, rank):
        if (rank, step) == (1, 2):
            back.wait(30)
        if rank == 0 and step == (2 if when == "before the next round" else 4):
            back.set()
            abandoned.wait(0.05)  # time to come back in; right either way
        return smooth(x, step, rank)

    options = {"ranks": 3, "tolerance": "rehearse", "deadline": DEADLINE}
    try:
        found, report = sample(euler(6), denoiser, X, **options)
    finally:
        back.set()
    assert same(found, exact(euler(6), smooth, X))
    assert {line.rank: line.step for line in report.failures}[1] == 2
    assert report.evaluations[1] == 1


def test_a_follower_that_hangs_may_be_an_error():
    back = threading.Event()
    denoiser = faulty_at(1, 2, lambda m: m if back.wait(30) else m)
    options = {"ranks": 2, "tolerance": "rehearse", "deadline": DEADLINE, "on_failure": "raise"}
    try:
        with pytest.raises(LostError, match="rank 1 was lost at step 2: .*deadline"):
            parastep.sample(euler(4), denoiser, X, **options)
    finally:
        back.set()


def test_all_followers_hang():
    back = threading.Event()

    def denoiser(x, step, rank):
        if rank > 0:
            back.wait(30)
        return smooth(x, step, rank)

    try:
        found, report = sample(
            euler(4), denoiser, X, ranks=5, tolerance="rehearse", deadline=DEADLINE
        )
    finally:
        back.set()
    assert same(found, exact(euler(4), smooth, X))
    assert lost(report) == [1, 2, 3, 4]
    assert {line.status for line in report.failures} == {"DEADLINE"}


def test_the_leader_may_take_longer_than_the_deadline():
    """It counts from the leader's own output."""

    def denoiser(x, step, rank):
        if rank == 0:
            time.sleep(DEADLINE + 0.1)
        return smooth(x, step, rank)

    options = {"ranks": 3, "tolerance": "rehearse", "deadline": DEADLINE}
    found, report = parastep.sample(euler(3), denoiser, X, **options)
    assert same(found, exact(euler(3), smooth, X))
    assert report.failures == []


def test_a_slow_follower_within_its_deadline_is_waited_for():
    def denoiser(x, step, rank):
        if rank == 1:
            time.sleep(0.12)  # more than two slices of the wait
        return smooth(x, step, rank)

    found, report = parastep.sample(
        euler(3), denoiser, X, ranks=2, tolerance="rehearse", deadline=60
    )
    assert same(found, exact(euler(3), smooth, X))
    assert report.failures == [] and report.evaluations == [3, 2]
