"""Weights, adapters, hooks and schedulers changed after `parallelize`: seen at the next call."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import tiny  # noqa: E402
from diffusers.models.attention_processor import AttnProcessor  # noqa: E402
from hosting import (  # noqa: E402
    attributes,
    caught,
    distance,
    host,
    no_warnings,
    own,
    parallel,
    rounds_without_limit,
)

STEPS, RANKS = 5, 3
Change = Callable[[Any], Any]


def check(pipe: Any, exact: Any, fast: Any, case: tiny.Case) -> torch.Tensor:
    """Both parallel pipelines agree with the pipe as it is now, and no follower is left out."""
    alone = tiny.run(pipe, case.kwargs(steps=STEPS))
    with no_warnings():
        result = tiny.run(exact, case.kwargs(steps=STEPS))
        assert torch.equal(result, alone)
        assert exact.report.evaluations == [STEPS, STEPS - 1, STEPS - 2]
        result = tiny.run(fast, case.kwargs(steps=STEPS))
        assert fast.report.rounds == rounds_without_limit(STEPS, RANKS)
    assert distance(result, alone) < 0.4
    return alone


def check_changes(case: tiny.Case, *changes: Change, matter: bool = True) -> Any:
    """Every change in turn reaches the followers, and makes another picture."""
    pipe = case.build()
    exact, fast = parallel(pipe, RANKS), parallel(pipe, RANKS, math.inf)
    results = [check(pipe, exact, fast, case)]
    for change in changes:
        change(pipe)
        results.append(check(pipe, exact, fast, case))
        assert not matter or not torch.equal(results[-1], results[-2])
    return results


def weaker(pipe: Any) -> None:
    pipe.set_adapters(["tiny"], [0.3])


def test_lora_loaded_changed_fused_and_unloaded() -> None:
    results = check_changes(
        tiny.CASES["sd"],
        tiny.add_lora,
        weaker,
        lambda pipe: tiny.add_lora(pipe, "second", seed=1),
        lambda pipe: pipe.set_adapters(["tiny", "second"], [0.5, 0.5]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    )
    assert torch.equal(results[0], results[-1])


def test_lora_fused() -> None:
    case = tiny.CASES["sd_lora"]
    pipe = case.build()
    exact, fast = parallel(pipe, RANKS), parallel(pipe, RANKS, math.inf)
    for change in (pipe.fuse_lora, pipe.unfuse_lora, pipe.unload_lora_weights):
        change()
        check(pipe, exact, fast, case)


def test_lora_scaled_for_a_call() -> None:
    case, pipe = tiny.CASES["sd_lora"], tiny.CASES["sd_lora"].build()
    together = parallel(pipe, RANKS)
    for scale in (0.2, 1.0):
        kwargs = {"steps": STEPS, "cross_attention_kwargs": {"scale": scale}}
        with no_warnings():
            result = tiny.run(together, case.kwargs(**kwargs))
        assert torch.equal(result, tiny.run(pipe, case.kwargs(**kwargs)))
        assert together.report.evaluations == [5, 4, 3]


def test_lora_of_a_transformer() -> None:
    check_changes(tiny.CASES["flux"], tiny.add_lora, weaker)


def test_scale_of_an_ip_adapter() -> None:
    check_changes(
        tiny.CASES["sd_ip_adapter"],
        lambda pipe: pipe.set_ip_adapter_scale(0.2),
        lambda pipe: pipe.set_ip_adapter_scale(0.0),
        lambda pipe: pipe.set_ip_adapter_scale(0.7),
    )


def test_ip_adapter_loaded_later() -> None:
    case, with_image = tiny.CASES["sd"], tiny.CASES["sd_ip_adapter"]
    parts = host("sd_ip_adapter").components
    pipe = case.build()
    pipe.register_modules(
        image_encoder=parts["image_encoder"], feature_extractor=parts["feature_extractor"]
    )
    exact, fast = parallel(pipe, RANKS), parallel(pipe, RANKS, math.inf)
    check(pipe, exact, fast, case)
    tiny.add_ip_adapter(pipe)
    check(pipe, exact, fast, with_image)
    pipe.unload_ip_adapter()
    check(pipe, exact, fast, case)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_weights_edited(name: str) -> None:
    def add(pipe: Any) -> None:
        with torch.no_grad():
            pipe.unet.conv_out.weight.add_(0.1)

    def add_to_data(pipe: Any) -> None:
        pipe.unet.conv_in.weight.data.mul_(1.1)

    def new_data(pipe: Any) -> None:
        pipe.unet.conv_out.weight.data = pipe.unet.conv_out.weight.data * 0.8

    def new_parameter(pipe: Any) -> None:
        pipe.unet.conv_in.bias = torch.nn.Parameter(pipe.unet.conv_in.bias + 0.1)

    def load(pipe: Any) -> None:
        pipe.unet.load_state_dict(host(name).unet.state_dict())

    def new_module(pipe: Any) -> None:
        pipe.unet.conv_out = tiny.net(torch.nn.Conv2d, 16, 4, 3, padding=1)

    changes = (add, add_to_data, new_data, new_parameter, load, new_module)
    check_changes(tiny.CASES[name], *changes)


def test_other_module() -> None:
    def other_unet(pipe: Any) -> None:
        pipe.unet = tiny.sd_unet(attention_head_dim=4)

    def other_encoder(pipe: Any) -> None:
        torch.nn.init.normal_(pipe.text_encoder.get_input_embeddings().weight)

    check_changes(tiny.CASES["sd"], other_unet, other_encoder)


def test_forward_replaced() -> None:
    """By a user's own function, which the replicas share, as an attribute or for the class."""

    def on_instance(pipe: Any) -> None:
        original = pipe.unet.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return tuple(part * 0.9 for part in original(*args, **kwargs))

        pipe.unet.forward = forward

    def with_hook(pipe: Any) -> None:
        pipe.unet.register_forward_hook(lambda module, args, out: (out[0] * 1.1,))

    check_changes(tiny.CASES["sd"], on_instance, with_hook)


