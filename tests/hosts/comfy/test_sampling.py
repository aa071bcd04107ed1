"""The seam of the ComfyUI adapter without ComfyUI: samplers, tracing, followers, faults."""

from __future__ import annotations

import functools
import inspect
import math
import threading
import time

import ksamplers
import numpy as np
import pytest
import torch
from crowded import Crowded

import parastep
from parastep.comfy.sampling import Host, Sampling
from parastep.options import Options
from parastep.tracing.kdiffusion import noise_ahead, to_d, to_denoised, trace
from parastep.tracing.schedulers import NotTraceableError


def levels(steps):
    return torch.cat([torch.linspace(2.6, -3.5, steps).exp(), torch.zeros(1)])


SIGMAS = levels(16)
CENTRE = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
ARGUMENTS = {"model_options": {}, "seed": 3}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


class Model:
    """Denoised output of a mixture of two Gaussians, in closed form; has what samplers look up."""

    inner_model = None

    def __init__(self):
        self.calls = 0

    def __call__(self, x, sigma, model_options=None, seed=None, **more):
        self.calls += 1
        return guided(x, sigma, (model_options or {}).get("sampler_post_cfg_function", ()))


def denoise(x, sigma):
    s2 = (sigma**2).reshape(-1, 1, 1, 1)
    width = s2 + 0.25
    dot = (x * CENTRE).sum((1, 2, 3), keepdim=True)
    mean = torch.tanh(dot / width) * CENTRE
    return (0.25 * x + s2 * mean) / width


def guided(x, sigma, functions):
    """With another unguided output, of which the functions are told, as a host does."""
    denoised = denoise(x, sigma)
    unguided = 0.9 * denoised - 0.1 * torch.sin(x / (1 + sigma.reshape(-1, 1, 1, 1)))
    for function in functions:
        denoised = function({"denoised": denoised, "uncond_denoised": unguided})
    return denoised


def lane(x, sigma, *functions):
    return guided(x, sigma, functions)


def latents(batch=2):
    return torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(1)) * SIGMAS[0]


def run(function, ranks=4, lane=lane, host=None, model=None, lanes=None, sigmas=SIGMAS, **options):
    """(result, Sampling) of a run with `ranks`."""
    model = model or Model()
    lanes = [lane] * (ranks - 1) if lanes is None else lanes
    given = Options(**{"tolerance": "rehearse", **options})
    sampling = Sampling(model, lanes, given, host)
    sigmas, arguments = sigmas.clone(), dict(ARGUMENTS)
    rows = functools.partial(trace, function, model, sigmas, arguments, {})
    result = sampling.run(function, latents(), sigmas, arguments, {}, rows, disable=True)
    return result, sampling


@functools.cache
def own(name, sigmas=SIGMAS):
    with torch.inference_mode():
        return ksamplers.SAMPLERS[name](Model(), latents(), sigmas.clone(), dict(ARGUMENTS))


# ---- tracing -------------------------------------------------------------------------------------


def traced(function):
    return trace(function, Model(), SIGMAS.clone(), dict(ARGUMENTS), {})


@pytest.mark.parametrize(
    "name, calls, history", [("euler", 16, 1), ("heun", 31, 2), ("dpmpp_2m", 16, 2)]
)
def test_rows_are_the_samplers_own(name, calls, history):
    """On random data that the trace has not seen, every row gives the latents that the sampler
    hands to its model next.
    """
    rows = traced(ksamplers.SAMPLERS[name])
    assert rows.a.shape == (calls, history) and rows.error < 1e-9 and not rows.draws
    asked, answers = [], []

    def model(x, sigma, **more):
        asked.append(x)
        answers.append(torch.randn(x.shape, dtype=x.dtype))
        return to_denoised(x, sigma, answers[-1])

    x = latents(1).double()
    asked.append(ksamplers.SAMPLERS[name](model, x, SIGMAS.double(), dict(ARGUMENTS)))
    for j in range(calls):
        row = 0
        for k in range(min(history, j + 1)):
            row = row + rows.a[j, k] * asked[j - k] + rows.b[j, k] * answers[j - k]
        scale = float(asked[j + 1].abs().max())
        assert (row - asked[j + 1]).abs().max() < 1e-5 * scale


