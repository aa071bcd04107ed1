"""Traces of every scheduler that diffusers exports, held against the schedulers themselves.

The check is made without the module's own probes: the real scheduler is run on random samples and
outputs, its noise recorded where it draws it, and the traced rows alone must give the same samples.
`python tests/hosts/test_tracing.py` prints the table of verdicts.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import time
import types
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import diffusers.schedulers as library  # noqa: E402

from parastep import tracing  # noqa: E402
from parastep.noise import NoiseAhead  # noqa: E402
from parastep.schedulers import fresh_copy  # noqa: E402

diffusers.logging.set_verbosity_error()

pytestmark = pytest.mark.filterwarnings("ignore")

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


# ----------------------------------------------------------------------------- every scheduler


def exported() -> list[str]:
    """All scheduler classes of the installed diffusers; the mixin itself is none."""
    found = []
    for name in dir(library):
        member = getattr(library, name)
        if not isinstance(member, type) or member is library.SchedulerMixin:
            continue
        if name.startswith("Flax"):  # without torch, of older versions
            continue
        if name.endswith("Scheduler") or issubclass(member, library.SchedulerMixin):
            found.append(name)
    return found


def test_no_scheduler_is_left_out() -> None:
    assert sorted({c.name for c in CASES}) == sorted(exported())


def judge(case: Case) -> tuple[str, tracing.Traced, float]:
    """Verdict, trace and roll-out error of a case, and its line for the table."""
    scheduler = case.make()
    tracing._cache.clear()
    begin = time.perf_counter()
    traced = case.trace(scheduler)
    ms = 1e3 * (time.perf_counter() - begin)
    verdict = NONE if traced.reason else EXACT if traced.exact else CLOSE
    line = f"{verdict:12s} {str(case):90.90s} N={len(traced):4d}"
    if traced.reason:
        error = np.inf
        line += f" {traced.reason}"
    else:
        error = rollout_error(case, traced, scheduler)
        marks = " noise" * traced.stochastic + " levels-repeat" * traced.repeats_levels
        line += f" H={traced.a.shape[1]:2d} error {traced.error:.0e}, rolled out {error:.0e}"
        line += f" {ms:5.0f} ms{marks}"
    LINES[str(case)] = line
    return verdict, traced, error


LINES: dict[str, str] = {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trace(case: Case) -> None:
    verdict, traced, error = judge(case)
    assert verdict == case.verdict, (verdict, traced.error, traced.reason)
    assert traced.exact == (traced.error < 1e-6)
    if verdict == EXACT:
        assert error < 1e-6
    elif verdict == CLOSE:  # and it is right to say so
        assert error > 1e-3 and 1e-3 < traced.error < 2
    else:
        assert traced.reason and traced.reason.startswith(case.name)
        assert (traced.a == 1).all() and (traced.b == 0).all() and traced.error == np.inf
    n = len(traced)
    assert traced.b.shape == traced.a.shape == (n, traced.a.shape[1])
    for values in (traced.c, traced.s, traced.g):
        assert values.shape == (n,) and np.isfinite(values).all()
    assert (traced.s > 0).all() and (traced.c >= 0).all()
    assert np.isfinite(traced.a).all() and np.isfinite(traced.b).all()
    if verdict != NONE:
        assert traced.repeats_levels == (case.name.removesuffix("Scheduler") in REPEATING)


REPEATING = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "PNDM", "DPMSolverSDE",
             "FlowMatchHeunDiscrete")  # fmt: skip


def test_table_is_whole() -> None:
    """`pytest -s` prints it; every case has its line."""
    for one in CASES:
        if str(one) not in LINES:
            judge(one)
    print("\n" + "\n".join(LINES[str(one)] for one in CASES))
    assert len(LINES) == len(CASES)


def test_the_check_can_fail() -> None:
    for name, change in (("UniPCMultistep", 1e-4), ("EulerAncestralDiscrete", 1e-4)):
        chosen = next(c for c in CERTAIN if c.name == f"{name}Scheduler")
        traced = copy.copy(chosen.trace())
        for part in ("a", "b", "c"):
            values = getattr(traced, part).copy()
            if not values.any():
                continue
            values[7] *= 1 + change
            broken = tracing.Traced(**{**vars(traced), part: values})
            assert rollout_error(chosen, broken, chosen.make()) > 1e-6, part


# ------------------------------------------------------------------------ shapes and meanings


@pytest.mark.parametrize(
    ("name", "config", "longest"),
    [
        ("DDIM", {"clip_sample": False}, 1),
        ("EulerDiscrete", {}, 1),
        ("FlowMatchEulerDiscrete", {}, 1),
        ("DPMSolverMultistep", {}, 2),
        ("DPMSolverMultistep", {"solver_order": 3}, 3),
        ("HeunDiscrete", {}, 2),
        ("KDPM2Discrete", {}, 2),
        ("LMSDiscrete", {}, 4),
        ("IPNDM", {}, 4),
        ("PNDM", {"skip_prk_steps": True}, 4),
        ("PNDM", {}, 13),
        ("UniPCMultistep", {"solver_order": 1}, 2),
        ("UniPCMultistep", {"solver_order": 2}, 3),
        ("UniPCMultistep", {"solver_order": 3}, 4),
        ("SASolver", {}, 3),
        ("SASolver", {"predictor_order": 3, "corrector_order": 4}, 5),
    ],
)
def test_windows_are_short(name: str, config: dict[str, Any], longest: int) -> None:
    for steps in (20, 50):
        assert case(name, steps=steps, **config).trace().a.shape[1] <= longest


def test_few_steps() -> None:
    for one in {c.name: c for c in reversed(CERTAIN)}.values():
        for steps in (1, 2, 3):
            few = Case(one.name, one.verdict, one.config, one.setup, one.step, steps)
            try:
                scheduler = few.make()
            except Exception:
                continue  # the scheduler itself cannot
            traced = few.trace(scheduler)
            assert len(traced) == len(timesteps_of(scheduler))
            try:
                error = rollout_error(few, traced, scheduler)
            except AssertionError:
                raise
            except Exception:
                assert traced.reason, (str(few), steps)  # it can be set up and not stepped
            else:
                assert error < 1e-6 or traced.reason, (str(few), steps, error)


@pytest.mark.parametrize("name", ["UniPCMultistep", "DPMSolverMultistep", "EulerDiscrete",
                                  "HeunDiscrete", "FlowMatchEulerDiscrete", "DEISMultistep",
                                  "DPMSolverSinglestep", "LMSDiscrete"])  # fmt: skip
def test_starting_in_the_middle(name: str) -> None:
    chosen = case(name)
    scheduler = chosen.make()
    begin = 8 * scheduler.order
    scheduler.set_begin_index(begin)
    traced = chosen.trace(scheduler)
    assert len(traced) == len(scheduler.timesteps) - begin
    assert rollout_error(chosen, traced, scheduler) < 1e-6
    if name in ("EulerDiscrete", "HeunDiscrete", "LMSDiscrete", "FlowMatchEulerDiscrete"):
        sigmas = scheduler.sigmas[begin : begin + len(traced)]
        np.testing.assert_allclose(traced.s, sigmas, rtol=1e-6)


def test_timesteps_of_the_loop() -> None:
    """A list of numbers, of tensors or a tensor; without a begin index their first decides."""
    scheduler = case("DDIM", clip_sample=False).make()
    whole, part = tracing.trace_rows(scheduler), scheduler.timesteps[5:15]
    for loop in (part, list(part), part.tolist()):
        traced = tracing.trace_rows(scheduler, loop)
        np.testing.assert_array_equal(traced.a, whole.a[5:15])
        np.testing.assert_array_equal(traced.s, whole.s[5:15])
    euler = case("EulerDiscrete").make()
    traced = tracing.trace_rows(euler, euler.timesteps[5:15].tolist())
    np.testing.assert_allclose(traced.s, euler.sigmas[5:15], rtol=1e-6)
    assert "not one number a step" in str(tracing.trace_rows(scheduler, part[:, None]).reason)
    assert "not one number a step" in str(tracing.trace_rows(scheduler, []).reason)


def test_levels_and_slopes() -> None:
    scheduler = case("DDIM", clip_sample=False).make()
    squared = scheduler.alphas_cumprod[scheduler.timesteps].double().numpy()
    alpha, s = np.sqrt(squared), np.sqrt(1 - squared)
    expected = {
        "epsilon": 0.5 / s,
        "v_prediction": 0.5 * alpha / (s * np.hypot(alpha, s)),
        "sample": 0.5 / alpha,
    }
    for kind, slope in expected.items():
        traced = case("DDIM", clip_sample=False, prediction_type=kind).trace()
        np.testing.assert_allclose(traced.s, s, rtol=1e-6)
        np.testing.assert_allclose(traced.g, slope, rtol=1e-6)
    euler = case("EulerDiscrete", **SVD).make()
    sigma = euler.sigmas[:-1].double().numpy()
    traced = tracing.trace_rows(euler)
    np.testing.assert_allclose(traced.s, sigma, rtol=1e-6)
    np.testing.assert_allclose(traced.g, 0.5 / (sigma * np.hypot(1, sigma)), rtol=1e-6)
    ipndm = case("IPNDM").make()
    np.testing.assert_allclose(tracing.trace_rows(ipndm).s, ipndm.betas[:-1], rtol=1e-6)
    scm = case("SCM", steps=2).make()
    angle = scm.timesteps[:-1].numpy()
    np.testing.assert_allclose(tracing.trace_rows(scm).s, 0.5 * np.sin(angle), rtol=1e-6)
    np.testing.assert_allclose(tracing.trace_rows(scm).g, 0.5 / np.tan(angle), atol=1e-6)
    flow = case("FlowMatchEulerDiscrete", shift=3.0).make()
    traced = tracing.trace_rows(flow)
    np.testing.assert_allclose(traced.g, 0.5 / flow.sigmas[:-1].numpy(), rtol=1e-6)


def test_clipping_leaves_the_rows_without_it() -> None:
    for name in ("DDIM", "DDPM"):
        plain = case(name, clip_sample=False).trace()
        for config in ({}, {"thresholding": True}):
            clipped = case(name, **config).trace()
            np.testing.assert_allclose(clipped.a, plain.a, rtol=1e-12)
            np.testing.assert_allclose(clipped.b, plain.b, rtol=1e-12)
            np.testing.assert_allclose(clipped.c, plain.c, rtol=1e-12)


def test_slope_of_velocities_towards_the_data() -> None:
    velocities = [case("FlowMatchEulerDiscrete", invert_sigmas=True), case("MiniMaxH3")]
    for velocity in present(velocities):
        traced = velocity.trace()
        assert (traced.g < 0).all() and traced.s[0] == pytest.approx(1, abs=0.01)
        assert (np.diff(traced.s) < 0).all()
        np.testing.assert_allclose(traced.g, -0.5 / traced.s, rtol=1e-5)


def test_slope_of_edm_follows_its_preconditioning() -> None:
    traced = case("EDMEuler").trace()
    expected = -0.5 * 0.5 / (traced.s * np.hypot(0.5, traced.s))
    np.testing.assert_allclose(traced.g, expected, rtol=1e-6)


def test_who_draws_noise() -> None:
    eta = {"eta": 0.5}
    ddim = case("DDIM").make()
    assert not tracing.is_stochastic(ddim) and tracing.is_stochastic(ddim, eta)
    assert not tracing.is_stochastic(ddim, {"eta": 0.0, "generator": torch.Generator()})
    assert not tracing.is_stochastic(case("CogVideoXDDIM").make(), eta)  # it ignores eta
    euler = case("EulerDiscrete").make()
    assert not tracing.is_stochastic(euler) and tracing.is_stochastic(euler, {"s_churn": 1.0})
    for name in ("DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "DPMSolverSDE",
                 "SASolver", "CosineDPMSolverMultistep", "RePaint"):  # fmt: skip
        assert tracing.is_stochastic(case(name).make()), name
    for name in ("UniPCMultistep", "HeunDiscrete", "FlowMatchEulerDiscrete", "LMSDiscrete"):
        assert not tracing.is_stochastic(case(name).make()), name


# ---------------------------------------------------------------------- leaves no traces itself


def state_of(scheduler: Any) -> bytes:
    """Everything an instance holds, as bytes."""
    kept = {k: v for k, v in vars(scheduler).items() if not isinstance(v, types.MethodType)}
    return pickle.dumps({k: v for k, v in kept.items() if not isinstance(v, types.FunctionType)})


@pytest.mark.parametrize("case", [c for c in CASES if c.steps != 1000], ids=str)
def test_caller_is_left_alone(case: Case) -> None:
    scheduler = case.make()
    tracing._cache.clear()
    called = []
    if hasattr(scheduler, "step"):
        scheduler.step = types.MethodType(lambda *_, **__: called.append(1), scheduler)
    before, names = state_of(scheduler), list(vars(scheduler))
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    np.random.seed(5)
    numpy_before = pickle.dumps(np.random.get_state())
    case.trace(scheduler)
    assert state_of(scheduler) == before and list(vars(scheduler)) == names
    assert torch.equal(torch.get_rng_state(), expected)
    assert pickle.dumps(np.random.get_state()) == numpy_before
    assert not called


def test_history_is_left_out() -> None:
    for name in ("UniPCMultistep", "DPMSolverMultistep", "PNDM", "IPNDM", "LMSDiscrete", "SASolver",
                 "HeunDiscrete", "KDPM2Discrete", "DPMSolverSinglestep", "DEISMultistep",
                 "EulerDiscrete", "DPMSolverSDE"):  # fmt: skip
        scheduler = case(name).make()
        fresh = tracing.trace_rows(scheduler)
        x = torch.ones(1, 1, 2, 2)
        for t in scheduler.timesteps[:3]:
            x = scheduler.step(x, t, x).prev_sample
        tracing._cache.clear()
        again = tracing.trace_rows(scheduler)
        np.testing.assert_array_equal(again.a, fresh.a, err_msg=name)
        np.testing.assert_array_equal(again.b, fresh.b, err_msg=name)
    # Started on an odd step this one looks for outputs before it.
    scheduler = case("DPMSolverSinglestep").make()
    scheduler.set_begin_index(7)
    fresh = tracing.trace_rows(scheduler)
    scheduler.model_outputs = [torch.ones(1)] * 2
    tracing._cache.clear()
    np.testing.assert_array_equal(tracing.trace_rows(scheduler).a, fresh.a)


@pytest.mark.parametrize("name", ["UniPCMultistep", "EulerDiscrete", "DDPM", "SCM", "Helios",
                                  "FlowMatchEulerDiscrete", "DPMSolverSDE"])  # fmt: skip
def test_surroundings_do_not_matter(name: str) -> None:
    chosen = next((c for c in CASES if c.name == f"{name}Scheduler"), None)
    if chosen is None:
        pytest.skip("not in this version of diffusers")
    expected = chosen.trace()

    def compare(what: str, setting: Any, loosely: bool = False) -> None:
        with setting:
            scheduler = chosen.make() if loosely else ready
            tracing._cache.clear()
            found = chosen.trace(scheduler)
        assert found.reason is None, (what, found.reason)
        for part in ("a", "b", "c", "s", "g"):
            rtol = 1e-5 if loosely else 0
            np.testing.assert_allclose(
                getattr(found, part), getattr(expected, part), rtol=rtol, atol=rtol, err_msg=what
            )

    ready = chosen.make()
    compare("inference_mode", torch.inference_mode())
    compare("no_grad", torch.no_grad())
    compare("enable_grad", torch.enable_grad())
    compare("autocast", torch.autocast("cpu", dtype=torch.bfloat16))
    compare("made in inference_mode", torch.inference_mode(), loosely=True)
    compare("default device", torch.device("meta"))
    for dtype in (torch.float64, torch.bfloat16):
        compare(str(dtype), default_dtype(dtype))
    with torch.inference_mode():
        ready = chosen.make()
    compare("inference tensors", nullcontext(), loosely=False)


@contextmanager
def default_dtype(dtype: Any) -> Any:
    saved = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(saved)


def test_second_call_is_free() -> None:
    tracing._cache.clear()
    chosen = case("UniPCMultistep", steps=50)
    first = chosen.trace()
    begin = time.perf_counter()
    assert chosen.trace() is first  # another instance, set up alike
    assert time.perf_counter() - begin < 0.1
    assert case("UniPCMultistep", steps=50, solver_order=3).trace() is not first
    assert case("UniPCMultistep", steps=49).trace() is not first
    scheduler = chosen.make()
    scheduler.sigmas = scheduler.sigmas * 1.5
    assert chosen.trace(scheduler) is not first
    scheduler = chosen.make()
    scheduler.set_begin_index(4)
    assert len(chosen.trace(scheduler)) == 46
    ddim = case("DDIM", clip_sample=False).make()
    eta = tracing.trace_rows(ddim, step_kwargs={"eta": 1.0})
    assert eta is tracing.trace_rows(ddim, step_kwargs={"eta": 1.0, "generator": None})
    assert eta is not tracing.trace_rows(ddim, step_kwargs={"eta": 0.5})
    with pytest.raises(ValueError):
        first.a[0, 0] = 2
    for steps in range(2, 100):
        case("FlowMatchEulerDiscrete", steps=steps).trace()
    assert len(tracing._cache) <= 64


def test_reasons() -> None:
    ddim = case("DDIM").make()
    reason = tracing.trace_rows(ddim, step_kwargs={"eta": torch.ones(3)}).reason
    assert reason == "step is given a whole tensor as 'eta'"
    reason = tracing.trace_rows(library.DDIMScheduler()).reason
    assert "ValueError" in str(reason) and "set_timesteps" in str(reason)
    learned = case("DDPM", variance_type="learned_range").trace()
    assert "learned variance" in str(learned.reason)
    for unknown in present([case("HeliosDMD", setup={"stage_index": 0})]):
        assert "'dmd_noisy_tensor'" in str(unknown.trace().reason)
    flow = library.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert "mu" in str(tracing.trace_rows(flow, None, 10).reason)
    assert "object has no" in str(tracing.trace_rows(object.__new__(Case), None, 3).reason)

    class Squares(library.DDIMScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, **_: Any) -> Any:
            return (sample * 0 / (sample - sample),)

    squares = Squares()
    squares.set_timesteps(4)
    traced = tracing.trace_rows(squares)
    assert "no finite sample at step 0" in str(traced.reason) and len(traced) == 4


def test_unknown_class_that_draws_globally() -> None:
    """A user's own scheduler need take no generator to be traced without disturbing anything."""

    class Own(library.EulerDiscreteScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True):
            result = super().step(model_output, timestep, sample, return_dict=False)
            noise = torch.randn_like(sample) + 0 * torch.rand(1) * torch.rand_like(sample)
            noise += 0 * torch.empty(2).uniform_()[0] + 0 * torch.randint_like(sample, 3)
            return (result[0] + 0.25 * noise, *result[1:])

    own = Own()
    own.set_timesteps(6)
    before = torch.get_rng_state()
    traced = tracing.trace_rows(own)
    assert torch.equal(torch.get_rng_state(), before)
    assert traced.exact and traced.stochastic
    np.testing.assert_allclose(traced.c, 0.25)


# ----------------------------------------------------------------------------- noise drawn ahead


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


# ----------------------------------------------------------------------------------- programs


def test_program() -> None:
    from parastep import Program

    for name in ("DDPM", "UniPCMultistep", "PNDM"):
        config = {"clip_sample": False} if name == "DDPM" else {}
        made = tracing.trace(getattr(library, f"{name}Scheduler")(**config), 12)
        assert isinstance(made, Program)
        assert len(made) == len(case(name, steps=12, **config).trace())
    assert len(case("DDPM", clip_sample=False).trace().program(noise_ahead=True)) == 20
    with pytest.warns(UserWarning, match="not affine"):
        tracing.trace(library.DDIMScheduler(), 5)
    with pytest.raises(ValueError, match="original_image"):
        tracing.trace(library.RePaintScheduler(), 5)
    sigmas = [1.0, 0.7, 0.3]
    assert len(tracing.trace(library.FlowMatchEulerDiscreteScheduler(), None, sigmas=sigmas)) == 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for chosen in CASES:
        judge(chosen)
        print(LINES[str(chosen)])
