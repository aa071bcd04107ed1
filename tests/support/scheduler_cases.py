"""Every scheduler that diffusers exports, in the settings that count, and a check of its trace.

The check is made without the module's own probes: the real scheduler is run on random samples and
outputs, its noise recorded where it draws it, and the traced rows alone must give the same samples.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers.schedulers as library
import numpy as np
import torch

from parastep.tracing import program as tracing

EXACT, CLOSE, NONE = "exact", "approximate", "not traced"
SHAPE = (2, 3, 4, 5)


@dataclass(frozen=True)
class Case:
    """A scheduler, how it is set up and called, and what is expected of its trace."""

    name: str
    verdict: str = EXACT
    config: dict[str, Any] = field(default_factory=dict)
    setup: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    steps: int | None = 20

    def __str__(self) -> str:
        extra = {**self.config, **self.setup, **self.step}
        shown = ",".join(f"{k}={_brief(v)}" for k, v in extra.items())
        shown += f",N={self.steps}" if self.steps not in (20, None) else ""
        return self.name.replace("Scheduler", "") + (f"({shown})" if shown else "")

    def make(self) -> Any:
        """The scheduler, set up."""
        scheduler = getattr(library, self.name)(**self.config)
        steps = {} if self.steps is None else {"num_inference_steps": self.steps}
        scheduler.set_timesteps(**steps, **self.setup)
        return scheduler

    def trace(self, scheduler: Any = None) -> tracing.Traced:
        if scheduler is None:
            scheduler = self.make()
        return tracing.trace_rows(scheduler, step_kwargs=self.step)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) < 25 else f"{text[:20]}..."


def case(name: str, verdict: str = EXACT, **kwargs: Any) -> Case:
    special = {k: kwargs.pop(k) for k in ("setup", "step", "steps") if k in kwargs}
    return Case(f"{name}Scheduler", verdict, config=kwargs, **special)


SVD = {
    "prediction_type": "v_prediction",
    "use_karras_sigmas": True,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "timestep_type": "continuous",
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SPACINGS = ("linspace", "leading", "trailing")
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
KINDS = ("epsilon", "v_prediction", "sample")

CASES = [
    case("CogVideoXDDIM"),
    case("CogVideoXDDIM", prediction_type="v_prediction", rescale_betas_zero_snr=True,
         timestep_spacing="trailing"),
    case("CogVideoXDPM"),
    case("CogVideoXDPM", prediction_type="v_prediction", timestep_spacing="trailing"),
    case("DDIM", CLOSE),
    case("DDIM", CLOSE, thresholding=True, clip_sample=False),
    *(case("DDIM", clip_sample=False, set_alpha_to_one=False, prediction_type=k, **STABLE)
      for k in KINDS),
    *(case("DDIM", clip_sample=False, timestep_spacing=s) for s in SPACINGS),
    case("DDIM", clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True,
         timestep_spacing="trailing"),
    case("DDIM", clip_sample=False, step={"eta": 1.0}),
    case("DDIM", clip_sample=False, step={"eta": 0.3}),
    case("DDIMInverse", CLOSE),
    case("DDIMInverse", clip_sample=False),
    case("DDIMParallel", CLOSE),
    case("DDIMParallel", clip_sample=False),
    case("DDPM", CLOSE),
    case("DDPM", CLOSE, thresholding=True),
    case("DDPM", clip_sample=False),
    case("DDPM", clip_sample=False, steps=1000),
    case("DDPM", clip_sample=False, variance_type="fixed_large"),
    case("DDPM", clip_sample=False, variance_type="fixed_small_log", prediction_type="sample"),
    case("DDPM", NONE, clip_sample=False, variance_type="learned_range"),
    case("DDPMParallel", CLOSE),
    case("DDPMParallel", clip_sample=False),
    case("DDPMWuerstchen"),
    case("UnCLIP", CLOSE),
    case("UnCLIP", clip_sample=False),
    case("UnCLIP", clip_sample=False, prediction_type="sample"),
    case("UnCLIP", NONE, clip_sample=False, variance_type="learned_range"),
    case("EulerDiscrete"),
    case("EulerDiscrete", steps=25, **SVD),
    *(case("EulerDiscrete", timestep_spacing=s, prediction_type="v_prediction") for s in SPACINGS),
    *(case("EulerDiscrete", **{s: True}) for s in SIGMAS),
    case("EulerDiscrete", prediction_type="sample"),
    case("EulerDiscrete", final_sigmas_type="sigma_min"),
    case("EulerDiscrete", steps=None, setup={"sigmas": [14.0, 9.0, 4.0, 1.0, 0.2, 0.0]}),
    case("EulerDiscrete", step={"s_churn": 4.0, "s_noise": 1.01}),
    case("EulerAncestralDiscrete"),
    case("EulerAncestralDiscrete", prediction_type="v_prediction", **STABLE),
    case("EDMEuler"),
    case("EDMEuler", step={"s_churn": 4.0}),
    case("EDMEuler", prediction_type="v_prediction", sigma_schedule="exponential"),
    case("EDMDPMSolverMultistep"),
    case("EDMDPMSolverMultistep", solver_order=3),
    case("EDMDPMSolverMultistep", final_sigmas_type="sigma_min"),
    case("EDMDPMSolverMultistep", NONE, solver_order=3, final_sigmas_type="sigma_min"),
    case("EDMDPMSolverMultistep", algorithm_type="sde-dpmsolver++"),
    case("CosineDPMSolverMultistep"),
    case("FlowMatchEulerDiscrete"),
    case("FlowMatchEulerDiscrete", shift=3.0),
    case("FlowMatchEulerDiscrete", use_dynamic_shifting=True, setup={"mu": 1.15}),
    case("FlowMatchEulerDiscrete", steps=None, setup={"sigmas": [1.0, 0.8, 0.5, 0.2]}),
    case("FlowMatchEulerDiscrete", invert_sigmas=True),
    case("FlowMatchEulerDiscrete", stochastic_sampling=True),
    case("FlowMatchEulerDiscrete", use_karras_sigmas=True, shift_terminal=0.1),
    case("FlowMatchHeunDiscrete"),
    case("FlowMatchHeunDiscrete", step={"s_churn": 4.0}),
    case("FlowMatchLCM"),
    case("FlowMapEulerDiscrete"),
    case("MiniMaxH3"),
    case("LTXEulerAncestralRF"),
    case("LTXEulerAncestralRF", eta=0.0),
    case("Helios", setup={"stage_index": 0}),
    case("Helios", scheduler_type="euler", setup={"stage_index": 1}),
    case("Helios", stages=1),
    case("Helios", NONE, stages=1, solver_order=3),
    case("HeunDiscrete"),
    case("HeunDiscrete", prediction_type="v_prediction", use_karras_sigmas=True),
    case("HeunDiscrete", CLOSE, clip_sample=True),
    case("KDPM2Discrete"),
    case("KDPM2Discrete", prediction_type="v_prediction", use_karras_sigmas=True),
    case("KDPM2AncestralDiscrete"),
    case("DPMSolverSDE"),
    case("DPMSolverSDE", use_karras_sigmas=True, noise_sampler_seed=7),
    *(case("DPMSolverMultistep", solver_order=o) for o in (1, 2, 3)),
    *(case("DPMSolverMultistep", prediction_type=k, timestep_spacing=s, solver_order=o)
      for k, s, o in zip(KINDS, SPACINGS, (3, 2, 3))),
    *(case("DPMSolverMultistep", **{s: True}) for s in SIGMAS),
    case("DPMSolverMultistep", use_lu_lambdas=True),
    case("DPMSolverMultistep", final_sigmas_type="sigma_min", solver_type="heun"),
    case("DPMSolverMultistep", algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    case("DPMSolverMultistep", euler_at_final=True, steps=10, **STABLE),
    case("DPMSolverMultistep", CLOSE, thresholding=True),
    case("DPMSolverMultistep", **FLOW),
    *(case("DPMSolverMultistep", algorithm_type=a, solver_order=o, final_sigmas_type=f)
      for a, o, f in (("sde-dpmsolver++", 2, "zero"), ("sde-dpmsolver++", 3, "zero"),
                      ("sde-dpmsolver", 2, "sigma_min"))),
    case("DPMSolverMultistepInverse"),
    case("DPMSolverMultistepInverse", prediction_type="v_prediction", solver_order=3),
    case("DPMSolverMultistepInverse", NONE, algorithm_type="sde-dpmsolver++"),
    *(case("DPMSolverSinglestep", solver_order=o) for o in (1, 2, 3)),
    case("DPMSolverSinglestep", algorithm_type="sde-dpmsolver++"),
    case("DPMSolverSinglestep", prediction_type="v_prediction", use_karras_sigmas=True, steps=7),
    case("DPMSolverSinglestep", **FLOW),
    *(case("DEISMultistep", solver_order=o) for o in (1, 2, 3)),
    case("DEISMultistep", **FLOW),
    *(case("UniPCMultistep", solver_order=o) for o in (1, 2, 3)),
    case("UniPCMultistep", solver_order=3, solver_type="bh1", final_sigmas_type="sigma_min"),
    case("UniPCMultistep", predict_x0=False, solver_order=3, final_sigmas_type="sigma_min"),
    case("UniPCMultistep", NONE, predict_x0=False),
    case("UniPCMultistep", prediction_type="v_prediction", use_karras_sigmas=True),
    case("UniPCMultistep", disable_corrector=[0, 3, 4]),
    case("UniPCMultistep", lower_order_final=False, final_sigmas_type="sigma_min"),
    case("UniPCMultistep", steps=50, **{**FLOW, "flow_shift": 5.0}),
    case("UniPCMultistep", solver_order=3, **FLOW),
    case("SASolver"),
    case("SASolver", predictor_order=3, corrector_order=4, prediction_type="v_prediction"),
    case("SASolver", predictor_order=1, corrector_order=1, algorithm_type="noise_prediction"),
    case("IPNDM"),
    case("LMSDiscrete"),
    case("LMSDiscrete", prediction_type="v_prediction", use_karras_sigmas=True),
    case("LMSDiscrete", step={"order": 2}),
    case("PNDM"),
    case("PNDM", skip_prk_steps=True),
    case("PNDM", skip_prk_steps=True, prediction_type="v_prediction", steps_offset=1, **STABLE),
    case("LCM", steps=4),
    case("LCM", prediction_type="v_prediction", steps=8),
    case("LCM", CLOSE, steps=4, clip_sample=True),
    case("TCD", steps=4),
    case("TCD", steps=8, step={"eta": 0.0}),
    case("SCM", steps=2),
    case("SCM", steps=6, setup={"intermediate_timesteps": None}),
    case("CMStochasticIterative", CLOSE),
    case("CMStochasticIterative", clip_denoised=False),
    case("ConsistencyDecoder", steps=2),
    case("HeliosDMD", NONE, setup={"stage_index": 0}),
    case("KarrasVe", NONE),
    case("Piflow", NONE),
    case("RFD4Proteina", NONE, schedule_mode="log", noise_mode="1/t", tsr_k=1.0, tsr_sigma=1.0),
    case("RePaint", NONE),
    case("ScoreSdeVe", NONE),
    case("ScoreSdeVp", NONE),
    case("Amused", NONE, mask_token_id=8, setup={"temperature": (2, 0)}),
    case("BlockRefinement", NONE),
    case("DiscreteDDIM", NONE),
    case("EntropyBound", NONE),
    case("VQDiffusion", NONE, num_vec_classes=10),
]  # fmt: skip


def present(cases: list[Case]) -> list[Case]:
    """Those that this diffusers has: `test_no_scheduler_is_left_out` looks at the rest."""
    return [c for c in cases if hasattr(library, c.name)]


CASES = present(CASES)
CERTAIN = [c for c in CASES if c.verdict == EXACT]


# ---------------------------------------------------------------- the check, apart from the module


@contextmanager
def recorded_noise(scheduler: Any, seed: int, drawn: list[Any]) -> Any:
    """Replaces what the scheduler's module draws with, and notes each draw in `drawn`."""
    random = torch.Generator().manual_seed(seed)

    def draw(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Any:
        value = torch.randn(shape, generator=random, dtype=torch.float64)
        drawn.append(value)
        return value.to(dtype or torch.float32)

    module = importlib.import_module(type(scheduler).__module__)
    saved = {n: getattr(module, n) for n in ("randn_tensor",) if hasattr(module, n)}
    randn_like = torch.randn_like
    try:
        if saved:
            module.randn_tensor = draw
        torch.randn_like = lambda sample, **_: draw(sample.shape, dtype=sample.dtype)
        if hasattr(scheduler, "noise_sampler"):
            scheduler.noise_sampler = lambda *_: draw(SHAPE, dtype=torch.float64)
        yield
    finally:
        torch.randn_like = randn_like
        for name, value in saved.items():
            setattr(module, name, value)


def timesteps_of(scheduler: Any) -> Any:
    """The loop's timesteps; these two list the end of their last step as well."""
    times = scheduler.timesteps[getattr(scheduler, "_begin_index", None) or 0 :]
    extra = type(scheduler).__name__ in ("SCMScheduler", "DDPMWuerstchenScheduler")
    return times[:-1] if extra else times


def call_step(scheduler: Any, j: int, m: Any, x: Any, old: Any, extra: dict[str, Any]) -> Any:
    """One step as the pipelines write it: (new sample, predicted clean sample or None)."""
    times = timesteps_of(scheduler)
    t, name = times[j], type(scheduler).__name__
    if name == "CogVideoXDPMScheduler":
        back = times[j - 1] if j > 0 else None
        return scheduler.step(m, old, t, back, x, return_dict=False, **extra)
    if name == "UnCLIPScheduler":
        extra = {**extra, "prev_timestep": times[j + 1] if j + 1 < len(times) else None}
    if name == "DDPMWuerstchenScheduler":
        t = t.expand(x.shape[0])
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, t)
    result = scheduler.step(m, t, x, return_dict=False, **extra)
    return result[0], (result[1] if len(result) > 1 else None)