def test_euler_is_known_by_heart():
    rows = traced(ksamplers.sample_euler)
    assert np.allclose(rows.a, 1) and np.allclose(rows.b[:, 0], np.diff(SIGMAS.numpy()), atol=1e-6)
    program = rows.program()
    assert np.array_equal(program.s, SIGMAS[:-1].double().numpy())
    assert np.allclose(program.g * program.s, 0.25) and not program.c.any()


def test_rows_of_a_sampler_that_uses_the_unguided_output():
    rows = traced(ksamplers.sample_euler_cfg_pp)
    s = SIGMAS.double().numpy()
    # x' = D + s' / s (x - U), with D = x - s d and U = x - s (d + q)
    assert np.allclose(rows.a, 1) and np.allclose(rows.b[:, 0], np.diff(s), atol=1e-6)
    assert rows.e is not None and np.allclose(rows.e[:, 0], s[1:], atol=1e-6)
    assert rows.program().c.all() and not rows.program().strides
    assert traced(ksamplers.sample_euler).e is None


def test_levels_are_those_of_the_loop_bit_for_bit():
    for function in ksamplers.SAMPLERS.values():
        seen = []

        def model(x, sigma, seen=seen, **more):
            seen.append(sigma[0].clone())
            return Model()(x, sigma, **more)

        function(model, latents(), SIGMAS.clone(), dict(ARGUMENTS))
        assert torch.equal(torch.stack(seen), traced(function).levels)


