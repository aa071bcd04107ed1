"""Callbacks of the user's: what they read is true, what they edit holds, whatever it is."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import tiny  # noqa: E402
from diffusers.callbacks import (  # noqa: E402
    MultiPipelineCallbacks,
    PipelineCallback,
    SDCFGCutoffCallback,
)
from hosting import caught, distance, host, no_warnings, parallel, rounds_without_limit  # noqa: E402

Kwargs = dict[str, Any]
Callback = Callable[[Any, int, Any, Kwargs], Kwargs]


def both(name: str, ranks: int, tolerance: float, **kwargs: Any) -> tuple[Any, Any, Any]:
    """The untouched result, the parallel one and its report, of a call with a callback."""
    case, pipe = tiny.CASES[name], host(name)

    def fresh() -> Kwargs:
        return case.kwargs(**{k: dict(v) if type(v) is dict else v for k, v in kwargs.items()})

    alone = tiny.run(pipe, fresh())
    together = parallel(pipe, ranks, tolerance)
    result = tiny.run(together, fresh())
    return alone, result, together.report


@pytest.mark.parametrize("name", ["sd", "flux", "cogvideox_dpm", "svd"])
def test_callback_sees_every_step_once(name: str) -> None:
    """With the true latents, on the user's own pipeline, in the caller's thread."""
    case, pipe = tiny.CASES[name], host(name)
    seen: list[tuple[Any, ...]] = []

    def look(owner: Any, step: int, timestep: Any, kwargs: Kwargs) -> Kwargs:
        seen.append((owner, step, float(timestep), kwargs["latents"].clone()))
        return kwargs

    kwargs = {"steps": 6, "callback_on_step_end": look}
    tiny.run(pipe, case.kwargs(**kwargs))
    with no_warnings():
        for tolerance in (0.0, math.inf):
            alone = seen[:6]
            together = parallel(pipe, 3, tolerance)
            tiny.run(together, case.kwargs(**kwargs))
            here = seen[6:]
            del seen[6:]
            assert len(here) == 6 and all(owner is pipe for owner, *_ in here)
            assert [line[1:3] for line in here] == [line[1:3] for line in alone]
            same = [torch.equal(a[3], b[3]) for a, b in zip(alone, here)]
            assert all(same) if tolerance == 0 else same[0]
    assert together.report.rounds == rounds_without_limit(6, 3)


def times(factor: float, at: int | None = None, *, in_place: bool = False) -> Callback:
    def edit(pipe: Any, step: int, timestep: Any, kwargs: Kwargs) -> Kwargs:
        if at is None or step == at:
            if in_place:
                kwargs["latents"].mul_(factor)
            else:
                kwargs["latents"] = kwargs["latents"] * factor
        return kwargs

    return edit


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("at", [None, 4])
@pytest.mark.parametrize(
    "name", [n for n in ("sd", "flux", "cogvideox_ddim", "z_image") if n in tiny.CASES]
)
def test_edited_latents(name: str, at: int | None, in_place: bool) -> None:
    edit = times(0.9, at, in_place=in_place)
    with no_warnings():
        alone, result, report = both(name, 3, 0.0, steps=8, callback_on_step_end=edit)
        assert torch.equal(result, alone) and report.evaluations == [8, 7, 6]
        alone, result, report = both(name, 3, 0.05, steps=8, callback_on_step_end=edit)
        assert distance(result, alone) < 0.05
        # The edit is seen as drift, which without a limit is no reason to evaluate.
        alone, result, report = both(name, 3, math.inf, steps=8, callback_on_step_end=edit)
    assert distance(result, alone) < 0.5 and report.rounds < 8


@pytest.mark.parametrize("name", [n for n in ("sd", "flux") if n in tiny.CASES])
@pytest.mark.parametrize("max_stride", [1, None])
def test_a_tiny_edit_is_evaluated(name: str, max_stride: int | None) -> None:
    """However small it is beside the tolerance; one in every step is drift like any other."""
    case, pipe = tiny.CASES[name], host(name)

    def run(edit: Callback) -> Any:
        edited = parallel(pipe, 3, 100.0, max_stride=max_stride)
        tiny.run(edited, case.kwargs(steps=20, callback_on_step_end=edit))
        return edited.report

    def own(report: Any) -> set[int]:
        """Steps that the leader evaluated at the host's own latent."""
        begins = {sum(report.accepted[:k]) for k in range(report.rounds)}
        return begins & {line.step for line in report.timeline if line.rank == 0 and line.accepted}

    assert all(at + 1 in own(run(times(1 + 1e-5, at))) for at in (4, 7, 12, 15))
    assert run(times(1 + 1e-5, None)).rounds < 20


