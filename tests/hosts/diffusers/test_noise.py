"""Noise drawn ahead is what the host will draw, and its generators do not notice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from scheduler_cases import SHAPE, Case, call_step, case, present, timesteps_of  # noqa: E402

from parastep.tracing import program as tracing  # noqa: E402
from parastep.tracing.noise import NoiseAhead  # noqa: E402
from parastep.tracing.schedulers import fresh_copy  # noqa: E402

diffusers.logging.set_verbosity_error()

pytestmark = pytest.mark.filterwarnings("ignore")


def host_noise(
    scheduler: Any, traced: tracing.Traced, generator: Any, extra: dict[str, Any], dtype: Any
) -> list[Any]:
    """What the host's own steps add beyond the rows, on random samples and outputs."""
    random = torch.Generator().manual_seed(11)
    start = max(1.0, float(getattr(scheduler, "init_noise_sigma", 1.0)))
    x = (start * torch.randn(SHAPE, generator=random)).to(dtype)
    xs, ms, noises, old = [x], [], [], None
    if "generator" in tracing.step_parameters(scheduler) and generator is not None:
        extra = {**extra, "generator": generator}
    for j in range(len(timesteps_of(scheduler))):
        ms.append(torch.randn(SHAPE, generator=random).to(dtype))
        new, old = call_step(scheduler, j, ms[j], xs[j], old, extra)
        row = torch.zeros(SHAPE, dtype=torch.float64)
        for k in range(min(traced.a.shape[1], j + 1)):
            row += traced.a[j, k] * xs[j - k].double() + traced.b[j, k] * ms[j - k].double()
        scale = max(float(v.double().norm()) for v in (*xs[-3:], new)) / np.sqrt(x.numel())
        noises.append((new.double() - row, scale))
        xs.append(new)
    return noises


STOCHASTIC = [
    case("DDPM", clip_sample=False),
    case("DDPM", clip_sample=False, variance_type="fixed_small_log"),
    case("DDPMParallel", clip_sample=False),
    case("DDPMWuerstchen"),
    case("UnCLIP", clip_sample=False),
    case("DDIM", clip_sample=False, step={"eta": 1.0}),
    case("EulerAncestralDiscrete"),
    case("EulerDiscrete", step={"s_churn": 4.0}),
    case("EDMEuler", step={"s_churn": 4.0}),
    case("KDPM2AncestralDiscrete"),
    case("CogVideoXDPM"),
    case("DPMSolverMultistep", algorithm_type="sde-dpmsolver++"),
    case("DPMSolverMultistep", algorithm_type="sde-dpmsolver++", solver_order=3),
    case("DPMSolverSinglestep", algorithm_type="sde-dpmsolver++"),
    case("EDMDPMSolverMultistep", algorithm_type="sde-dpmsolver++"),
    case("LCM", steps=6),
    case("TCD", steps=6),
    case("SCM", steps=2),
    case("FlowMatchLCM"),
    case("FlowMatchEulerDiscrete", stochastic_sampling=True),
    case("FlowMatchHeunDiscrete", step={"s_churn": 4.0}),
    case("LTXEulerAncestralRF"),
    case("CMStochasticIterative", clip_denoised=False),
    case("ConsistencyDecoder", steps=2),
    case("SASolver"),
    case("DPMSolverSDE", noise_sampler_seed=3),
    case("DPMSolverSDE"),
    case("CosineDPMSolverMultistep"),
]
STOCHASTIC = present(STOCHASTIC)


@pytest.mark.parametrize("source", ["generator", "global", "list"])
@pytest.mark.parametrize("case", STOCHASTIC, ids=str)
def test_noise_ahead(case: Case, source: str) -> None:
    traced = case.trace()
    assert traced.stochastic and traced.exact
    scheduler = case.make()
    generator: Any = {
        "generator": torch.Generator().manual_seed(21),
        "list": [torch.Generator().manual_seed(s) for s in (31, 32)],
        "global": None,
    }[source]
    torch.manual_seed(41)
    if generator is not None:
        torch.randn(7, generator=generator[0] if source == "list" else generator)
    states = [g.get_state() for g in (generator if source == "list" else [generator]) if g]
    ahead = NoiseAhead(
        scheduler, timesteps_of(scheduler), SHAPE, generator=generator, step_kwargs=case.step
    )
    before = torch.get_rng_state()
    order = [len(traced) - 1, 0, *range(len(traced))]
    guessed = {j: ahead.noise(j) for j in order}
    assert torch.equal(torch.get_rng_state(), before)
    for g, state in zip(generator if source == "list" else [generator], states):
        assert torch.equal(g.get_state(), state)
    assert ahead.reason is None

    real = host_noise(scheduler, traced, generator, case.step, torch.float32)
    added = 0
    for j, (noise, scale) in enumerate(real):
        if guessed[j] is None:
            assert traced.c[j] == 0 and float(noise.abs().max()) < 1e-4 * scale
            continue
        added += 1
        assert guessed[j].shape == SHAPE and guessed[j].dtype == torch.float32
        assert float((noise - guessed[j].double()).norm() / noise.norm()) < 1e-2 or (
            float((noise - guessed[j].double()).abs().max()) < 2e-5 * scale
        ), j
        assert float((noise - guessed[j].double()).abs().max()) < 1e-4 * scale, j
    assert added >= len(real) // 2
    ahead.release(len(real))
    assert ahead.noise(0) is None


def test_noise_in_the_hosts_dtype() -> None:
    """Other dtypes draw other numbers, so the copy is stepped in the host's."""
    scheduler = case("EulerAncestralDiscrete").make()
    times = scheduler.timesteps
    for dtype, model_dtype in ((torch.bfloat16, None), (torch.float32, torch.bfloat16)):
        ahead = NoiseAhead(scheduler, times, SHAPE, dtype, model_dtype=model_dtype,
                           generator=torch.Generator().manual_seed(1))  # fmt: skip
        real = fresh_copy(scheduler)
        x, m = torch.zeros(SHAPE, dtype=dtype), torch.zeros(SHAPE, dtype=model_dtype or dtype)
        out = real.step(m, times[0], x, generator=torch.Generator().manual_seed(1)).prev_sample
        assert torch.equal(ahead.noise(0), out)


def test_noise_tensors_are_plain() -> None:
    scheduler = case("EulerAncestralDiscrete").make()
    with torch.inference_mode():
        ahead = NoiseAhead(scheduler, scheduler.timesteps, SHAPE)
        noise = ahead.noise(3)
    assert noise is not None and not noise.is_inference() and not noise.requires_grad
    assert ahead.noise(len(scheduler.timesteps)) is None and ahead.noise(-1) is None


def test_no_noise() -> None:
    scheduler = case("UniPCMultistep").make()
    ahead = NoiseAhead(scheduler, scheduler.timesteps, SHAPE)
    assert ahead.noise(0) is None and ahead.reason is None
    repaint = case("RePaint").make()
    ahead = NoiseAhead(repaint, repaint.timesteps, SHAPE)
    assert ahead.noise(0) is None and "original_image" in str(ahead.reason)
