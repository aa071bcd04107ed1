"""`calibrate` on a closed-form denoiser: what it finds holds its target, and can be shared."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import parastep
from parastep.calibration import GRID, Calibration
from parastep.tolerance import SCALE

STEPS, RUNS = 32, 3
PROGRAM = parastep.Program.flow_euler(np.linspace(1.0, 0.0, STEPS + 1))


def start(k: int) -> Any:
    return np.random.default_rng(k).standard_normal((1, 256)).astype(np.float32)


def denoiser(x: Any, step: int, rank: int) -> Any:
    return np.tanh(3 * x) * np.cos(step / 9).astype(np.float32)


def found_for(target: float, **options: Any) -> Calibration:
    options = {"target": target, "runs": RUNS, "ranks": 2, **options}
    return parastep.calibrate(PROGRAM, start, denoiser, **options)


def squared_error(k: int, tolerance: float) -> float:
    exact, _ = parastep.sample(PROGRAM, denoiser, start(k), ranks=1, tolerance=0)
    near, _ = parastep.sample(PROGRAM, denoiser, start(k), ranks=2, tolerance=tolerance)
    return float(np.mean((near.astype(np.float64) - exact) ** 2))


@pytest.mark.parametrize("target", [40.0, 70.0])
def test_it_holds_the_target(target: float) -> None:
    found = found_for(target)
    assert found.reached and found.tolerance > 0
    assert (found.ranks, found.steps) == (2, STEPS)
    errors = [squared_error(k, found.tolerance) for k in range(RUNS)]
    assert 10 * math.log10(4 / np.mean(errors)) >= target
    chosen = {cost.tolerance: cost for cost in found.table}[found.tolerance]
    assert chosen.psnr >= target
    assert chosen.worst == pytest.approx(10 * math.log10(4 / max(errors)))
    for cost in found.table:  # nothing looser held it
        assert cost.tolerance <= found.tolerance or cost.psnr < target or cost.worst < target - 7
    assert "<" in str(found)


def test_a_higher_target_costs_rounds() -> None:
    low, high = found_for(40.0), found_for(70.0)
    assert low.tolerance > high.tolerance
    rounds = [next(c.rounds for c in f.table if c.tolerance == f.tolerance) for f in (low, high)]
    assert rounds[0] < rounds[1]


def test_out_of_reach() -> None:
    found = found_for(400.0)
    assert not found.reached and found.tolerance == 0
    assert [cost.tolerance for cost in found.table] == list(GRID)
    assert "exact mode" in str(found)


def test_saved_and_loaded(tmp_path: Any) -> None:
    found = found_for(50.0, refine=0)
    found.save(tmp_path / "found.json")
    assert Calibration.load(tmp_path / "found.json") == found


def test_it_is_a_tolerance_itself() -> None:
    found = found_for(50.0, refine=0)
    given = [found, found.tolerance]
    results = [parastep.sample(PROGRAM, denoiser, start(9), ranks=2, tolerance=t)[0] for t in given]
    assert np.array_equal(*results)
    with pytest.raises(parastep.InvalidError):
        parastep.sample(PROGRAM, denoiser, start(9), tolerance=replace(found, tolerance=-1.0))


@pytest.mark.parametrize("scale", [None, 1, 3])
def test_tolerances_that_meant_something_else_are_refused(tmp_path: Any, scale: int | None) -> None:
    path = tmp_path / "found.json"
    found_for(50.0, refine=0).save(path)
    plain = json.loads(path.read_text())
    assert plain.pop("scale") == SCALE
    path.write_text(json.dumps(plain if scale is None else plain | {"scale": scale}))
    with pytest.raises(parastep.InvalidError, match="calibrate again"):
        Calibration.load(path)


def test_a_file_of_a_later_version_is_named_as_such(tmp_path: Any) -> None:
    """Whatever else it holds by then, and however its table looks."""
    path = tmp_path / "found.json"
    found_for(50.0, refine=0).save(path)
    later = json.loads(path.read_text()) | {"scale": SCALE + 1, "profile": [1], "version": "99.1"}
    for table in (later["table"], [[0.1, 40]], {}):
        path.write_text(json.dumps(later | {"table": table}))
        with pytest.raises(
            parastep.InvalidError, match=r"a later parastep, 99\.1.*update parastep"
        ):
            Calibration.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"table": [{"tolerance": "x"}]}'])
def test_not_a_calibration(tmp_path: Any, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(parastep.InvalidError, match=r"other\.json: not a calibration"):
        Calibration.load(path)


def test_a_tolerance_below_0_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "found.json"
    found_for(50.0, refine=0).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tolerance": -1}))
    with pytest.raises(parastep.InvalidError):
        Calibration.load(path)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ((PROGRAM, start), {}),
        ((PROGRAM, [], denoiser), {}),
        ((PROGRAM, start, denoiser), {"target": math.nan}),
        ((PROGRAM, start, denoiser), {"peak": 0}),
        ((PROGRAM, start, denoiser), {"refine": -1}),
        ((object(), start, denoiser), {}),
    ],
)
def test_refused(given: Any, options: Any) -> None:
    with pytest.raises(parastep.InvalidError):
        parastep.calibrate(*given, **options)
