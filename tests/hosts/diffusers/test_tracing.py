"""Traces of every scheduler that diffusers exports, held against the schedulers themselves.

`pytest -s` prints the table of verdicts.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import diffusers.schedulers as library  # noqa: E402
from scheduler_cases import (  # noqa: E402
    CASES,
    CERTAIN,
    CLOSE,
    EXACT,
    NONE,
    SVD,
    Case,
    case,
    present,
    rollout_error,
    timesteps_of,
)

from parastep.tracing import program as tracing  # noqa: E402

diffusers.logging.set_verbosity_error()

pytestmark = pytest.mark.filterwarnings("ignore")


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
        "epsilon": 0.25 / s,
        "v_prediction": 0.25 * alpha / (s * np.hypot(alpha, s)),
        "sample": 0.25 / alpha,
    }
    for kind, slope in expected.items():
        traced = case("DDIM", clip_sample=False, prediction_type=kind).trace()
        np.testing.assert_allclose(traced.s, s, rtol=1e-6)
        np.testing.assert_allclose(traced.g, slope, rtol=1e-6)
    euler = case("EulerDiscrete", **SVD).make()
    sigma = euler.sigmas[:-1].double().numpy()
    traced = tracing.trace_rows(euler)
    np.testing.assert_allclose(traced.s, sigma, rtol=1e-6)
    np.testing.assert_allclose(traced.g, 0.25 / (sigma * np.hypot(1, sigma)), rtol=1e-6)
    ipndm = case("IPNDM").make()
    np.testing.assert_allclose(tracing.trace_rows(ipndm).s, ipndm.betas[:-1], rtol=1e-6)
    scm = case("SCM", steps=2).make()
    angle = scm.timesteps[:-1].numpy()
    np.testing.assert_allclose(tracing.trace_rows(scm).s, 0.5 * np.sin(angle), rtol=1e-6)
    np.testing.assert_allclose(tracing.trace_rows(scm).g, 0.25 / np.tan(angle), atol=1e-6)
    flow = case("FlowMatchEulerDiscrete", shift=3.0).make()
    traced = tracing.trace_rows(flow)
    np.testing.assert_allclose(traced.g, 0.25 / flow.sigmas[:-1].numpy(), rtol=1e-6)


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
        np.testing.assert_allclose(traced.g, -0.25 / traced.s, rtol=1e-5)


def test_slope_of_edm_follows_its_preconditioning() -> None:
    traced = case("EDMEuler").trace()
    expected = -0.25 * 0.5 / (traced.s * np.hypot(0.5, traced.s))
    np.testing.assert_allclose(traced.g, expected, rtol=1e-6)


def draws(scheduler: Any, step_kwargs: Any = None) -> bool:
    return tracing.trace_rows(scheduler, step_kwargs=step_kwargs).stochastic


def test_who_draws_noise() -> None:
    eta = {"eta": 0.5}
    ddim = case("DDIM").make()
    assert not draws(ddim) and draws(ddim, eta)
    assert not draws(ddim, {"eta": 0.0, "generator": torch.Generator()})
    assert not draws(case("CogVideoXDDIM").make(), eta)  # it ignores eta
    euler = case("EulerDiscrete").make()
    assert not draws(euler) and draws(euler, {"s_churn": 1.0})
    for name in ("DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete", "DPMSolverSDE",
                 "SASolver", "CosineDPMSolverMultistep", "RePaint"):  # fmt: skip
        assert draws(case(name).make()), name
    for name in ("UniPCMultistep", "HeunDiscrete", "FlowMatchEulerDiscrete", "LMSDiscrete"):
        assert not draws(case(name).make()), name


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
