"""`parallelize` itself: its arguments, the object it makes, what a user sees and hears."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import threading
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import tiny  # noqa: E402
from hosting import attributes, devices, host, no_warnings, own, parallel, threads  # noqa: E402

import parastep  # noqa: E402


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"devices": []}, ValueError, "devices"),
        ({"devices": "cpu"}, ValueError, "a list is needed"),
        ({"devices": ["nowhere"]}, parastep.DeviceError, "nowhere"),
        ({"devices": ["cuda:0", "cuda:1"]}, parastep.DeviceError, "pipe is on cpu"),
        ({"devices": ["cpu", "meta"]}, parastep.UnsupportedError, "CPU"),
        (
            {"devices": ["cpu", "cpu", "cpu:1", "cpu:1"], "slots": "batch"},
            parastep.UnsupportedError,
            "cpu, cpu:1: a batch is of one device",
        ),
        ({"devices": ["cpu"] * 257}, ValueError, "devices"),
        ({"tolerance": -0.1}, ValueError, "tolerance"),
        ({"tolerance": math.nan}, ValueError, "tolerance"),
        ({"policy": "fast"}, ValueError, "'verified' or 'paper'"),
        ({"max_stride": 0}, ValueError, "max_stride"),
        ({"warmup": 0}, ValueError, "warmup"),
        ({"order": 2}, ValueError, "order"),
        ({"mode": "fibers"}, ValueError, "'threads' or 'processes'"),
        ({"group": object()}, ValueError, "leave out devices"),
        ({"group": object(), "devices": None}, ValueError, "not a process group"),
        ({"slots": "all"}, ValueError, "'auto' or 'batch'"),
        ({"slots": "batch", "devices": None}, ValueError, "one device as often"),
        ({"slots": "batch", "mode": "processes"}, ValueError, "without group and mode"),
        ({"deadline": 0}, ValueError, "deadline"),
        ({"on_failure": "ignore"}, ValueError, "on_failure"),
    ],
)
def test_bad_options(change: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        parastep.parallelize(host("sd"), **{"devices": devices(2), **change})
    assert isinstance(caught.value, parastep.Error)


def test_an_option_of_another_kind() -> None:
    with pytest.raises(TypeError, match="max_stride"):
        parastep.parallelize(host("sd"), devices(2), max_stride=1.5)  # type: ignore[arg-type]


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="tolerence"):
        parastep.parallelize(host("sd"), devices(2), tolerence=0.1)  # type: ignore[call-arg]


def test_what_is_no_pipeline() -> None:
    class NoScheduler(diffusers.DiffusionPipeline):
        def __init__(self, unet: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet)

        def __call__(self) -> None: ...

    class NoModule(diffusers.DiffusionPipeline):
        def __init__(self, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(scheduler=scheduler)

        def __call__(self) -> None: ...

    unet, scheduler = host("sd").unet, host("sd").scheduler
    for pipe, text in (
        (NoScheduler(unet), "no scheduler"),
        (NoModule(scheduler), "no module"),
        (unet, "no scheduler"),
        (type(host("sd")), "not a diffusers pipeline"),
        ("sd", "not a diffusers pipeline"),
        (None, "not a diffusers pipeline"),
    ):
        with pytest.raises(parastep.InvalidError, match=text):
            parastep.parallelize(pipe, devices(2))


def test_devices_by_default_and_as_objects() -> None:
    """A pipe on the CPU has one device of its kind: one rank, the pipe itself."""
    case = tiny.CASES["sd"]
    alone = parastep.parallelize(host("sd"))
    with no_warnings():
        assert torch.equal(tiny.run(alone, case.kwargs(steps=3)), own("sd", 3).result)
    assert alone.report.evaluations == [3] and alone.report.ranks == 1
    two = parastep.parallelize(host("sd"), (torch.device("cpu"), "cpu"), tolerance="rehearse")
    assert torch.equal(tiny.run(two, case.kwargs(steps=3)), own("sd", 3).result)
    assert two.report.evaluations == [3, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"height": 33},
        {"prompt": 7},
        {"negative_prompt_embeds": 1},
        {"callback_on_step_end_tensor_inputs": ["nothing"]},
        {"generator": [torch.Generator()] * 3},
        {"latents": torch.zeros(1, 3)},
        {"output_type": "pt", "num_inference_steps": "many"},
    ],
)
def test_errors_of_the_pipeline_come_through_unchanged(change: dict[str, Any]) -> None:
    case, pipe = tiny.CASES["sd"], host("sd")
    before = attributes(pipe)
    with pytest.raises(Exception) as alone:
        pipe(**(case.kwargs() | change))
    together = parallel(pipe, 3)
    with no_warnings(), pytest.raises(alone.type) as ours:
        together(**(case.kwargs() | change))
    assert ours.type is alone.type
    assert str(ours.value).replace("ParallelPipeline", "") == str(alone.value)
    assert attributes(pipe) == before
    with no_warnings():
        assert torch.equal(tiny.run(together, case.kwargs(steps=3)), own("sd", 3).result)
    assert together.report.evaluations == [3, 2, 1]


def test_unknown_argument() -> None:
    for called in (host("flux"), parallel(host("flux"), 2)):
        with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
            called(**tiny.CASES["flux"].kwargs(), nonsense=1)


def test_positional_arguments() -> None:
    pipe = host("sd")
    results = []
    for called in (pipe, parallel(pipe, 2)):
        generator = torch.Generator().manual_seed(0)
        results.append(called("a cat", 32, 32, 4, generator=generator, output_type="latent").images)
    assert torch.equal(*results)
    with pytest.raises(TypeError, match="positional"):
        called(*range(60))


def test_attributes_go_both_ways() -> None:
    case, pipe = tiny.CASES["sd"], tiny.CASES["sd"].build()
    together = parallel(pipe, 3)
    assert together.unet is pipe.unet and together.components.keys() == pipe.components.keys()
    assert together.config is pipe.config and "StableDiffusion" in repr(together)
    assert {"unet", "report", "close"} <= set(dir(together))
    together.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler is together.scheduler
    together.note = "mine"
    assert pipe.note == "mine"
    del together.note
    assert not hasattr(pipe, "note")
    with pytest.raises(AttributeError, match="nothing"):
        _ = together.nothing
    assert together.to("cpu") is together and together.to(torch.float32) is together
    together.set_progress_bar_config(disable=True, desc="x")
    assert pipe._progress_bar_config["desc"] == "x"
    with no_warnings():
        result = tiny.run(together, case.kwargs(steps=3))
    assert torch.equal(result, tiny.run(pipe, case.kwargs(steps=3)))
    assert together.report.evaluations == [3, 2, 1]


def test_saved_and_made_into_another(tmp_path: Any) -> None:
    pipe, together = host("sd"), parallel(host("sd"), 2)
    tiny.run(together, tiny.CASES["sd"].kwargs(steps=2))
    together.unet.save_pretrained(tmp_path / "unet")
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), pipe.unet.parameters()))
    image = diffusers.StableDiffusionImg2ImgPipeline(**together.components)
    assert image.unet is pipe.unet
    assert copy.copy(together.unet) is not None


def test_close() -> None:
    case, pipe = tiny.CASES["sd"], host("sd")
    before = attributes(pipe)
    with parallel(pipe, 3) as together:
        tiny.run(together, case.kwargs(steps=2))
        report = together.report
    together.close()
    assert together.report is report and not together._ranks._replicas
    with pytest.raises(parastep.StateError, match="closed"):
        tiny.run(together, case.kwargs(steps=2))
    assert attributes(pipe) == before
    assert torch.equal(tiny.run(pipe, case.kwargs(steps=3)), own("sd", 3).result)
    again = parallel(pipe, 2)
    assert torch.equal(tiny.run(again, case.kwargs(steps=3)), own("sd", 3).result)


def test_two_at_once_on_one_pipe() -> None:
    """One parallel pipeline of another's pipe is as good as the first."""
    case, pipe = tiny.CASES["sd"], host("sd")
    first, second = parallel(pipe, 2), parallel(pipe, 3, math.inf)
    for _ in range(2):
        assert torch.equal(tiny.run(first, case.kwargs(steps=3)), own("sd", 3).result)
        tiny.run(second, case.kwargs(steps=7))
        assert second.report.rounds == 3 and first.report.rounds == 3


