"""Strided rounds in real pipelines: a lane on the leader's own device, followers that go back."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny
import torch
from hosting import caught, devices, distance, host, no_warnings, own

import parastep
from parastep.demo import image

NAMES = ["sd", "sdxl", "sd3", "flux", "wan", "svd", "cogvideox_ddim", "audioldm2", "latte"]


def call(name: str, ranks: int, steps: int, **options: Any) -> tuple[torch.Tensor, Any]:
    with parastep.parallelize(host(name), devices(ranks), **options) as pipe:
        return tiny.run(pipe, tiny.CASES[name].kwargs(num_inference_steps=steps)), pipe.report


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_fewer_rounds_than_every_step_takes(name: str, ranks: int) -> None:
    steps = 40
    with no_warnings():
        found, report = call(name, ranks, steps, tolerance=8.0)
        if ranks > 1:  # one rank alone takes as many rounds as steps
            _, stepwise = call(name, ranks, steps, tolerance=8.0, max_stride=1)
            assert report.rounds < stepwise.rounds and stepwise.interpolated == 0
    wanted = own(name, steps).result
    assert report.interpolated > 0 and report.fallback is None and not report.failures
    assert sum(report.accepted) == report.steps == own(name, steps).steps
    assert report.rounds < report.steps
    assert 0 < distance(found, wanted) < 0.2


@pytest.mark.parametrize("ranks", [1, 2])
def test_tolerance_0_is_the_pipelines_own_result(ranks: int) -> None:
    found, report = call("sd", ranks, 9, tolerance="exact")
    assert torch.equal(found, own("sd", 9).result)
    assert report.rounds == 9 and report.interpolated == 0


def test_one_device_at_stride_1_is_the_pipeline_itself() -> None:
    found, report = call("sd", 1, 9, max_stride=1)
    assert torch.equal(found, own("sd", 9).result)
    assert report.evaluations == [9]


def test_solvers_that_draw_have_no_lane() -> None:
    pipe = image.MODEL.load(scheduler="euler_a")
    arguments = {"classes": [3], "seed": 1, "steps": 12}
    with parastep.parallelize(pipe, devices(1), tolerance=0.05) as parallel:
        found = parallel(**image.MODEL.arguments(**arguments)).images
    wanted = pipe(**image.MODEL.arguments(**arguments)).images
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))
    assert parallel.report.evaluations == [12] and parallel.report.fallback is None


@pytest.mark.parametrize("steps", [50, 200])
def test_a_trained_model_on_one_device(steps: int) -> None:
    pipe = image.MODEL.load()
    wanted = torch.as_tensor(pipe(**image.MODEL.arguments([7], 5, steps)).images)
    with parastep.parallelize(pipe, devices(1)) as parallel, no_warnings():
        found = torch.as_tensor(parallel(**image.MODEL.arguments([7], 5, steps)).images)
    report = parallel.report
    assert report.rounds < 32 and report.evaluations == [report.rounds]
    assert report.interpolated > steps - 32
    assert (found - wanted).pow(2).mean() < 4 * 10**-3.8


def test_the_lane_fails() -> None:
    """Speed is lost, not the picture; the leader goes on with the rest, or alone."""
    pipe = image.MODEL.load()
    wanted = torch.as_tensor(pipe(**image.MODEL.arguments([7], 5, 100)).images)
    for ranks in (1, 3):
        with parastep.parallelize(pipe, devices(ranks)) as parallel, caught() as texts:
            fail_after(parallel, 3)
            found = torch.as_tensor(parallel(**image.MODEL.arguments([7], 5, 100)).images)
        assert [line.rank for line in parallel.report.failures] == [0]
        assert any("out of order" in text for text in texts)
        assert (found - wanted).pow(2).mean() < 4 * 10**-3.8


def fail_after(parallel: Any, calls: int) -> None:
    """The lane's denoiser raises from a call on."""
    seen = threading.local()

    def count(module: Any, *_: Any) -> None:
        if not threading.current_thread().name.endswith("0"):
            return
        seen.count = getattr(seen, "count", 0) + 1
        if seen.count > calls:
            raise RuntimeError("out of order")

    ranks = parallel._ranks
    ranks._refresh(parallel.pipe, parallel._options, lane=True)
    ranks._replicas[0].unet.register_forward_pre_hook(count)
