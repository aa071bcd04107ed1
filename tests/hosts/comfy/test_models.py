"""ComfyUI's own samplers and model classes in this process, with and without our patch."""

from __future__ import annotations

import math
import re

import pytest
import torch
from inprocess import build, sample

import parastep

pytestmark = pytest.mark.usefixtures("host")

NAMES = "eps v flow sd15 sdxl sd3 flux wan ltxv hunyuan_video stable_audio ace".split()
# One evaluation a step, several, stochastic, with memory, on trees of noise, adaptive, unguided.
SLICE = (
    "euler heun dpm_2_ancestral lms dpmpp_2s_ancestral dpmpp_sde dpmpp_2m dpmpp_2m_sde "
    "dpmpp_3m_sde_gpu lcm ipndm_v deis res_multistep er_sde seeds_3 sa_solver_pece ddim uni_pc "
    "dpm_fast dpm_adaptive euler_cfg_pp"
).split()
UNGUIDED = (
    "euler_cfg_pp euler_ancestral_cfg_pp dpmpp_2s_ancestral_cfg_pp dpmpp_2m_cfg_pp "
    "res_multistep_cfg_pp res_multistep_ancestral_cfg_pp gradient_estimation_cfg_pp"
).split()
SERIAL = {"dpm_adaptive": "chooses its noise levels"}
SCHEDULES = ["normal", "karras", "simple", "sgm_uniform", "beta"]


def patched(model, ranks=4, **options):
    from parastep.comfy.node import patch

    return patch(model, ["cpu"] * ranks, **options)


def report_of(model):
    from parastep.comfy.node import of_model

    return of_model(model).report


def compare(
    kind,
    sampler,
    scheduler="normal",
    steps=8,
    ranks=4,
    tolerance="rehearse",
    max_stride=None,
    **options,
):
    """(own result, ours, report); the patch is made anew."""

    model = build(kind)
    given = {"sampler": sampler, "scheduler": scheduler, "steps": steps, **options}
    own = sample(model, kind, **given)
    ours = patched(model, ranks, tolerance=tolerance, max_stride=max_stride)
    found = sample(ours, kind, **given)
    return own, found, report_of(ours)


def test_exact_is_the_stock_sampler_alone(monkeypatch):
    """No replica, no lane, and nothing asked of the host's memory."""
    from parastep.comfy import node, replicas

    def never(*args, **given):
        raise AssertionError("at tolerance 0")

    model, given = build("sd15"), {"sampler": "dpmpp_2m", "scheduler": "karras", "steps": 9}
    own = sample(model, "sd15", **given)
    for owner, name in ((replicas, "_add"), (replicas, "_free"), (node, "make_lanes")):
        monkeypatch.setattr(owner, name, never)
    for at in ("exact", 0.0):
        ours = node.patch(model, ["cpu", "cpu:1", "cpu:2"], tolerance=at)
        assert not ours.get_additional_models()
        assert torch.equal(sample(ours, "sd15", **given), own)
        report = report_of(ours)
        assert report.evaluations == [9, 0, 0] and report.rounds == report.steps == 9
        assert report.fallback is None and not report.failures
        assert "2 of 3 ranks are idle" in report.limit


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("sampler", SLICE)
def test_rehearsed_is_exact(sampler, kind):
    own, found, report = compare(kind, sampler)
    assert torch.equal(own, found) and own.isfinite().all()
    assert report.rounds == report.steps > 1
    assert not report.failures
    if sampler in SERIAL:
        assert SERIAL[sampler] in report.fallback
    else:
        assert report.fallback is None
        assert sum(report.evaluations[1:]) > report.rounds  # followers were at work


@pytest.mark.parametrize("sampler", [name for name in SLICE if name not in SERIAL])
def test_fewer_rounds_at_the_default_tolerance(sampler):
    own, found, report = compare("flow", sampler, "simple", steps=20, tolerance=0.02)
    assert report.fallback is None and not report.failures
    assert report.rounds < report.steps
    assert (found - own).norm() < 0.05 * own.norm()