def test_edit_shows_as_drift_of_its_step() -> None:
    drifts = []
    for factor in (1.0, 0.2):
        _, _, report = both("sd", 4, math.inf, steps=13, callback_on_step_end=times(factor, 6))
        drifts.append(report.drift)
        assert report.rounds == rounds_without_limit(13, 4)
    assert drifts[0][6] == drifts[1][6] and drifts[1][7] > 3 * drifts[0][7]


def test_edited_latents_that_the_denoiser_does_not_show() -> None:
    """LTX hands its transformer packed latents of all frames, of which step gets some: an edit is
    known by the callback alone. One costs a round, one in every step all speculation.
    """
    with no_warnings():
        for tolerance in (0.0, math.inf):
            edit = times(0.9, 4)
            alone, result, report = both(
                "ltx_i2v", 3, tolerance, steps=12, callback_on_step_end=edit
            )
            assert torch.equal(result, alone) == (tolerance == 0)
        assert report.rounds == 1 + 2 + 1 + 2 and distance(result, alone) < 0.1
    with caught() as texts:
        kwargs = {"steps": 6, "callback_on_step_end": times(0.9)}
        alone, result, report = both("ltx_i2v", 3, math.inf, **kwargs)
    assert torch.equal(result, alone) and report.rounds == 6
    assert len(texts) == 1 and "cannot be seen" in texts[0]


def set_guidance(value: float, at: int) -> Callback:
    def edit(pipe: Any, step: int, timestep: Any, kwargs: Kwargs) -> Kwargs:
        if step == at:
            pipe._guidance_scale = value
        return kwargs

    return edit


def zero_embeddings(pipe: Any, step: int, timestep: Any, kwargs: Kwargs) -> Kwargs:
    if step == 3:
        kwargs["prompt_embeds"] = torch.zeros_like(kwargs["prompt_embeds"])
    return kwargs


def halve_embeddings_in_place(pipe: Any, step: int, timestep: Any, kwargs: Kwargs) -> Kwargs:
    if step == 3:
        kwargs["prompt_embeds"].mul_(0.5)
    return kwargs


