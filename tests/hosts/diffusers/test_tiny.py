"""The tiny pipelines are fit to be hosts: repeatable, finite, and sensitive to all inputs."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import hosting  # noqa: E402
import tiny  # noqa: E402

MORE = [pytest.param(name, marks=pytest.mark.sweep) for name in tiny.MORE]


@pytest.fixture(params=[*tiny.CASES, *MORE], scope="module")
def host(request: pytest.FixtureRequest) -> tuple[tiny.Case, Any]:
    """Return a case and its pipeline."""
    return tiny.case_of(request.param), hosting.host(request.param)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def test_builds_are_equal(host: tuple[tiny.Case, Any]) -> None:
    case, pipe = host
    again = case.build()
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        assert not any(module.training for module in part.modules()), name
        other = getattr(again, name).state_dict()
        assert all(torch.equal(value, other[key]) for key, value in part.state_dict().items())


def test_calls_repeat_and_depend(host: tuple[tiny.Case, Any]) -> None:
    case, pipe = host
    steps = case.steps // 2
    with tiny.count_forwards(*tiny.denoisers(pipe)) as count:
        first = tiny.run(pipe, case.kwargs(steps=steps))
    assert count.own == count.everywhere >= steps * case.share
    assert first.isfinite().all()
    assert torch.equal(first, tiny.run(pipe, case.kwargs(steps=steps)))
    for change in ({"seed": 1}, {"cond": 1}):
        other = tiny.run(pipe, case.kwargs(steps=steps, **change))
        assert other.shape == first.shape
        assert rms(other - first) > 0.03 * rms(first), change


def test_batch_items_differ(host: tuple[tiny.Case, Any]) -> None:
    case, pipe = host
    if case.name in ("prx", "wan_vace"):
        pytest.skip("diffusers fails at more than one with guidance, or refuses")
    pair = tiny.run(pipe, case.kwargs(steps=2, batch=2))
    assert pair.shape[0] == 2
    assert rms(pair[0] - pair[1]) > 0.03 * rms(pair)


def test_decodes(host: tuple[tiny.Case, Any]) -> None:
    case, pipe = host
    if case.decoded is None:
        pytest.skip("no decoder")
    with tiny.count_forwards(tiny.decoder(pipe)) as count:
        latents = tiny.run(pipe, case.kwargs(steps=2))
        assert count.own == 0
        pixels = tiny.run(pipe, case.kwargs(steps=2, decode=True))
    assert count.own > 0
    assert pixels.shape != latents.shape
    assert pixels.float().std() > 0.01


def test_output_depends_on_time(host: tuple[tiny.Case, Any]) -> None:
    case, pipe = host
    model = tiny.denoisers(pipe)[0]
    calls: list[tuple[tuple, dict]] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    tiny.run(pipe, case.kwargs(steps=4))
    handle.remove()
    (args, kwargs), (last_args, last_kwargs) = calls[0], calls[-1]
    time = next((name for name in ("timestep", "timesteps") if name in kwargs), None)
    if time is not None:
        late = (args, kwargs | {time: last_kwargs[time]})
    else:
        late = ((args[0], last_args[1], *args[2:]), kwargs)
    with torch.no_grad():
        early_out = tiny.leaf(model(*args, **kwargs))
        late_out = tiny.leaf(model(*late[0], **late[1]))
    assert rms(late_out - early_out) > 0.01 * rms(early_out)
    assert 0.1 < rms(early_out) < 3.0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sd_controlnet", {"image": tiny.picture("other", 0, 1, 3, 32, 32)}),
        ("sd_ip_adapter", {"ip_adapter_image": tiny.picture("other", 0, 1, 3, 32, 32)}),
        ("sd_inpaint9", {"image": tiny.picture("other", 0, 1, 3, 32, 32)}),
        ("svd", {"image": tiny.picture("other", 0, 1, 3, 32, 32)}),
        ("sd3_slg", {"skip_guidance_layers": None}),
        ("flux_cfg", {"true_cfg_scale": 1.5}),
        ("hunyuanvideo", {"guidance_scale": 3.0}),
    ],
)
def test_argument_matters(name: str, change: dict[str, Any]) -> None:
    case = tiny.CASES[name]
    pipe = case.build()
    plain = tiny.run(pipe, case.kwargs(steps=4))
    other = tiny.run(pipe, case.kwargs(steps=4, **change))
    assert rms(other - plain) > 0.01 * rms(plain)


def test_lora_matters_and_unloads() -> None:
    case = tiny.CASES["sd_lora"]
    pipe = case.build()
    with_lora = tiny.run(pipe, case.kwargs(steps=4))
    tiny.add_lora(pipe, "second", seed=1)
    pipe.set_adapters(["second"])
    assert not torch.equal(with_lora, tiny.run(pipe, case.kwargs(steps=4)))
    pipe.unload_lora_weights()
    plain = tiny.run(tiny.CASES["sd"].build(), case.kwargs(steps=4))
    assert torch.equal(plain, tiny.run(pipe, case.kwargs(steps=4)))
    assert rms(with_lora - plain) > 0.01 * rms(plain)


def test_count_sees_copies_and_threads_but_no_skipped_forward() -> None:
    case = tiny.CASES["sd"]
    pipe = case.build()
    twin = copy.deepcopy(pipe)
    with tiny.count_forwards(pipe.unet) as count:
        thread = threading.Thread(target=tiny.run, args=(twin, case.kwargs(steps=2)))
        thread.start()
        thread.join()
        assert (count.own, count.everywhere) == (0, 2)
        tiny.run(pipe, case.kwargs(steps=3))
        assert (count.own, count.everywhere) == (3, 5)
        forward, answers = pipe.unet.forward, []

        def once(*args: Any, **kwargs: Any) -> Any:
            if not answers:
                answers.append(forward(*args, **kwargs))
            return answers[0]

        pipe.unet.forward = once
        tiny.run(pipe, case.kwargs(steps=3))
        assert (count.own, count.everywhere) == (4, 6)


def test_other_scheduler_and_dtype() -> None:
    case = tiny.CASES["sd"]
    pipe = case.build(scheduler=diffusers.DPMSolverMultistepScheduler, dtype=torch.bfloat16)
    assert type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler
    out = tiny.run(pipe, case.kwargs(steps=4, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
