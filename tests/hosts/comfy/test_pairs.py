"""Pairs of devices in the host's own code: CPU devices with numbers stand for GPUs."""

from __future__ import annotations

import threading
import time
from unittest.mock import Mock

import pytest
import torch
from comfy_parts import Hypernetwork, Replacement, control, copied, text, with_lora
from inprocess import build, sample

import parastep

pytestmark = pytest.mark.usefixtures("host")

PAIR, PAIRS, FLAT = "cpu+cpu:1", "cpu+cpu:1, cpu:2+cpu:3", "cpu, cpu:2"


@pytest.fixture(autouse=True)
def able(host):
    from parastep.comfy.sharing import no_split

    if (reason := no_split()) is not None:
        pytest.skip(reason)


@pytest.fixture
def split(monkeypatch):
    """Counts calls of the host's split."""
    import comfy.samplers

    counted = Mock(wraps=comfy.samplers._calc_cond_batch_multigpu)
    monkeypatch.setattr(comfy.samplers, "_calc_cond_batch_multigpu", counted)
    return counted


def patched(model, devices=PAIRS, **options):
    from parastep.comfy.node import patch

    return patch(model, devices, **options)


def report_of(model):
    from parastep.comfy.node import of_model

    return of_model(model).report


def compare(kind, change=None, after=None, devices=PAIRS, flat=FLAT, tolerance=0.04, **given):
    """The report of a run in pairs: as many rounds as the same ranks without partners, and their
    result to rounding, which is the stock one's as near as that is.
    """
    given = {"cfg": 5.0, "steps": 10, **given}
    after = after or (lambda model: model)
    model = build(kind) if change is None else change(build(kind))
    own = sample(after(model), kind, **copied(given))
    alone, ours = (after(patched(model, d, tolerance=tolerance)) for d in (flat, devices))
    found = [sample(each, kind, **copied(given)) for each in (alone, ours)]
    plain, report = report_of(alone), report_of(ours)
    assert plain.fallback is None and report.fallback is None, (plain, report)
    assert not plain.failures and not report.failures, (plain.failures, report.failures)
    assert (report.rounds, report.evaluations) == (plain.rounds, plain.evaluations)
    assert (found[1] - found[0]).norm() < 1e-4 * own.norm() and own.norm() > 0
    assert (found[1] - own).norm() < 0.05 * own.norm()
    check_shared(report, devices)
    return report


def check_shared(report, devices=PAIRS):
    assert [" + ".join(t.devices) for t in report.teams] == [
        team.strip().replace("+", " + ") for team in devices.split(",")
    ]
    for team, count in zip(report.teams, report.evaluations):
        assert team.split == "conditions (to rounding)" and team.shared >= count - 2 > 0, report
        assert len(team.served) >= team.shared


KINDS = "eps v sd15 sdxl sd3 flux wan ltxv hunyuan_video stable_audio ace".split()


@pytest.mark.parametrize("kind", KINDS)
def test_model_classes(kind):
    compare(kind, steps=6)


@pytest.mark.parametrize(
    "sampler", "dpmpp_2m heun dpm_2 uni_pc euler_ancestral dpmpp_2m_sde euler_cfg_pp lcm".split()
)
def test_samplers(sampler):
    compare("sd15", sampler=sampler)


def test_one_pair_has_fewer_rounds_than_steps():
    given = {"scheduler": "simple", "steps": 30}
    report = compare("flow", devices=PAIR, flat="cpu", **given)
    assert report.ranks == 1 and report.rounds < 30 and report.interpolated
    again = patched(build("flow"), PAIR, max_stride=1)
    own = sample(build("flow"), "flow", **given)
    assert (sample(again, "flow", **given) - own).norm() < 1e-4 * own.norm()
    check_shared(report_of(again), PAIR)
    assert report_of(again).rounds == 30