def change_attention(pipe: Any, step: int, timestep: Any, kwargs: Kwargs) -> Kwargs:
    pipe._cross_attention_kwargs["scale"] = 1.0 if step < 3 else 0.3
    return kwargs


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (set_guidance(1.5, 3), "guidance_scale"),
        (zero_embeddings, "prompt_embeds"),
        (halve_embeddings_in_place, "prompt_embeds"),
        (change_attention, "cross_attention_kwargs"),
        (SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3), "guidance_scale"),
        (MultiPipelineCallbacks([SDCFGCutoffCallback(0.5)]), "guidance_scale"),
        (functools.partial(set_guidance(1.5, 3)), "guidance_scale"),
    ],
)
def test_edited_settings_end_speculation(edit: Any, what: str) -> None:
    """Followers know nothing of them: from there on the leader is alone, and its result right."""
    kwargs: Kwargs = {"callback_on_step_end": edit, "cross_attention_kwargs": {"scale": 1.0}}
    if not hasattr(edit, "tensor_inputs"):
        kwargs["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]
    for tolerance in (0.0, math.inf):
        with caught() as texts:
            alone, result, report = both("sd_lora", 3, tolerance, steps=9, **kwargs)
        assert what in report.fallback and len(texts) == 1 and what in texts[0]
        assert report.accepted[-3:] == [1, 1, 1] and not report.failures
        if tolerance == 0:
            assert torch.equal(result, alone) and report.rounds == 9
        else:
            assert distance(result, alone) < 0.3 and report.rounds < 9


def test_settings_that_followers_do_not_follow_matter() -> None:
    """Else the test above would pass whatever the callback does."""
    case, pipe = tiny.CASES["sd"], host("sd")
    plain = tiny.run(pipe, case.kwargs(steps=9))
    for edit in (set_guidance(1.5, 3), zero_embeddings):
        names = ["latents", "prompt_embeds"]
        kwargs = {"callback_on_step_end": edit, "callback_on_step_end_tensor_inputs": names}
        assert distance(tiny.run(pipe, case.kwargs(steps=9, **kwargs)), plain) > 0.005


def test_scale_of_an_adapter_changed_in_a_callback() -> None:
    def turn_down(pipe: Any, step: int, timestep: Any, kwargs: Kwargs) -> Kwargs:
        if step == 3:
            pipe.set_adapters(["tiny"], [0.2])
        return kwargs

    case = tiny.CASES["sd_lora"]
    pipe = case.build()
    for tolerance in (0.0, math.inf):
        pipe.set_adapters(["tiny"], [1.0])
        alone = tiny.run(pipe, case.kwargs(steps=8, callback_on_step_end=turn_down))
        pipe.set_adapters(["tiny"], [1.0])
        together = parallel(pipe, 3, tolerance)
        result = tiny.run(together, case.kwargs(steps=8, callback_on_step_end=turn_down))
        assert "adapter" in together.report.fallback
        assert torch.equal(result, alone) if tolerance == 0 else distance(result, alone) < 0.3


def test_what_a_callback_keeps_on_the_pipe_is_its_own_business() -> None:
    """A counter on the pipeline that the pipeline's code never reads ends nothing."""

    def count(pipe: Any, step: int, timestep: Any, kwargs: Kwargs) -> Kwargs:
        pipe.steps_seen = step
        return kwargs

    with no_warnings():
        _, _, report = both("sd", 3, math.inf, steps=7, callback_on_step_end=count)
    assert host("sd").steps_seen == 6 and report.rounds == rounds_without_limit(7, 3)
    del host("sd").steps_seen


def test_callback_object_of_ones_own() -> None:
    class Counting(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipe: Any, step: int, timestep: Any, kwargs: Kwargs) -> Kwargs:
            self.count = getattr(self, "count", 0) + 1
            return kwargs

    callback = Counting()
    with no_warnings():
        _, _, report = both("sd", 3, math.inf, steps=7, callback_on_step_end=callback)
    assert callback.count == 14 and report.rounds == rounds_without_limit(7, 3)
    assert type(callback) is Counting


@pytest.mark.parametrize("name", ["sd", "audioldm2", "stable_audio"])
def test_legacy_callback(name: str) -> None:
    seen = []

    def look(step: int, timestep: Any, latents: torch.Tensor) -> None:
        seen.append(step)
        if step == 3:
            latents.mul_(0.9)

    for tolerance in (0.0, math.inf):
        with no_warnings():
            kwargs = {"callback": look, "callback_steps": 1}
            alone, result, report = both(name, 3, tolerance, steps=6, **kwargs)
        assert seen == [*range(6), *range(6)]
        seen.clear()
        if tolerance == 0:
            assert torch.equal(result, alone) and report.rounds == 6
        else:
            assert report.rounds == 3 and distance(result, alone) < 0.5


@pytest.mark.parametrize("at", [0, 3])
def test_interrupt_flag(at: int) -> None:
    """The pipeline skips the rest of its loop, and nobody waits for it."""

    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: Kwargs) -> Kwargs:
        pipe._interrupt = step >= at
        return kwargs

    for tolerance in (0.0, math.inf):
        with no_warnings():
            alone, result, report = both(
                "sd", 3, tolerance, steps=9, callback_on_step_end=interrupt
            )
        assert report.steps == at + 1 and report.fallback is None
        assert torch.equal(result, alone) if tolerance == 0 else distance(result, alone) < 0.5
        _, _, report = both("sd", 3, tolerance, steps=3)
        assert report.steps == 3


@pytest.mark.parametrize("at", [0, 2])
def test_exception_in_a_callback(at: int) -> None:
    class Own(Exception):
        pass

    def fail(pipe: Any, step: int, timestep: Any, kwargs: Kwargs) -> Kwargs:
        if step == at:
            raise Own("enough")
        return kwargs

    case, pipe = tiny.CASES["sd"], host("sd")
    together = parallel(pipe, 3)
    with pytest.raises(Own, match="enough"):
        together(**case.kwargs(callback_on_step_end=fail))
    assert together.report.steps == at + 1 and not together.report.failures
    assert not [t for t in threading.enumerate() if t.name.startswith("parastep-")]
    assert "step" not in vars(pipe.scheduler) and "forward" not in vars(pipe.unet)
    with no_warnings():
        result = tiny.run(together, case.kwargs(steps=4))
    assert torch.equal(result, tiny.run(pipe, case.kwargs(steps=4)))


def test_pipeline_called_in_its_own_callback() -> None:
    """The parallel one refuses; the plain one may, and speculation ends."""
    case, pipe = tiny.CASES["sd"], host("sd")
    together = parallel(pipe, 3)
    errors = []

    def again(owner: Any, step: int, timestep: Any, kwargs: Kwargs) -> Kwargs:
        try:
            together(**case.kwargs(steps=2))
        except Exception as error:
            errors.append(type(error).__name__)
        return kwargs

    result = tiny.run(together, case.kwargs(steps=3, callback_on_step_end=again))
    assert errors == ["StateError"] * 3 and together.report.rounds == 3
    assert torch.equal(result, tiny.run(pipe, case.kwargs(steps=3)))
