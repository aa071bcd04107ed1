"""`policy="paper"` against the published rule written down on its own, in tests/bench/_rules.py."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import numpy as np
import pytest

import parastep
from parastep.tracing import schedulers

torch = pytest.importorskip("torch")

PATH = pathlib.Path(__file__).parents[2] / "bench" / "_rules.py"
STEPS = 23


def rules() -> Any:
    spec = importlib.util.spec_from_file_location("_rules", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problem() -> tuple[Any, Any, Any]:
    sigmas = np.linspace(1.0, 0.0, STEPS + 1)
    target = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def f(x: Any, step: int, rank: int = 0) -> Any:
        sigma = sigmas[step]
        clean = torch.tanh(target + (1 - sigma) * x)
        return (x - clean) / max(sigma, 0.04)

    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return parastep.Program.adams_bashforth(sigmas, 2), f, x


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("warmup", [1, 5])
def test_published_rule(ranks: int, warmup: int) -> None:
    program, f, x = problem()
    expected, rounds = rules().published(program, f, x, ranks, warmup)
    result, report = parastep.sample(program, f, x, ranks=ranks, policy="paper", warmup=warmup)
    assert report.rounds == rounds
    assert torch.allclose(result, expected, rtol=1e-9, atol=1e-9)


def test_sequential() -> None:
    program, f, x = problem()
    expected, _ = rules().sequential(program, f, x)
    result, _ = parastep.sample(program, f, x, ranks=4, tolerance="rehearse")
    assert torch.allclose(result, expected, rtol=1e-10, atol=1e-10)


def test_paradigms_reaches_sequential() -> None:
    program, f, x = problem()
    expected, _ = rules().sequential(program, f, x)
    result, rounds = rules().paradigms(program, f, x, 4, 1e-7)
    assert rounds <= STEPS
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5)


def flow(steps: int = STEPS) -> tuple[Any, Any, Any, Any]:
    """A flow Euler program with its levels, a velocity and a start."""
    sigmas = np.linspace(1.0, 0.0, steps + 1)
    s = sigmas[:-1]
    levels = schedulers.Levels(1 - s, s, np.ones(steps), -s, "flow_prediction")
    _, f, x = problem()
    return parastep.Program.flow_euler(sigmas), levels, f, x


def test_jumps_of_one_step_are_the_solver() -> None:
    program, levels, f, x = flow()
    jump, expected = rules().Jumps(levels), x
    for step in range(STEPS):
        expected = jump(expected, f(expected, step), step, step + 1)
    found, _ = rules().sequential(program, f, x)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_chords() -> None:
    """The last hit is the sequential result; earlier ones come at their round, less near to it."""
    program, levels, f, x = flow()
    exact, _ = rules().sequential(program, f, x)
    starts = [0, 2, 5, 11]
    off = []
    for hit, begin in enumerate([STEPS, 11, 5, 2, 0]):
        result, rounds = rules().chords(levels, f, x, starts, hit)
        assert rounds == (4 if hit == 0 else STEPS - begin + 4 - hit)
        off.append(float((result - exact).norm()))
    assert off[0] > off[1] > off[2]
    assert off[-1] < 1e-9 < off[1]


def test_chords_puts_right() -> None:
    """Two cores on four steps, by hand."""
    _, levels, f, x = flow(4)
    jump = rules().Jumps(levels)
    x1, y2 = (jump(x, f(x, 0), 0, end) for end in (1, 2))
    x2 = jump(x1, f(x1, 1), 1, 2)
    y3, coarse = (jump(y2, f(y2, 2), 2, end) for end in (3, 4))
    expected = jump(y3, f(y3, 3), 3, 4) + jump(x2, f(x2, 2), 2, 4) - coarse
    result, rounds = rules().chords(levels, f, x, [0, 2], 1)
    assert rounds == 3
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_skipping_continues_lines() -> None:
    program, _, _, x = flow()

    def f(x: Any, step: int) -> Any:
        return torch.full_like(x, 2.0 + 0.1 * step)

    exact, _ = rules().sequential(program, f, x)
    result, forwards = rules().skipping(program, f, x, 5)
    assert forwards == 5
    assert torch.allclose(result, exact, rtol=1e-12, atol=1e-12)


def test_skipping() -> None:
    program, _, f, x = flow()
    exact, _ = rules().sequential(program, f, x)
    everything, forwards = rules().skipping(program, f, x, STEPS)
    assert forwards == STEPS
    assert torch.equal(everything, exact)
    off = {}
    for wanted in (4, 10, 18):
        result, forwards = rules().skipping(program, f, x, wanted)
        assert forwards == wanted
        off[wanted] = float((result - exact).norm())
    assert off[18] < off[10] < off[4]


def test_skipping_continues_curves() -> None:
    """Order 2 through three outputs is exact for a parabola, and the best setting is found."""
    program, _, _, x = flow()

    def f(x: Any, step: int) -> Any:
        return torch.full_like(x, 2.0 + 0.1 * step + 0.05 * step * step)

    exact, _ = rules().sequential(program, f, x)
    off = {}
    for order in (0, 1, 2):
        result, forwards = rules().skipping(program, f, x, 6, warmup=3, order=order)
        assert forwards == 6
        off[order] = float((result - exact).norm())
    assert off[2] < 1e-10 < off[1] < off[0]
    settings = rules().skipping_settings(6)
    found = [rules().skipping(program, f, x, 6, *setting) for setting in settings]
    best, forwards = rules().nearest(found, exact)
    assert forwards == 6 and float((best - exact).norm()) < 1e-10
    assert max(warmup for warmup, _ in rules().skipping_settings(4)) == 3
