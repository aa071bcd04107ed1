"""Tracing leaves no traces itself: what it is given and its surroundings stay as they were."""

from __future__ import annotations

import pickle
import time
import types
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import diffusers.schedulers as library  # noqa: E402
from scheduler_cases import CASES, Case, case, present  # noqa: E402

from parastep.tracing import program as tracing  # noqa: E402

diffusers.logging.set_verbosity_error()

pytestmark = pytest.mark.filterwarnings("ignore")


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