def rollout_error(case: Case, traced: tracing.Traced, scheduler: Any, seed: int = 3) -> float:
    """Worst relative L2 distance of a roll-out of the rows to the real scheduler's samples."""
    random = torch.Generator().manual_seed(seed)
    steps = len(timesteps_of(scheduler))
    assert steps == len(traced), (steps, len(traced))
    start = max(1.0, float(getattr(scheduler, "init_noise_sigma", 1.0)))
    x = start * torch.randn(SHAPE, generator=random, dtype=torch.float64)
    truth, ours, outputs, old, worst = x, [x], [], None, 0.0
    for j in range(steps):
        m = torch.randn(SHAPE, generator=random, dtype=torch.float64)
        outputs.append(m)
        drawn: list[Any] = []
        with recorded_noise(scheduler, 1000 + j, drawn):
            truth, old = call_step(scheduler, j, m, truth, old, case.step)
        new = torch.zeros_like(x)
        for k in range(min(traced.a.shape[1], j + 1)):
            new += traced.a[j, k] * ours[j - k] + traced.b[j, k] * outputs[j - k]
        if drawn:  # the one scheduler that draws twice in a step uses the later draw
            new += traced.c[j] * drawn[-1] * np.sign(traced.noise_weights[j].sum())
        else:
            assert traced.c[j] == 0
        ours.append(new)
        off = (new - truth).norm() / (truth.norm() + 1e-9 * x.norm())
        worst = max(worst, float(off.nan_to_num(np.inf)))
    return worst
