"""Tolerance 0 is the untouched pipeline: its bits, its calls, and nobody beside it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import tiny  # noqa: E402
from hosting import children, count_steps, devices, frozen, host, no_warnings, own  # noqa: E402

import parastep  # noqa: E402


@pytest.mark.parametrize("tolerance", [0, "exact"])
@pytest.mark.parametrize("options", [{}, {"mode": "processes"}, {"slots": "batch"}])
def test_nobody_evaluates_ahead(tolerance: Any, options: dict[str, Any]) -> None:
    pipe, kwargs = host("sd"), tiny.CASES["sd"].kwargs()
    before, alone = children(), own("sd")
    seen = []

    def callback(pipe: Any, step: int, time: Any, given: Any) -> Any:
        seen.append({t.name for t in threading.enumerate() if t.name.startswith("parastep")})
        return given

    with parastep.parallelize(pipe, devices(4), tolerance=tolerance, **options) as together:
        with tiny.count_forwards(*tiny.denoisers(pipe)) as count, count_steps(pipe) as stepped:
            with no_warnings():
                result = tiny.run(together, {**kwargs, "callback_on_step_end": callback})
        assert torch.equal(result, alone.result) and stepped[0] == alone.steps
        assert (count.own, count.everywhere) == (alone.forwards, alone.forwards)
        assert torch.equal(kwargs["generator"].get_state(), alone.generator)
        assert frozen(pipe.scheduler) == alone.scheduler
        assert not together._ranks._replicas and children() == before
        assert seen == [set()] * alone.steps
        report = together.report
    assert report.rounds == report.steps == alone.steps and report.fallback is None
    assert report.evaluations == [alone.steps, 0, 0, 0] and report.bytes_sent == 0
    assert "3 of 4 ranks are idle" in report.limit and report.limit in str(report)


def test_a_denoiser_that_keeps_state_is_called_as_the_host_calls_it() -> None:
    """A cache in a hook, that answers every second call with what it kept."""
    case = tiny.CASES["sd"]

    def cached() -> Any:
        pipe, kept = case.build(), []

        def hook(module: Any, args: Any, output: Any) -> Any:
            kept.append(output)
            return kept[len(kept) // 2 * 2 - 2] if len(kept) > 1 else output

        pipe.unet.register_forward_hook(hook)
        return pipe

    alone = [tiny.run(pipe, case.kwargs()) for pipe in [cached()] for _ in range(2)]
    assert not torch.equal(*alone)
    with parastep.parallelize(cached(), devices(3), tolerance="exact") as together:
        assert all(torch.equal(tiny.run(together, case.kwargs()), each) for each in alone)


def test_the_published_rule_ignores_the_tolerance() -> None:
    options = {"policy": "paper", "warmup": 1}
    reports, results = [], []
    for tolerance in (0, 0.5):
        with parastep.parallelize(host("sd"), devices(3), tolerance=tolerance, **options) as made:
            results.append(tiny.run(made, tiny.CASES["sd"].kwargs(steps=7)))
            reports.append(made.report)
    assert torch.equal(*results) and [r.rounds for r in reports] == [3, 3]
    assert reports[0].limit is None