def test_digits_that_a_level_loses_in_float32_are_no_choice():
    def lossy(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return ksamplers.sample_euler(model, x, (sigmas + 2000) - 2000, extra_args)

    exact, rows = SIGMAS[:-1], traced(lossy)
    assert torch.equal(rows.levels, (exact + 2000) - 2000)
    assert not torch.allclose(rows.levels, exact, rtol=5e-4, atol=0)
    assert torch.allclose(rows.levels, exact, rtol=5e-3, atol=0)


def test_noise_ahead_is_what_the_loop_draws():
    function = ksamplers.sample_euler_ancestral
    rows = traced(function)
    assert rows.draws
    before = torch.get_rng_state()
    z = noise_ahead(rows, function, Model(), latents(), SIGMAS, dict(ARGUMENTS), {})
    assert torch.equal(torch.get_rng_state(), before)
    asked, answers = [], []

    def model(x, sigma, **more):
        asked.append(x)
        answers.append(to_d(x, sigma, denoise(x, sigma)))
        return denoise(x, sigma)

    asked.append(function(model, latents(), SIGMAS, dict(ARGUMENTS)))
    for j in range(len(z)):
        row = rows.a[j, 0] * asked[j] + rows.b[j, 0] * answers[j] + z[j]
        assert torch.allclose(row.float(), asked[j + 1], atol=1e-4)


@pytest.mark.parametrize(
    "function, words",
    [
        (ksamplers.sample_adaptive, "chooses its noise levels"),
        (ksamplers.sample_changing, "changes the output"),
        (lambda *args, **more: 1 / 0, "ZeroDivisionError"),
        (lambda model, x, sigmas, **more: x, "0 model calls"),
    ],
)
def test_what_cannot_be_traced_says_why(function, words):
    with pytest.raises(NotTraceableError, match=words):
        traced(function)


def test_tracing_leaves_no_mark():
    def rude(model, x, sigmas, extra_args=None, callback=None, disable=None):
        result = ksamplers.sample_euler(model, x, sigmas, extra_args)
        sigmas[-1] = 7.0
        extra_args["seed"] = None
        extra_args["model_options"]["more"] = 1
        torch.rand(1)
        return result + 0 * torch.randn_like(x)

    sigmas, arguments = SIGMAS.clone(), {"model_options": {}, "seed": 3}
    before = torch.get_rng_state()
    trace(rude, Model(), sigmas, arguments, {})
    assert torch.equal(sigmas, SIGMAS) and arguments == {"model_options": {}, "seed": 3}
    assert torch.equal(torch.get_rng_state(), before)


# ---- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", list(ksamplers.SAMPLERS))
def test_exact_at_tolerance_0(name, ranks):
    result, sampling = run(ksamplers.SAMPLERS[name], ranks)
    assert torch.equal(result, own(name))
    report = sampling.report
    assert report.rounds == report.steps and report.fallback is None and not report.failures
    assert ranks == 1 or sum(report.evaluations[1:]) > report.steps / 2


@pytest.mark.parametrize("name", list(ksamplers.SAMPLERS))
def test_fewer_rounds(name):
    model = Model()
    result, sampling = run(ksamplers.SAMPLERS[name], model=model, tolerance=0.02)
    report = sampling.report
    assert report.rounds == model.calls == sampling.evaluated < 0.8 * report.steps
    assert (result - own(name)).norm() < 0.02 * own(name).norm()
    assert len(report.drift) == report.steps == sum(report.accepted)


def test_no_limit_takes_as_few_rounds_as_there_can_be():
    for name, steps in (("euler", 16), ("dpmpp_2m", 16), ("heun", 31)):
        _, sampling = run(ksamplers.SAMPLERS[name], tolerance=math.inf, max_stride=1)
        assert sampling.report.rounds == 1 + math.ceil((steps - 1) / 4)


def test_the_unguided_output_is_right_in_every_answer():
    """Whether a call is answered or evaluated, the sampler's function sees the output at x."""

    def checking(model, x, sigmas, extra_args=None, callback=None, disable=None):
        seen = []

        def function(args):
            seen.append(args["uncond_denoised"])
            return args["denoised"]

        options = {"sampler_post_cfg_function": [function]}
        extra = {**extra_args, "model_options": {**extra_args["model_options"], **options}}
        for i in range(len(sigmas) - 1):
            sigma = sigmas[i].repeat(len(x))
            denoised = model(x, sigma, **extra)
            if isinstance(model, Sampling):
                true = []
                lane(x, sigma, lambda args, true=true: true.append(args["uncond_denoised"]))
                assert (seen[-1] - true[0]).abs().max() < 0.1 * float(sigmas[i])
            x = denoised + (x - seen[-1]) / sigmas[i] * sigmas[i + 1]
        assert len(seen) == len(sigmas) - 1
        return x

    _, sampling = run(checking, tolerance=0.02)
    assert sampling.report.fallback is None
    assert sampling.report.rounds < 0.8 * sampling.report.steps


def test_callbacks_see_true_latents():
    seen = []
    sampling = Sampling(Model(), [denoise] * 3, Options(tolerance=0.02))
    sigmas = SIGMAS.clone()
    rows = functools.partial(trace, ksamplers.sample_euler, Model(), sigmas, ARGUMENTS, {})
    sampling.run(
        ksamplers.sample_euler, latents(), sigmas, ARGUMENTS, {}, rows, callback=seen.append
    )
    assert [told["i"] for told in seen] == list(range(16))
    for told in seen:
        true = denoise(told["x"], told["sigma"].repeat(2))
        assert (told["denoised"] - true).abs().max() < 0.2


def test_serial_with_the_reason():
    for function in (ksamplers.sample_adaptive, ksamplers.sample_changing):
        result, sampling = run(function, tolerance=0.02)
        alone = function(Model(), latents(), SIGMAS.clone(), dict(ARGUMENTS))
        assert torch.equal(result, alone)
        assert sampling.report.fallback and sampling.report.rounds == sampling.report.steps


def test_levels_that_change_after_the_trace_end_speculation():
    """The rows are of another schedule: nothing that was evaluated ahead may be used."""
    other = SIGMAS * 1.01
    sampling = Sampling(Model(), [denoise] * 3, Options(tolerance=0.5))
    rows = functools.partial(trace, ksamplers.sample_euler, Model(), other, ARGUMENTS, {})
    result = sampling.run(ksamplers.sample_euler, latents(), SIGMAS, ARGUMENTS, {}, rows)
    assert torch.equal(result, own("euler"))
    assert "noise levels" in sampling.report.fallback


# ---- strided rounds ------------------------------------------------------------------------------

MANY = levels(30)
MORE = levels(90)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_one_device_makes_fewer_model_calls_than_steps(name):
    model = Model()
    result, sampling = run(ksamplers.SAMPLERS[name], 1, model=model, sigmas=MANY, tolerance=0.02)
    report = sampling.report
    assert report.fallback is None and report.ranks == 1 and report.steps == 30
    assert model.calls == report.rounds == report.evaluations[0] < 0.8 * report.steps
    assert report.interpolated > 0 and sum(report.accepted) == report.steps
    assert (result - own(name, MANY)).norm() < 0.02 * own(name, MANY).norm()


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_strides_save_rounds_on_several_devices(name):
    model = Model()
    given = {"ranks": 4, "sigmas": MORE, "tolerance": 0.02}
    result, strided = run(ksamplers.SAMPLERS[name], model=model, **given)
    _, dense = run(ksamplers.SAMPLERS[name], max_stride=1, **given)
    assert model.calls == strided.report.rounds < dense.report.rounds
    assert sum(strided.report.accepted) == strided.report.steps == 90
    assert dense.report.interpolated == 0 and not strided.report.failures
    assert (result - own(name, MORE)).norm() < 0.02 * own(name, MORE).norm()


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"tolerance": 0.02, "max_stride": 1}])
def test_without_strides_one_device_is_the_sampler_alone(options):
    for name in ksamplers.SAMPLERS:
        result, sampling = run(ksamplers.SAMPLERS[name], 1, **options)
        assert torch.equal(result, own(name)) and sampling.core is None
        assert sampling.report.rounds == sampling.report.steps
        assert sampling.report.fallback is None