def test_a_sampler_that_runs_serially_is_shared_all_the_same():
    own = sample(build("sd15"), "sd15", sampler="dpm_adaptive")
    ours = patched(build("sd15"), PAIRS)
    found, report = sample(ours, "sd15", sampler="dpm_adaptive"), report_of(ours)
    assert (found - own).norm() < 1e-3 * own.norm()
    assert "chooses its noise levels" in report.fallback and report.ranks == 1
    assert report.teams[0].shared > report.rounds - 3


@pytest.mark.parametrize("order", ["before", "behind"])
def test_lora(order):
    given = {"change": with_lora} if order == "before" else {"after": with_lora}
    compare("sd15", **given)
    assert not torch.equal(sample(build(), "sd15"), sample(with_lora(build()), "sd15"))


def test_masks_areas_and_times():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1.0
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    compare("sd15", latent=latent, noise_mask=mask)
    area = text("sd15", 1, area=(4, 4, 0, 0), strength=1.0)
    compare("sd15", positive=[*text("sd15", 3), *area])
    masked = text("sd15", 1, mask=torch.ones(1, 64, 64) * 0.5, mask_strength=1.0)
    compare("sd15", positive=[*text("sd15", 3), *masked])
    early = text("sd15", 1, start_percent=0.0, end_percent=0.5)
    late = text("sd15", 4, start_percent=0.5, end_percent=1.0)
    compare("sd15", positive=[*early, *late])
    compare("sd15", batch=3)


def test_areas_share_a_step_without_guidance():
    area = text("sd15", 1, area=(4, 4, 0, 0), strength=1.0)
    compare("sd15", cfg=1.0, positive=[*text("sd15", 3), *area])


def copying(chain=False):
    """A ControlNet that the host can copy to a device, where its class says how."""
    made = control()
    kind = type(made)

    class Copying(kind):
        def copy(self):
            own = Copying()
            self.copy_to(own)
            return own

        def deepclone_multigpu(self, load_device, autoregister=False):
            own = self.copy()
            if autoregister:
                self.multigpu_clones[load_device] = own
            return own

    made.__class__ = Copying
    if chain:
        made.set_previous_controlnet(copying())
    return made


@pytest.mark.parametrize("chain", [False, True])
def test_controlnet(chain):
    one = copying(chain)
    positive, negative = text("sd15", 1, control=one), text("sd15", 2, control=one)
    own = sample(build(), "sd15", cfg=5.0, positive=positive, negative=negative)
    assert not torch.equal(own, sample(build(), "sd15", cfg=5.0))
    ours = patched(build(), PAIRS)
    found = sample(ours, "sd15", cfg=5.0, positive=positive, negative=negative)
    assert (found - own).norm() < 1e-3 * own.norm()
    check_shared(report_of(ours))


def test_a_controlnet_without_a_copy_leaves_partners_out():
    positive = text("sd15", 1, control=control())
    own = sample(build(), "sd15", positive=positive)
    ours = patched(build(), PAIR, tolerance="rehearse")
    assert torch.equal(sample(ours, "sd15", positive=positive), own)
    assert report_of(ours).ranks == 1 and report_of(ours).teams[0].split is None


@pytest.mark.parametrize("kind", [Hypernetwork, Replacement])
def test_patches_with_weights(kind):
    patch = kind()

    def change(model):
        model = model.clone()
        if kind is Replacement:
            model.set_model_attn2_replace(patch, "middle", 0)
        else:
            model.set_model_attn1_patch(patch)
        return model

    compare("sd15", change=change)
    assert str(patch.device) == "cpu"


def test_functions_of_the_model():
    def wrapped(model):
        model = model.clone()
        model.set_model_unet_function_wrapper(
            lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) * 1.01
        )
        model.set_model_sampler_post_cfg_function(lambda given: given["denoised"] * 0.99)
        return model

    compare("sd15", change=wrapped)


