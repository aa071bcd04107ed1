"""A Follower's side: work taken and answered once, outputs refused, ranks lost with a reason."""

import gc

import numpy as np
import pytest
from cases import euler, same, smooth
from turns import X, failures_of, follower_with_work, wait_for

from parastep import (
    AbandonedError,
    DtypeError,
    LostError,
    Program,
    ShapeError,
    StateError,
    _core,
)


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
