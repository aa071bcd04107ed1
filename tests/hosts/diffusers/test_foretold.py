"""Calls that are foretold from the call before: the host's bits whatever was foretold."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import tiny  # noqa: E402

import parastep  # noqa: E402

STEPS = 6


def run(pipe: Any, case: Any, **changes: Any) -> Any:
    return tiny.run(pipe, case.kwargs(steps=STEPS, **changes))


@pytest.mark.parametrize("name", ["wan", "wan22"])
def test_the_same_words_again_are_foretold_from_the_first_call_on(name: str) -> None:
    case = tiny.CASES[name]
    alone = {seed: run(case.build(), case, seed=seed) for seed in (0, 1)}
    with parastep.parallelize(case.build(), [("cpu", "cpu")], tolerance=0) as pair:
        assert torch.equal(run(pair, case, seed=0), alone[0])
        assert pair.report.teams[0].whole >= 2  # nothing is known before the first iteration
        assert torch.equal(run(pair, case, seed=1), alone[1])
        (team,) = pair.report.teams
        assert (team.shared, team.whole, team.missed) == (STEPS, 0, 0)


def other_words() -> dict[str, Any]:
    return {"negative_prompt_embeds": tiny.CASES["wan"].kwargs()["negative_prompt_embeds"] + 1}


@pytest.mark.parametrize(
    ("changes", "found"),  # shared, whole, foretold wrongly
    [
        ({"cond": 1}, (STEPS, 0, 0)),  # another prompt, with the same negative one
        (other_words(), (STEPS - 1, 1, 1)),
        ({"batch": 2}, (STEPS - 1, 2, 0)),
        ({"height": 48}, (STEPS - 1, 2, 0)),
        ({"num_frames": 9}, (STEPS - 1, 2, 0)),
    ],
)
def test_other_arguments_are_the_hosts_own(
    changes: dict[str, Any], found: tuple[int, int, int]
) -> None:
    """Where shapes differ nothing is foretold, since a helper would be called with what does not
    fit together.
    """
    case = tiny.CASES["wan"]
    alone = run(case.build(), case, **changes)
    with parastep.parallelize(case.build(), [("cpu", "cpu")], tolerance=0) as pair:
        run(pair, case)
        assert torch.equal(run(pair, case, **changes), alone)
        (team,) = pair.report.teams
        assert (team.shared, team.whole, team.missed) == found
        assert not pair.report.failures


def test_nothing_of_a_call_is_kept_after_close() -> None:
    case = tiny.CASES["wan"]
    pair = parastep.parallelize(case.build(), [("cpu", "cpu")], tolerance=0)
    run(pair, case)
    assert pair._ranks._cuts.calls
    pair.close()
    assert not pair._ranks._cuts.calls


def test_what_helpers_served_is_told_by_the_runs_clock() -> None:
    case = tiny.CASES["wan"]
    with parastep.parallelize(case.build(), [("cpu", "cpu")] * 2, max_stride=1) as pairs:
        run(pairs, case)
        run(pairs, case)
        report = pairs.report
    for rank, team in enumerate(report.teams):
        assert team.served and {share.device for share in team.served} == {1}
        spans = {r.step: (r.begin, r.end) for r in report.timeline if r.rank == rank}
        for share in team.served:
            begin, end = spans[share.step]
            assert begin - 0.01 < share.begin < share.end and share.begin < end
    assert type(report).from_dict(report.to_dict()).teams == report.teams