def test_report() -> None:
    together = parallel(host("sd"), 3, math.inf)
    assert together.report is None
    tiny.run(together, tiny.CASES["sd"].kwargs(steps=7))
    report = together.report
    assert (report.steps, report.ranks, report.rounds) == (7, 3, 3)
    assert report.accepted == [1, 3, 3] and report.answered == 4 and report.interpolated == 0
    assert report.evaluations == [3, 3, 3] and len(report.timeline) == 9
    assert [(r.rank, r.step) for r in report.timeline if r.rank == 1] == [(1, 0), (1, 2), (1, 5)]
    for record in report.timeline:
        assert 0 <= record.begin <= record.end <= report.seconds
        assert record.accepted == (record.step > 0 or record.rank == 0)
    assert sum(not math.isnan(drift) for drift in report.drift) == 4
    size = 1 * 4 * 16 * 16 * 4
    assert report.bytes_sent == 6 * 2 * size  # six evaluations of followers: points and outputs
    json.dumps(report.to_dict())
    assert "7 steps in 3 rounds on 3 ranks" in str(report)


def test_progress_bar_is_the_leaders(capsys: pytest.CaptureFixture[str]) -> None:
    case, pipe = tiny.CASES["sd"], tiny.CASES["sd"].build()
    bar = io.StringIO()
    pipe.set_progress_bar_config(disable=False, file=bar, mininterval=0.0, miniters=1)
    together = parallel(pipe, 4, math.inf)
    tiny.run(together, case.kwargs(steps=9))
    shown = bar.getvalue()
    assert "9/9" in shown and shown.count("\n") == shown.count(" 0/9") == 1
    assert pipe._progress_bar_config["disable"] is False
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