@pytest.mark.parametrize("name", ["euler_ancestral", "heun", "euler_cfg_pp"])
def test_samplers_that_draw_or_return_to_a_level_stay_at_stride_1(name):
    result, sampling = run(ksamplers.SAMPLERS[name], 1, tolerance=0.1)
    assert torch.equal(result, own(name)) and sampling.core is None
    assert sampling.report.fallback is None
    strided, dense = (
        run(ksamplers.SAMPLERS[name], tolerance=0.1, **o) for o in ({}, {"max_stride": 1})
    )
    assert torch.equal(strided[0], dense[0]) and strided[1].report.interpolated == 0


class Asked(Sampling):
    """Tells when the model runs ahead of the sampler's own calls, and may do something then."""

    ahead = 0
    meanwhile = staticmethod(lambda: None)

    def _evaluate_ahead(self, arguments):
        self.ahead += 1
        self.meanwhile()
        super()._evaluate_ahead(arguments)


def ahead(model, lanes, meanwhile=lambda: None, host=None):
    """An Asked and its run, as a function of no arguments."""
    sampling = Asked(model, lanes, Options(tolerance=0.1), host)
    sampling.meanwhile = meanwhile
    sigmas, function = MANY.clone(), ksamplers.sample_euler
    rows = functools.partial(trace, function, model, sigmas, ARGUMENTS, {})
    go = functools.partial(sampling.run, function, latents(), sigmas, ARGUMENTS, {}, rows)
    return sampling, go


@pytest.mark.parametrize("others", [0, 3])
def test_cancelling_in_the_middle_of_an_evaluation_ahead(others):
    host = Cancelling()
    slow = type("Slow", (Model,), {"__call__": lambda self, x, s, **m: host.model(x, s)})()
    begin = functools.partial(host.cancel, True)
    sampling, go = ahead(slow, [host.model] * others, begin, host)
    with pytest.raises(Cancelled):
        go()
    assert sampling.ahead == 1 and not host.flag
    assert not [t for t in threading.enumerate() if t.name.startswith("parastep-")]
    assert sampling.report.rounds == sampling.evaluated


def test_an_error_of_the_core_ahead_ends_speculation_only():
    def refuses(outputs):
        raise parastep.ShapeError("refused")

    class Refusing:
        def __init__(self, leader):
            self.leader = leader

        def __getattr__(self, name):
            return refuses if name == "fill" else getattr(self.leader, name)

    sampling, go = ahead(Model(), [denoise])
    sampling.meanwhile = lambda: setattr(sampling, "core", Refusing(sampling.core))
    result, report = go(), sampling.report
    assert sampling.ahead == 1 and report.fallback == "refused"
    assert (result - own("euler", MANY)).norm() < 0.02 * own("euler", MANY).norm()
    assert sum(report.accepted) == report.steps == 30


def test_callbacks_come_in_order_with_strides():
    seen = []
    sampling, go = ahead(Model(), [])
    go(callback=seen.append)
    assert sampling.ahead > 0 and [told["i"] for told in seen] == list(range(30))


# ---- faults --------------------------------------------------------------------------------------


def test_a_lane_that_raises_costs_speed_only():
    def broken(x, sigma):
        if sigma[0] < 1:
            raise RuntimeError("out of memory")
        return denoise(x, sigma)

    result, sampling = run(ksamplers.sample_euler, lanes=[denoise, broken, denoise])
    assert torch.equal(result, own("euler"))
    (failure,) = sampling.report.failures
    assert failure.rank == 2 and "out of memory" in failure.text