def test_what_keeps_state_is_shared_with_nobody():
    def counting(model):
        model, seen = model.clone(), 0

        def function(apply, given):
            nonlocal seen
            seen += 1
            return apply(given["input"], given["timestep"], **given["c"]) * (1 + 0.01 * (seen % 3))

        model.set_model_unet_function_wrapper(function)
        return model

    own = sample(counting(build("eps")), "eps")
    for given in ({}, {"max_stride": 1}):
        ours = patched(counting(build("eps")), PAIR, **given)
        assert torch.equal(sample(ours, "eps"), own)
        assert "'seen'" in report_of(ours).fallback


class Keeper:
    """Keeps what it is given where reading its code does not show it."""

    def __init__(self):
        self.seen = []

    def __call__(self, apply, given):
        self.seen.append(1)
        factor = 1 + 0.01 * (len(self.seen) % 3)
        return apply(given["input"], given["timestep"], **given["c"]) * factor


@pytest.mark.parametrize("given", [{}, {"max_stride": 1}, {"sampler": "dpm_adaptive"}])
def test_what_is_seen_to_keep_state_is_shared_with_nobody(given):
    def keeping():
        model = build("eps").clone()
        model.set_model_unet_function_wrapper(Keeper())
        return model

    options = {key: given[key] for key in given if key == "max_stride"}
    call = {key: given[key] for key in given if key != "max_stride"}
    own, ours = sample(keeping(), "eps", **call), patched(keeping(), PAIR, **options)
    assert torch.equal(sample(ours, "eps", **call), own)
    report = report_of(ours)
    assert report.fallback and report.teams[0].split is None


# ---- guidance ------------------------------------------------------------------------------------


def test_at_cfg_1_partners_are_ranks():
    given = {"scheduler": "simple", "steps": 20, "cfg": 1.0}
    own = sample(build("flow"), "flow", **given)
    pairs, flat = patched(build("flow"), PAIRS), patched(build("flow"), "cpu,cpu:1,cpu:2,cpu:3")
    found = [sample(model, "flow", **given) for model in (pairs, flat)]
    assert torch.equal(*found) and (found[0] - own).norm() < 0.05 * own.norm()
    report, plain = report_of(pairs), report_of(flat)
    assert report.ranks == 4 and report.evaluations == plain.evaluations and not plain.teams
    assert [team.devices for team in report.teams] == [["cpu"], ["cpu:1"], ["cpu:2"], ["cpu:3"]]
    assert all("one condition a step" in team.unsplit for team in report.teams)


def test_auto_chooses_by_guidance(monkeypatch, caplog):
    from comfy import model_management

    devices = [torch.device(name) for name in ("cpu", "cpu:1", "cpu:2", "cpu:3", "cpu:4")]
    monkeypatch.setattr(model_management, "get_all_torch_devices", lambda **given: devices)
    ours = patched(build("sd15"), "auto")
    for cfg, ranks in ((5.0, 2), (1.0, 5), (5.0, 2)):
        caplog.clear()
        own = sample(build("sd15"), "sd15", cfg=cfg)
        assert (sample(ours, "sd15", cfg=cfg) - own).norm() < 0.05 * own.norm()
        report = report_of(ours)
        assert report.ranks == ranks and not report.failures
        idle = [line for line in caplog.messages if "cpu:4 is idle: it has no partner" in line]
        assert len(idle) == (cfg > 1)
        if cfg > 1:
            check_shared(report)


def test_without_the_hosts_split_partners_are_ranks(monkeypatch):
    from parastep.comfy import node

    monkeypatch.setattr(node, "no_split", lambda: "this ComfyUI has no MultiGPU CFG Split")
    ours, own = patched(build("sd15"), PAIRS), sample(build("sd15"), "sd15")
    assert (sample(ours, "sd15") - own).norm() < 0.05 * own.norm()
    report = report_of(ours)
    assert report.ranks == 4 and not report.failures
    assert all("no MultiGPU CFG Split" in team.unsplit for team in report.teams)


