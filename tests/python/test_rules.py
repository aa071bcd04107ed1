"""`policy="paper"` against the published rule written down on its own, in tests/bench/_rules.py."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import numpy as np
import pytest

import parastep

torch = pytest.importorskip("torch")

PATH = pathlib.Path(__file__).parent.parent / "bench" / "_rules.py"
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
    result, _ = parastep.sample(program, f, x, ranks=4, tolerance=0.0)
    assert torch.allclose(result, expected, rtol=1e-10, atol=1e-10)


def test_paradigms_reaches_sequential() -> None:
    program, f, x = problem()
    expected, _ = rules().sequential(program, f, x)
    result, rounds = rules().paradigms(program, f, x, 4, 1e-7)
    assert rounds <= STEPS
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5)