def test_a_lane_with_another_function_is_left_out():
    result, sampling = run(
        ksamplers.sample_euler,
        lanes=[lambda x, s: 0.9 * denoise(x, s)],
        tolerance=0.5,
        max_stride=1,
    )
    assert torch.equal(result, own("euler"))
    assert sampling.report.failures[0].status == "DIFFERS"


def test_a_lane_that_hangs_is_lost_at_its_deadline():
    let_go = threading.Event()

    def hangs(x, sigma):
        if sigma[0] < 1:
            let_go.wait(60)
        return denoise(x, sigma)

    result, sampling = run(ksamplers.sample_euler, lanes=[hangs, denoise], deadline=0.2)
    let_go.set()
    assert torch.equal(result, own("euler"))
    assert [line.rank for line in sampling.report.failures] == [1]


class Cancelled(BaseException):
    pass


class Cancelling(Host):
    """A host with one flag, which the first model call that looks at it clears, as ComfyUI has."""

    interrupt = Cancelled

    def __init__(self):
        self.flag, self.lock = False, threading.Lock()

    def cancel(self, on):
        self.flag = on

    def model(self, x, sigma, **more):
        for _ in range(20):
            time.sleep(0.002)
            with self.lock:
                if self.flag:
                    self.flag = False
                    raise Cancelled
        return denoise(x, sigma)


@pytest.mark.parametrize("repeat", range(3))
def test_cancelling_reaches_all_lanes_and_the_next_run_is_fine(repeat):
    host = Cancelling()
    slow = Model()
    slow.__class__ = type("Slow", (Model,), {"__call__": lambda self, x, s, **m: host.model(x, s)})
    threading.Timer(0.1 + 0.03 * repeat, host.cancel, [True]).start()
    with pytest.raises(Cancelled):
        run(ksamplers.sample_euler, lanes=[host.model] * 3, host=host, model=slow)
    assert not host.flag
    assert not [t for t in threading.enumerate() if t.name.startswith("parastep-")]
    result, _ = run(ksamplers.sample_euler, lanes=[host.model] * 3, host=host, model=slow)
    assert torch.equal(result, own("euler"))


def test_what_the_model_raises_is_raised():
    class Broken(Model):
        def __call__(self, x, sigma, **more):
            if sigma[0] < 1:
                raise ValueError("mine")
            return super().__call__(x, sigma, **more)

    with pytest.raises(ValueError, match="mine"):
        run(ksamplers.sample_euler, model=Broken())


# ---- against the host ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ksamplers.SAMPLERS))
def test_the_samplers_written_here_are_the_hosts(host, name):
    import comfy.k_diffusion.sampling as stock
    import comfy.model_sampling

    model = Model()
    schedule = type("Schedule", (comfy.model_sampling.EPS,), {})()
    patcher = type("Patcher", (), {"get_model_object": lambda self, name: schedule})()
    inner = type("Inner", (), {"model_sampling": schedule})()
    guider = type("Guider", (), {"inner_model": inner, "model_patcher": patcher})()
    model.inner_model = guider
    found, wanted = (
        function(model, latents(), SIGMAS.clone(), dict(ARGUMENTS), **drawing(function))
        for function in (getattr(stock, f"sample_{name}"), ksamplers.SAMPLERS[name])
    )
    assert torch.allclose(found, wanted, atol=1e-4)


def drawing(function):
    """A sampler's source of noise, if it has one: what a seed gives differs between versions."""
    if "noise_sampler" not in inspect.signature(function).parameters:
        return {}
    generator = torch.Generator().manual_seed(4)
    return {"noise_sampler": lambda *_: torch.randn(latents().shape, generator=generator)}


@pytest.mark.parametrize("at", [0, 4])
def test_no_memory_beside_the_followers(at):
    crowded = Crowded(at)

    class Full(Model):
        def __call__(self, x, sigma, **more):
            with crowded(True):
                return super().__call__(x, sigma, **more)

    def lane(x, sigma, *functions):
        with crowded(False):
            return guided(x, sigma, functions)

    result, sampling = run(ksamplers.SAMPLERS["euler"], ranks=3, lane=lane, model=Full())
    assert torch.equal(result, own("euler")) and crowded.refused == 1
    assert "no memory" in sampling.report.fallback