def test_strides_on_one_device_and_on_three():
    rounds = []
    for ranks, max_stride in ((1, None), (3, None), (3, 1)):
        given = {"ranks": ranks, "max_stride": max_stride, "tolerance": 0.02}
        own, found, report = compare("flow", "euler", "simple", steps=50, **given)
        assert report.fallback is None and not report.failures and report.steps == 50
        assert (found - own).norm() < 0.05 * own.norm()
        rounds.append(report.rounds)
    assert rounds[0] < 30 and rounds[1] < rounds[2] < 30


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("sampler", UNGUIDED)
def test_samplers_that_use_the_unguided_output(sampler, cfg):
    """Exact at tolerance 0; else fewer rounds, and the unguided output is right in each of them."""
    given = {"scheduler": "karras", "steps": 24, "cfg": cfg}
    own, found, report = compare("sd15", sampler, **given)
    assert torch.equal(own, found) and report.fallback is None and not report.failures
    assert sum(report.evaluations[1:]) > report.rounds
    own, found, report = compare("sd15", sampler, **given, tolerance=0.05)
    assert report.rounds < 0.9 * report.steps and not report.failures
    assert (found - own).norm() < 0.03 * own.norm()


@pytest.mark.sweep
@pytest.mark.parametrize("scheduler", SCHEDULES)
@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_every_sampler_rehearsed_is_exact(kind, scheduler):
    from comfy.samplers import KSampler

    model, wrong, idle, serial, slow = build(kind), [], [], {}, []
    rehearsed = patched(model, 3, tolerance="rehearse")
    fast = patched(model, 3, tolerance=math.inf, max_stride=1)
    for sampler in KSampler.SAMPLERS:
        given = {"sampler": sampler, "scheduler": scheduler, "steps": 7, "cfg": 2.0}
        same = torch.equal(sample(model, kind, **given), sample(rehearsed, kind, **given))
        report = report_of(rehearsed)
        if not same or report.failures:
            wrong.append(sampler)
        if report.fallback is not None:
            serial[sampler] = report.fallback
            continue
        if sum(report.evaluations[1:]) < report.rounds - 1:  # followers were at work
            idle.append(sampler)
        sample(fast, kind, **given)
        if report_of(fast).rounds >= report.steps:
            slow.append(sampler)
    count = len(KSampler.SAMPLERS)
    print(f"\n{kind} {scheduler}: exact {count - len(wrong)} of {count}, serial {serial}")
    assert not wrong and not slow and not idle
    assert set(serial) <= set(SERIAL)


@pytest.mark.parametrize("kind", NAMES)
def test_model_classes(kind):
    own, found, report = compare(kind, "euler", steps=6)
    assert torch.equal(own, found) and own.isfinite().all() and own.std() > 0
    assert report.fallback is None and not report.failures
    assert report.evaluations[1:] == [report.rounds] * 3 or sum(report.evaluations[1:]) > 6
    *_, report = compare(kind, "euler", "simple", steps=12, tolerance=math.inf, max_stride=1)
    assert report.rounds == 1 + math.ceil(11 / 4)


def test_refuses_what_cannot_be():
    model = build("eps")
    with pytest.raises(parastep.DeviceError, match="begin with that one"):
        patched_on(model, "cuda:0 cuda:1")
    for devices, words in (
        ("nonsense", "'nonsense' is no device: write auto, or a list as cuda:0, cuda:1"),
        ("CPU", "'CPU' is no device: write cpu"),
        ("cpu, auto", "write auto alone"),
        ("auto, cpu", "write auto alone"),
        ("0,1", "'0' is no device: write cuda:0"),
        ("cpu, cuda:63", "there is no cuda:63: PyTorch sees"),
        (["cpu", 1.5], "'1.5' is no device: write auto"),
    ):
        with pytest.raises(parastep.DeviceError, match=re.escape(words)):
            patched_on(model, devices)
    assert patched_on(model, " Auto ").load_device == model.load_device
    with pytest.raises(parastep.InvalidError, match="write 'auto'"):
        patched_on(model, "")
    with pytest.raises(parastep.InvalidError, match="tolerance"):
        patched(model, tolerance=-1.0)
    with pytest.raises(parastep.InvalidError, match="not a ComfyUI MODEL"):
        patched(object())


def patched_on(model, devices):
    from parastep.comfy.node import patch

    return patch(model, devices)
