"""Calls of a Leader out of order, or with what does not fit: refused, and nothing changes."""

import pytest
from cases import drawing, euler, exact, latents, same, smooth
from turns import X, serving

import parastep
from parastep import InvalidError, Program, ShapeError, StateError, _core


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