def guided_by(kind, model, sigmas_of="normal", steps=8):
    """A run with one of the host's other guiders."""
    import comfy.samplers
    from comfy_extras import nodes_custom_sampler, nodes_perpneg

    conds = [text("sd15", seed) for seed in (1, 2, 3)]
    if kind == "dual":
        guider = nodes_custom_sampler.Guider_DualCFG(model)
        guider.set_cfg(3.0, 2.0)
    elif kind == "perpneg":
        guider = nodes_perpneg.Guider_PerpNeg(model)
        guider.set_cfg(3.0, 0.7)
    else:
        guider = nodes_custom_sampler.Guider_Basic(model)
        conds = conds[:1]
    guider.set_conds(*conds)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, sigmas_of, steps)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=5)


@pytest.mark.parametrize(
    "kind, devices", [("dual", PAIRS), ("perpneg", "cpu+cpu:1+cpu:2"), ("basic", PAIRS)]
)
def test_other_guiders(kind, devices):
    own, ours = guided_by(kind, build()), patched(build(), devices)
    assert (guided_by(kind, ours) - own).norm() < 0.05 * own.norm()
    report = report_of(ours)
    if kind == "basic":
        assert report.ranks == 4 and all(team.split is None for team in report.teams)
    else:
        check_shared(report, devices)
    if kind == "perpneg":
        assert {share.device for share in report.teams[0].served} == {1, 2}


def test_guidance_that_changes_in_the_run():
    """Speculation ends there, for followers do not know of it; sharing goes on as there is a second
    condition, or not.
    """
    import comfy.samplers

    def run(model):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(text("sd15", 1), text("sd15", 2))
        guider.set_cfg(5.0)

        def change(step, *more):
            guider.cfg = 1.0 if 3 <= step < 6 else 4.0

        sigmas = comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), "normal", 10
        )
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        sampler = comfy.samplers.sampler_object("euler")
        given = (noise, torch.zeros_like(noise), sampler, sigmas)
        with torch.inference_mode():
            return guider.sample(*given, callback=change, seed=5)

    own, ours = run(build()), patched(build(), PAIRS)
    assert (run(ours) - own).norm() < 1e-3 * own.norm()
    report = report_of(ours)
    assert "the guider's cfg changed" in report.fallback
    team = report.teams[0]
    assert team.shared >= 5 and team.whole >= 3 and team.shared + team.whole == report.rounds


# ---- what goes where -----------------------------------------------------------------------------


def test_each_condition_is_evaluated_on_its_own_device(split):
    """Nobody is the host's main device: the head of a lane evaluates in the lane's own thread, its
    partner in one of its own, and no device works for two ranks.
    """
    model = build("sd15")
    ours = patched(model, PAIRS)
    seen = {}

    def watch(device, module):
        def note(*_):
            seen.setdefault(device, set()).add(threading.current_thread().name)

        return module.register_forward_pre_hook(note)

    models = {str(m.load_device): m for m in ours.get_additional_models_with_key("multigpu")}
    assert sorted(models) == ["cpu:1", "cpu:2", "cpu:3"]
    handles = [watch(name, m.model.diffusion_model) for name, m in models.items()]
    sample(ours, "sd15", cfg=5.0)
    for handle in handles:
        handle.remove()
    check_shared(report_of(ours))
    assert seen == {
        "cpu:1": {"parastep-cpu-helper1"},
        "cpu:2": {"parastep-1"},
        "cpu:3": {"parastep-cpu:2-helper1"},
    }
    assert split.call_count >= sum(team.shared for team in report_of(ours).teams)
    assert not [t for t in threading.enumerate() if t.name.startswith("parastep-")]


def test_rehearsed_has_the_stock_bits():
    for kind in ("sd15", "flow"):
        own, ours = sample(build(kind), kind), patched(build(kind), PAIRS, tolerance="rehearse")
        assert torch.equal(sample(ours, kind), own)
        report = report_of(ours)
        assert report.teams[0].split is None and "tolerance 0" in report.teams[0].unsplit
        assert report.teams[1].shared and not report.failures


