"""What a graph may have: LoRA, masks, areas, ControlNet, functions, devices, samplers."""

from __future__ import annotations

import pytest
import torch
from comfy_parts import Hypernetwork, Replacement, control, copied, text, with_lora
from inprocess import build, check_parallel, sample

pytestmark = pytest.mark.usefixtures("host")


def exact(model, kind, change=None, devices=("cpu",) * 4, after=None, **given):
    """The report of a patched run that gives the bits of an untouched one.

    `change` makes the model that goes in; `after`, one that comes behind our node.
    """
    from parastep.comfy.node import of_model, patch

    after = after or (lambda model: model)
    model = model if change is None else change(model)
    own = sample(after(model), kind, **copied(given))
    ours = after(patch(model, list(devices), tolerance="rehearse"))
    found = sample(ours, kind, **copied(given))
    assert torch.equal(own, found) and own.isfinite().all()
    return of_model(ours).report


@pytest.mark.parametrize("order", ["before", "behind"])
def test_lora(order):
    given = {"change": with_lora} if order == "before" else {"after": with_lora}
    check_parallel(exact(build(), "sd15", **given))


def test_mask():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1.0
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    for sampler in ("euler", "euler_ancestral", "ddim"):
        given = {"latent": latent, "noise_mask": mask, "sampler": sampler}
        check_parallel(exact(build(), "sd15", **given))


def test_outside_of_the_mask_nothing_moves():
    from parastep.comfy.node import of_model, patch

    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 3:5, 3:5] = 1.0
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    for sampler, ranks in (("euler", 4), ("euler_ancestral", 4), ("euler", 1)):
        model = patch(build("flow"), ["cpu"] * ranks, tolerance=0.1)
        given = {"latent": latent, "noise_mask": mask, "sampler": sampler, "steps": 20}
        found = sample(model, "flow", scheduler="simple", **given)
        report = of_model(model).report
        assert report.rounds < report.steps and report.tolerance < 0.1 * (4 / 64) ** 0.5 + 1e-9
        frozen = (found - latent) * (1 - mask)
        assert frozen.abs().max() < 1e-4 * latent.abs().max()


def test_areas_and_times():
    area = text("sd15", 1, area=(4, 4, 0, 0), strength=1.0)
    check_parallel(exact(build(), "sd15", positive=[*text("sd15", 3), *area]))
    early = text("sd15", 1, start_percent=0.0, end_percent=0.5)
    late = text("sd15", 4, start_percent=0.5, end_percent=1.0)
    check_parallel(exact(build(), "sd15", positive=[*early, *late]))
    masked = text("sd15", 1, mask=torch.ones(1, 64, 64) * 0.5, mask_strength=1.0)
    check_parallel(exact(build(), "sd15", positive=[*text("sd15", 3), *masked]))


def test_controlnet():
    from parastep.comfy.node import of_model, patch

    def given():
        one = control()
        positive = text("sd15", 1, control=one, control_apply_to_uncond=False)
        return {"positive": positive, "negative": text("sd15", 2, control=one)}

    model = build()
    plain, own = sample(model, "sd15"), sample(model, "sd15", **given())
    assert not torch.equal(plain, own)
    ours = patch(model, ["cpu"] * 4, tolerance="rehearse")
    assert torch.equal(sample(ours, "sd15", **given()), own)
    check_parallel(of_model(ours).report)


def test_a_controlnet_without_a_copy_leaves_devices_out(caplog):
    """The host raises where a class of others has no way to copy itself to a device."""
    from parastep.comfy.node import of_model, patch

    def given():
        return {"positive": text("sd15", 1, control=control())}

    model = build()
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this version makes no clones for other devices")
    own = sample(model, "sd15", **given())
    ours = patch(model, ["cpu", "cpu:1", "cpu"], tolerance="rehearse")
    assert torch.equal(sample(ours, "sd15", **given()), own)
    report = of_model(ours).report
    check_parallel(report)
    assert report.ranks == 2
    assert any("cpu:1 is left out: the ControlNet Tiny" in line for line in caplog.messages)
    assert torch.equal(sample(ours, "sd15"), sample(model, "sd15"))
    assert of_model(ours).report.ranks == 3


def test_functions_of_the_model():
    def wrapped(model):
        model = model.clone()
        model.set_model_unet_function_wrapper(
            lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) * 1.01
        )
        return model

    def after_guidance(model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda given: given["denoised"] * 0.99)
        return model

    def rescaled(model):
        model = model.clone()
        model.set_model_sampler_cfg_function(
            lambda given: given["uncond"] + 2 * (given["cond"] - given["uncond"])
        )
        return model

    for change in (wrapped, after_guidance, rescaled):
        check_parallel(exact(build(), "sd15", change=change))


@pytest.mark.parametrize("devices", [["cpu"] * 3, ["cpu", "cpu:1", "cpu:2"]])
def test_hypernetworks(devices):
    patch = Hypernetwork()

    def with_patches(model):
        model = model.clone()
        model.set_model_attn1_patch(patch)
        model.set_model_attn2_patch(patch)
        return model

    model = build()
    assert not torch.equal(sample(model, "sd15"), sample(with_patches(model), "sd15"))
    for given in ({"change": with_patches}, {"after": with_patches}):
        check_parallel(exact(model, "sd15", devices=devices, **given))
        assert str(patch.device) == "cpu"  # a lane elsewhere has a copy