def test_forward_hooks_of_the_user_see_the_forwards_that_ran(tmp_path: Path) -> None:
    """They tell a file: one that appends to a list would be taken for a denoiser with state."""
    case, pipe, told = tiny.CASES["sd"], tiny.CASES["sd"].build(), tmp_path / "told"

    def tell(module: Any, args: Any) -> None:
        with told.open("a") as file:
            file.write("+" if module is pipe.unet else "-")

    pipe.unet.register_forward_pre_hook(tell)
    together = parallel(pipe, 4, math.inf)
    tiny.run(together, case.kwargs(steps=9))
    seen = told.read_text()
    assert seen.count("+") == together.report.rounds == 3
    assert len(seen) == sum(together.report.evaluations)


def test_switches_of_the_pipeline() -> None:
    check_changes(
        tiny.CASES["sd"],
        lambda pipe: pipe.enable_attention_slicing(1),
        lambda pipe: pipe.disable_attention_slicing(),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        lambda pipe: pipe.vae.enable_tiling(),
        lambda pipe: pipe.vae.enable_slicing(),
        lambda pipe: pipe.fuse_qkv_projections(),
        matter=False,
    )
    check_changes(
        tiny.CASES["sd"],
        lambda pipe: pipe.enable_freeu(s1=0.5, s2=0.2, b1=1.5, b2=1.6),
        lambda pipe: pipe.disable_freeu(),
    )


def test_settings_of_the_pipeline() -> None:
    def no_zero_prompt(pipe: Any) -> None:
        pipe.register_to_config(force_zeros_for_empty_prompt=False)

    sdxl = tiny.CASES["sdxl"]

    def args(batch: int, cond: int) -> dict[str, Any]:
        return {**sdxl.args(batch, cond), "negative_prompt": None}

    check_changes(tiny.Case("sdxl", sdxl.make, args), no_zero_prompt)