def test_exact_splits_nothing_itself(split):
    own, ours = sample(build("sd15"), "sd15"), patched(build("sd15"), PAIRS, tolerance="exact")
    assert not ours.get_additional_models()
    assert torch.equal(sample(ours, "sd15"), own) and split.call_count == 0
    report = report_of(ours)
    assert report.evaluations == [8, 0] and "only what the graph itself splits" in report.limit


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("devices", ["cpu", PAIRS, "auto", FLAT])
def test_exact_leaves_the_graphs_own_split_alone(split, monkeypatch, order, devices):
    import comfy.multigpu
    from comfy import model_management

    all_devices = [torch.device(name) for name in ("cpu", "cpu:1", "cpu:2")]
    monkeypatch.setattr(model_management, "get_all_torch_devices", lambda **given: all_devices)

    def divided(model):
        return comfy.multigpu.create_multigpu_deepclones(model, 2)

    model = build("sd15")
    own = sample(divided(model), "sd15")
    assert split.call_count == 8
    if order == "before":
        ours = patched(divided(model), devices, tolerance="exact")
    else:
        ours = divided(patched(model, devices, tolerance="exact"))
    assert torch.equal(sample(ours, "sd15"), own) and split.call_count == 16
    assert "own MultiGPU CFG Split goes on over cpu + cpu:1" in report_of(ours).limit


def test_pairs_take_the_place_of_the_graphs_split(split, monkeypatch, caplog):
    import comfy.multigpu
    from comfy import model_management

    devices = [torch.device(name) for name in ("cpu", "cpu:1")]
    monkeypatch.setattr(model_management, "get_all_torch_devices", lambda **given: devices)
    model = comfy.multigpu.create_multigpu_deepclones(build("sd15"), 2)
    own, ours = sample(model, "sd15"), patched(model, PAIRS)
    assert (sample(ours, "sd15") - own).norm() < 0.05 * own.norm()
    check_shared(report_of(ours))
    assert not any("remove that node" in line for line in caplog.messages)


# ---- faults and memory ---------------------------------------------------------------------------


def breaking(model, device, at, how):
    """`how` takes the place of this device's forwards from one on; a handle to remove."""
    (found,) = (
        m
        for m in model.get_additional_models_with_key("multigpu")
        if m.load_device == torch.device(device)
    )
    calls = 0

    def hook(module, args, output):
        nonlocal calls
        calls += 1
        return how(output) if calls > at else output

    return found.model.diffusion_model.register_forward_hook(hook)


def raises(output):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def sleeps(output):
    time.sleep(3)
    return output


FAULTS = {
    "raises": (raises, "illegal memory access"),
    "nan": (lambda output: output * torch.nan, "NaN"),
    "black": (lambda output: output * 0, "does not compute what its head does"),
    "hangs": (sleeps, "no output within"),
}


@pytest.mark.parametrize("device, rank", [("cpu:1", 0), ("cpu:3", 1)])
@pytest.mark.parametrize("fault, at", [("raises", 0), ("raises", 4), ("nan", 3), ("hangs", 3)])
def test_a_partner_with_a_fault_costs_speed_only(device, rank, fault, at):
    how, words = FAULTS[fault]
    given = {"deadline": 0.8} if fault == "hangs" else {}
    model = build("sd15")
    own, ours = sample(model, "sd15", cfg=5.0), patched(model, PAIRS, **given)
    handle = breaking(ours, device, at, how)
    found, report = sample(ours, "sd15", cfg=5.0), report_of(ours)
    handle.remove()
    assert (found - own).norm() < 0.05 * own.norm() and report.fallback is None
    lost = [line for line in report.failures if line.status == "HELPER_LOST"]
    assert [line.rank for line in lost] == [rank] and words in lost[0].text, report.failures
    assert (len(report.failures) == 2) == (rank == 1)  # a follower leaves with it
    time.sleep(2.5 * (fault == "hangs"))
    again = sample(ours, "sd15", cfg=5.0)
    assert (again - own).norm() < 0.05 * own.norm() and not report_of(ours).failures
    check_shared(report_of(ours))


