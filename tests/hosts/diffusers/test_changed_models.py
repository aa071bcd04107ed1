"""A callback changes the model: the result is the host's, and nobody evaluates ahead from there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny  # noqa: E402
from hosting import caught, no_warnings, parallel  # noqa: E402
from tiny.stable import add_lora  # noqa: E402

from parastep.diffusers.changes import Changes, holders_in  # noqa: E402

CASE = tiny.CASES["sd"]
STEPS, AT = 12, 4


class Half(diffusers.models.attention_processor.AttnProcessor2_0):  # type: ignore[misc]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 0.2


@torch.no_grad()
def scale_weights(pipe: Any) -> None:
    pipe.unet.conv_out.weight.mul_(0.3)


def replace_data(pipe: Any) -> None:
    pipe.unet.conv_out.weight.data = pipe.unet.conv_out.weight.data * 0.3


def hook(pipe: Any) -> None:
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output: output * 0.5)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "unload": (lambda pipe: pipe.unload_lora_weights(), "unet"),
    "disable": (lambda pipe: pipe.disable_lora(), "an adapter"),
    "scale": (lambda pipe: pipe.set_adapters("a", 0.1), "an adapter"),
    "delete": (lambda pipe: pipe.delete_adapters("a"), "unet"),
    "fuse": (lambda pipe: pipe.fuse_lora(lora_scale=0.2), "an adapter"),
    "load": (lambda pipe: add_lora(pipe, "b", seed=3), "an adapter"),
    "freeu": (lambda pipe: pipe.enable_freeu(s1=0.1, s2=0.1, b1=1.8, b2=1.8), "unet.up_blocks.0"),
    "processors": (lambda pipe: pipe.unet.set_attn_processor(Half()), "attn1.processor"),
    "weights": (scale_weights, "unet.conv_out.weight"),
    "data": (replace_data, "unet.conv_out.weight"),
    "hook": (hook, "unet.mid_block._forward_hooks"),
    "unet": (lambda pipe: setattr(pipe, "unet", built().unet), "unet"),
    "scheduler": (lambda pipe: pipe.scheduler.set_timesteps(STEPS + 3), "scheduler"),
}


def built() -> Any:
    pipe = CASE.build()
    add_lora(pipe, "a")
    pipe.unet.eval()
    return pipe


def run(pipe: Any, change: Callable[[Any], Any]) -> Any:
    def callback(pipe: Any, step: int, time: Any, given: Any) -> Any:
        if step == AT:
            change(pipe)
        return given

    return tiny.run(pipe, CASE.kwargs(steps=STEPS, callback_on_step_end=callback))


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_ends_speculation(name: str) -> None:
    change, what = CHANGES[name]
    alone = run(built(), change)
    with parallel(built(), 3) as together, caught() as texts:
        assert torch.equal(run(together, change), alone)
    report = together.report
    assert report.fallback.startswith("the callback changed") and what in report.fallback
    assert len(texts) == 1 and not report.failures
    assert sum(report.evaluations) <= STEPS + 2 * (AT + 1)


def test_the_next_call_has_the_changed_model() -> None:
    change, _ = CHANGES["weights"]
    pipe, together = built(), parallel(built(), 3, math.inf)
    with caught():
        for each in (pipe, together):
            run(each, change)
    with no_warnings():
        run(together, lambda pipe: None)
    assert together.report.fallback is None and together.report.evaluations[1] > 0


def test_what_a_callback_does_beside_the_model() -> None:
    """It decodes previews, keeps notes, and sets to what it was."""
    notes = []

    def harmless(pipe: Any, step: int, time: Any, given: Any) -> Any:
        notes.append(pipe.vae.decode(given["latents"]).sample)
        pipe.notes = len(notes)
        pipe.unet.eval()
        pipe.set_adapters("a", 1.0)
        return given

    with parallel(built(), 3) as together, no_warnings():
        tiny.run(together, CASE.kwargs(steps=STEPS, callback_on_step_end=harmless))
    assert len(notes) == STEPS and together.report.evaluations[1] > 0


def test_names_of_what_has_changed() -> None:
    class Processor:
        def __init__(self) -> None:
            self.scale = [1.0]

    layer = torch.nn.Linear(2, 2)
    layer.processor = Processor()
    model = torch.nn.Sequential(layer, torch.nn.BatchNorm1d(2))
    changes = Changes(holders_in({"model": model}))

    def after(change: Callable[[], Any]) -> str | None:
        before = changes.look()
        change()
        return changes.changed(before)

    assert after(lambda: None) is None
    assert after(lambda: setattr(model[1], "momentum", float("0.1"))) is None
    assert after(lambda: setattr(model[1], "momentum", 0.2)) == "model.1.momentum"
    assert after(lambda: layer.processor.scale.__setitem__(0, 0.5)) == "model.0.processor.scale"
    assert after(lambda: model(torch.ones(3, 2))) == "model.1.num_batches_tracked"
    assert after(lambda: model.append(torch.nn.ReLU())) == "model"