def test_tiled_decoder() -> None:
    case, pipe = tiny.CASES["sd"], tiny.CASES["sd"].build()
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size = 8
    alone = tiny.run(pipe, case.kwargs(steps=3, decode=True))
    with tiny.count_forwards(pipe.vae.decoder) as count:
        result = tiny.run(parallel(pipe, RANKS), case.kwargs(steps=3, decode=True))
    assert torch.equal(result, alone) and count.own == count.everywhere > 1


def test_scheduler_replaced_between_calls() -> None:
    def scheduler(name: str, **config: Any) -> Change:
        def change(pipe: Any) -> None:
            made = getattr(diffusers, name).from_config(pipe.scheduler.config, **config)
            pipe.scheduler = made

        return change

    def in_place(pipe: Any) -> None:
        pipe.scheduler.register_to_config(timestep_spacing="trailing")

    check_changes(
        tiny.CASES["sd"],
        scheduler("EulerDiscreteScheduler"),
        scheduler("DPMSolverMultistepScheduler"),
        scheduler("EulerDiscreteScheduler", use_karras_sigmas=True),
        in_place,
        scheduler("EulerAncestralDiscreteScheduler"),
    )


def test_hooks_that_a_pipeline_renews_in_its_call() -> None:
    """With model offload the pipeline takes its hooks off and puts them on at the call's end."""
    hooks = pytest.importorskip("accelerate.hooks")
    case, pipe = tiny.CASES["sd"], tiny.CASES["sd"].build()

    def renew(self: Any) -> None:
        hooks.remove_hook_from_module(self.unet)
        hooks.add_hook_to_module(self.unet, hooks.ModelHook())

    pipe.maybe_free_model_hooks = types.MethodType(renew, pipe)
    with caught():
        result = tiny.run(parallel(pipe, RANKS), case.kwargs(steps=3))
    assert torch.equal(result, own("sd", 3).result)
    assert pipe.unet._hf_hook is not None and pipe.unet.forward is not pipe.unet._old_forward
    assert "_call_impl" not in vars(pipe.unet)


def test_cache_of_diffusers_runs_serially() -> None:
    """It answers from the call before, which on a follower is another one."""
    case = tiny.CASES["flux"]
    pipe = case.build()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    alone = tiny.run(pipe, case.kwargs(steps=4))
    together = parallel(pipe, RANKS, math.inf)
    with caught() as texts:
        result = tiny.run(together, case.kwargs(steps=4))
    assert torch.equal(result, alone) and len(texts) == 1
    assert "hooks of diffusers" in together.report.fallback
    pipe.transformer.disable_cache()
    with no_warnings():
        tiny.run(together, case.kwargs(steps=4))
    assert together.report.rounds == 2


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_denoiser(in_place: bool) -> None:
    case, pipe = tiny.CASES["sd3"], tiny.CASES["sd3"].build()
    if in_place:
        pipe.transformer.compile(backend="eager", fullgraph=True)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    alone = tiny.run(pipe, case.kwargs(steps=4))
    before = attributes(pipe)
    with no_warnings():
        together = parallel(pipe, 2)
        result = tiny.run(together, case.kwargs(steps=4))
        assert torch.equal(result, alone) and together.report.evaluations == [4, 3]
        together = parallel(pipe, 2, math.inf)
        tiny.run(together, case.kwargs(steps=4))
        assert together.report.rounds == 3
    assert attributes(pipe) == before


def test_dtype_changed() -> None:
    case, pipe = tiny.CASES["sd"], tiny.CASES["sd"].build()
    together = parallel(pipe, RANKS)
    for dtype in (torch.bfloat16, torch.float32):
        together.to(dtype)
        with no_warnings():
            result = tiny.run(together, case.kwargs(steps=3, dtype=dtype))
        assert torch.equal(result, tiny.run(pipe, case.kwargs(steps=3, dtype=dtype)))
        assert result.dtype == dtype and together.report.evaluations == [3, 2, 1]