def test_a_partner_that_computes_something_else_is_never_used():
    model = build("sd15")
    own, ours = sample(model, "sd15", cfg=5.0), patched(model, PAIR, max_stride=1)
    handle = breaking(ours, "cpu:1", 0, FAULTS["black"][0])
    assert torch.equal(sample(ours, "sd15", cfg=5.0), own)
    handle.remove()
    (line,) = report_of(ours).failures
    assert FAULTS["black"][1] in line.text and line.step == 0
    assert report_of(ours).teams[0].split is None


def test_a_lost_partner_may_be_an_error():
    ours = patched(build("sd15"), PAIR, on_failure="raise")
    handle = breaking(ours, "cpu:1", 2, raises)
    with pytest.raises(parastep.LostError, match=r"its helper on cpu:1 was lost"):
        sample(ours, "sd15", cfg=5.0)
    handle.remove()
    assert sample(ours, "sd15", cfg=5.0).isfinite().all()


@pytest.mark.parametrize("device", ["cpu", "cpu:1", "cpu:2", "cpu:3"])
def test_cancelling_reaches_all_devices(device):
    """Whoever of them sees it first; the next run is fine."""
    from comfy import model_management

    model = build("sd15")
    own, ours = sample(model, "sd15", cfg=5.0), patched(model, PAIRS)

    def cancel(output):
        model_management.interrupt_current_processing(True)
        model_management.throw_exception_if_processing_interrupted()
        return output

    if device == "cpu":
        handle, calls = None, []

        def count(step, *more):
            calls.append(step)
            if len(calls) == 3:
                model_management.interrupt_current_processing(True)

        given = {"callback": count}
    else:
        handle, given = breaking(ours, device, 3, cancel), {}
    with pytest.raises(model_management.InterruptProcessingException):
        sample(ours, "sd15", cfg=5.0, **given)
    if handle is not None:
        handle.remove()
    assert not [t for t in threading.enumerate() if t.name.startswith("parastep-")]
    assert not model_management.processing_interrupted()
    assert (sample(ours, "sd15", cfg=5.0) - own).norm() < 0.05 * own.norm()
    check_shared(report_of(ours))


@pytest.mark.parametrize(
    "full, teams",
    [
        ("cpu:1", [["cpu"], ["cpu:2", "cpu:3"]]),
        ("cpu:3", [["cpu", "cpu:1"]]),
        ("cpu:2", [["cpu", "cpu:1"]]),
    ],
)
def test_a_partner_without_room_is_left_out_of_a_run(room, caplog, full, teams):
    free, asked = room
    model = build("sd15")
    own, ours = sample(model, "sd15", cfg=5.0), patched(model, PAIRS)
    for short in (True, False):
        free.update({torch.device(full): 1e6}) if short else free.clear()
        caplog.clear(), asked.clear()
        assert (sample(ours, "sd15", cfg=5.0) - own).norm() < 0.05 * own.norm()
        report = report_of(ours)
        assert report.fallback is None and not report.failures
        found = [team.devices for team in report.teams]
        assert found == (teams if short else [["cpu", "cpu:1"], ["cpu:2", "cpu:3"]])
        told = any(f"{full}: room for 0 of 1" in line for line in caplog.messages)
        assert told == short, caplog.messages


def test_a_partner_needs_room_for_one_condition(room, monkeypatch):
    from comfy import model_management
    from comfy.sampler_helpers import estimate_memory

    free, _ = room
    model = build("sd15")
    several, one = estimate_memory(model, (1, 4, 8, 8), {})
    assert one < several
    monkeypatch.setattr(model_management, "minimum_inference_memory", lambda: 0.0)
    device = torch.device("cpu:1")
    free[device] = 1.1 * model.model_size() + (one + several) / 2
    ours, flat = patched(model, PAIR), patched(model, "cpu, cpu:1")
    sample(ours, "sd15", cfg=5.0), sample(flat, "sd15", cfg=5.0)
    check_shared(report_of(ours), PAIR)
    assert report_of(flat).ranks == 1
