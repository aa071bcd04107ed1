"""Stable Diffusion with every scheduler of diffusers that fits: at tolerance 0 the host's own bits,
stochastic solvers and those with several calls a step included.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import tiny  # noqa: E402
from hosting import (  # noqa: E402
    count_steps,
    distance,
    frozen,
    no_warnings,
    parallel,
    rounds_without_limit,
)

SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDIMScheduler clipped": {"clip_sample": True},
    "DDIMScheduler thresholded": {"thresholding": True},
    "DDIMScheduler of v": {"prediction_type": "v_prediction"},
    "DDIMScheduler of the sample": {"prediction_type": "sample"},
    "DDIMParallelScheduler": {},
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepScheduler Karras": {"use_karras_sigmas": True},
    "DPMSolverMultistepScheduler of order 3": {"solver_order": 3},
    "DPMSolverMultistepScheduler SDE": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": {},
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 3},
    "DPMSolverSDEScheduler seeded by torch": {},
    "EDMEulerScheduler": {},
    "EDMDPMSolverMultistepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerDiscreteScheduler Karras": {"use_karras_sigmas": True},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler stochastic": {"stochastic_sampling": True},
    "FlowMatchHeunDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "IPNDMScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LCMScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "PNDMScheduler with PRK": {"skip_prk_steps": False},
    "SASolverScheduler": {},
    "TCDScheduler": {},
    "UniPCMultistepScheduler": {},
}
STEPS, RANKS = 6, 3


def make(name: str) -> Any:
    kind = getattr(diffusers, name.split()[0])
    config = tiny.CASES["sd"].make().scheduler.config
    if "Flow" in name or "EDM" in name:
        return kind(**SCHEDULERS[name])
    return kind.from_config(config, **SCHEDULERS[name])


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.CASES["sd"].build()


def test_a_clip_is_named_as_what_keeps_a_run_slow(pipe: Any) -> None:
    """The network is not trained: its clean sample is beyond the clip nearly everywhere."""
    for clip in (False, True):
        pipe.scheduler = make("DDIMScheduler clipped" if clip else "DDIMScheduler")
        ours = parallel(pipe, RANKS, 1e-6)
        tiny.run(ours, tiny.CASES["sd"].kwargs(steps=20))
        report = ours.report
        assert report.rounds <= 21
        assert (report.limit is not None and "clip_sample=True" in report.limit) == clip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name: str, pipe: Any) -> None:
    if "DPMSolverSDE" in name:
        pytest.importorskip("torchsde")
    case = tiny.CASES["sd"]
    pipe.scheduler = make(name)
    if not hasattr(pipe.scheduler, "init_noise_sigma"):
        # The pipeline asks for what flow schedulers have not got.
        pipe.scheduler.init_noise_sigma = 1.0
        pipe.scheduler.scale_model_input = lambda sample, timestep: sample

    def run(called: Any) -> tuple[Any, ...]:
        kwargs = case.kwargs(steps=STEPS)
        torch.manual_seed(11)
        result = tiny.run(called, kwargs)
        return result, kwargs["generator"].get_state(), torch.get_rng_state()

    with count_steps(pipe) as stepped:
        alone = run(pipe)
    n, state = stepped[0], frozen(pipe.scheduler)
    assert alone[0].isfinite().all()
    with no_warnings():
        exact = parallel(pipe, RANKS)
        assert all(torch.equal(a, b) for a, b in zip(alone, run(exact)))
        assert frozen(pipe.scheduler) == state
        assert exact.report.evaluations == [n, n - 1, n - 2]
        fast = parallel(pipe, RANKS, math.inf)
        ours = run(fast)
        assert fast.report.rounds == rounds_without_limit(n, RANKS)
        assert all(torch.equal(a, b) for a, b in zip(alone[1:], ours[1:]))
        assert ours[0].isfinite().all()
        near = parallel(pipe, RANKS, 0.02)
        assert distance(run(near)[0], alone[0]) < 0.03
    assert near.report.rounds <= n