@pytest.mark.parametrize("devices", [["cpu"] * 3, ["cpu", "cpu:1", "cpu:2"]])
def test_a_replaced_attention(devices):
    patch = Replacement()

    def replaced(model):
        model = model.clone()
        model.set_model_attn2_replace(patch, "middle", 0)
        return model

    model = build()
    assert not torch.equal(sample(model, "sd15"), sample(replaced(model), "sd15"))
    for given in ({"change": replaced}, {"after": replaced}):
        check_parallel(exact(model, "sd15", devices=devices, **given))
        assert str(patch.device) == "cpu"


def test_two_patched_models_in_one_graph():
    """Each has its report, and neither touches the other's samples."""
    from parastep.comfy.node import of_model, patch

    first, second = build("eps"), build("flow")
    ours = [patch(model, ["cpu"] * 3, tolerance="rehearse") for model in (first, second)]
    for sampler in ("euler", "dpmpp_2m"):
        for kind, model, own in (("eps", ours[0], first), ("flow", ours[1], second)):
            given = {"sampler": sampler, "steps": 6 if kind == "eps" else 9}
            assert torch.equal(sample(model, kind, **given), sample(own, kind, **given))
    assert [of_model(model).report.steps for model in ours] == [6, 9]
    check_parallel(of_model(ours[0]).report)


def test_what_keeps_state_runs_serially():
    def counting(model):
        model, seen = model.clone(), 0

        def function(given):
            nonlocal seen
            seen += 1
            return given["denoised"] * (1 + 0.01 * (seen % 3))

        model.set_model_sampler_post_cfg_function(function)
        return model

    class Keeping:
        def __call__(self, given):
            self.last = given["denoised"]
            return self.last

    def keeping(model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(Keeping())
        return model

    from parastep.comfy.node import of_model, patch

    for change, words, ranks in ((counting, "'seen'", 4), (keeping, "'self.last'", 1)):
        own = sample(change(build("eps")), "eps")
        ours = patch(change(build("eps")), ["cpu"] * ranks)
        assert torch.equal(sample(ours, "eps"), own)
        report = of_model(ours).report
        assert words in report.fallback and report.rounds == report.steps
        assert sum(report.evaluations[1:]) == 0


def test_hooks_run_serially():
    import comfy.hooks

    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.WeightHook())
    hooks.hooks[0].weights = {}
    report = exact(build("eps"), "eps", positive=text("eps", 1, hooks=hooks))
    assert "hooks" in report.fallback


def test_a_sampler_that_is_no_function():
    import comfy.samplers

    from parastep.comfy import told
    from parastep.comfy.node import of_model, patch

    class Own(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *more, **others):
            return noise

    model = patch(build("eps"), ["cpu"] * 4)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(text("eps", 1), text("eps", 2))
    with torch.inference_mode():
        noise = torch.randn(1, 4, 8, 8)
        guider.sample(noise, torch.zeros_like(noise), Own(), torch.tensor([1.0, 0.5, 0.0]))
    report = of_model(model).report
    assert "the sampler Own has a loop of its own" in report.fallback and report.ranks == 1
    assert told(model)[0] == f"ran serially: {report.fallback}"


def test_a_sampler_that_cannot_be_tried_claims_no_ranks():
    from comfy.samplers import KSAMPLER, CFGGuider

    from parastep.comfy import told
    from parastep.comfy.node import of_model, patch

    def picky(model, x, sigmas, extra_args=None, callback=None, disable=None):
        if x.dtype != torch.float32 or x.shape[1:] != (4, 8, 8):
            raise ValueError("latents of another kind")
        return x - model(x, sigmas[0] * x.new_ones([len(x)]), **extra_args)

    model = patch(build("eps"), ["cpu"] * 4)
    guider = CFGGuider(model)
    guider.set_conds(text("eps", 1), text("eps", 2))
    noise = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        sigmas = torch.tensor([1.0, 0.5, 0.0])
        guider.sample(noise, torch.zeros_like(noise), KSAMPLER(picky), sigmas)
    report = of_model(model).report
    assert "a trial of the sampler" in report.fallback and "another kind" in report.fallback
    assert report.ranks == 1 and report.evaluations == [1] and "on 1 rank" in told(model)[0]


def test_replicas_on_other_devices(monkeypatch):
    """CPU devices with numbers stand for GPUs: the host clones the model onto each."""
    devices = ["cpu", "cpu:1", "cpu:2", "cpu:1"]
    check_parallel(exact(build("eps"), "eps", devices=devices))
    check_parallel(exact(build("eps"), "eps", devices=devices, after=with_lora))
    check_parallel(exact(build("sd15"), "sd15", devices=devices, change=with_lora))


def test_replicas_of_our_own_where_the_host_has_none():
    def without_factory(model):
        model = model.clone()
        model.cached_patcher_init = None
        return model

    devices = ["cpu", "cpu:1"]
    for after in (None, with_lora):
        check_parallel(exact(build("eps"), "eps", without_factory, devices, after))


def test_one_rank_is_the_host_alone():
    report = exact(build("eps"), "eps", devices=["cpu"])
    assert report.ranks == 1 and report.fallback is None


def test_the_report_in_words_and_as_an_image():
    import parastep
    from parastep.comfy import patch, told

    model = build("eps")
    with pytest.raises(parastep.InvalidError, match="put one in"):
        told(model)
    ours = patch(model, ["cpu"] * 3)
    with pytest.raises(parastep.StateError, match="behind a sampler"):
        told(ours)
    sample(ours, "eps")
    words, picture = told(ours.clone())
    assert "on 3 ranks" in words and "drift" in words
    assert picture.ndim == 4 and picture.shape[3] == 3 and 0 <= picture.min() < picture.max() <= 1