class Talking(diffusers.StableDiffusionPipeline):
    """Warns and logs, before the loop and in it."""

    def prepare_extra_step_kwargs(self, generator: Any, eta: Any) -> Any:
        warnings.warn("before the loop", UserWarning, stacklevel=2)
        logging.getLogger("diffusers.talking").warning("logged before the loop")
        return super().prepare_extra_step_kwargs(generator, eta)

    @property
    def interrupt(self) -> bool:
        warnings.warn("in the loop", UserWarning, stacklevel=2)
        logging.getLogger("diffusers.talking").warning("logged in the loop")
        return self._interrupt


@pytest.mark.parametrize("action", ["always", "default"])
def test_messages_come_once(action: Any) -> None:
    pipe = Talking(**host("sd").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    heard: list[logging.LogRecord] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record)

    root, here = logging.getLogger(), Listener()
    library = logging.getLogger("diffusers")
    together = parallel(pipe, 3)
    kept, level = library.propagate, library.level
    root.addHandler(here)
    library.propagate = True
    library.setLevel(logging.WARNING)  # whatever other tests of this process left
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter(action)
            show = warnings.showwarning
            tiny.run(together, tiny.CASES["sd"].kwargs(steps=4))
            assert warnings.showwarning is show
    finally:
        root.removeHandler(here)
        library.propagate = kept
        library.setLevel(level)
    texts = [str(w.message) for w in seen]
    assert texts.count("before the loop") == 1
    assert texts.count("in the loop") == (4 if action == "always" else 1)
    ours = [record for record in heard if "logged" in record.getMessage()]
    assert len(ours) == 1 + 4
    assert {record.threadName for record in ours} == {threading.current_thread().name}


def test_warning_points_at_the_users_line() -> None:
    together = parallel(host("kandinsky_ddpm"), 2)
    with pytest.warns(parastep.SerialWarning, match="variance of the noise") as seen:
        together(**tiny.CASES["kandinsky_ddpm"].kwargs(steps=2))
    assert [w.filename for w in seen if w.category is parastep.SerialWarning] == [__file__]


def test_nothing_of_the_thread_leaks() -> None:
    together = parallel(host("sd"), 3)
    before = (torch.get_num_threads(), torch.is_grad_enabled())
    tiny.run(together, tiny.CASES["sd"].kwargs(steps=3))
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before
    assert threads() == []
