"""slots="batch": the ranks of one device evaluate a round's steps in one forward."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import tiny  # noqa: E402
from hosting import (  # noqa: E402
    attributes,
    caught,
    devices,
    distance,
    frozen,
    host,
    no_warnings,
    own,
    set_options,
    threads,
)

import parastep  # noqa: E402
from parastep.diffusers.batching import Meeting  # noqa: E402
from parastep.diffusers.forwards import Apart, Inputs  # noqa: E402

pytestmark = pytest.mark.timeout(300)
NAMES = ("sd", "sd3", "flux", "svd", "cogvideox_ddim", "audioldm2", "wan", "wan22", "sd_controlnet")
NAMES = tuple(name for name in NAMES if name in tiny.CASES)


def batch(pipe: Any, ranks: int = 3, tolerance: float = 0.0, **options: Any) -> Any:
    """At tolerance 0 rounds are run, and none of their answers is used."""
    how: Any = "rehearse" if tolerance == 0 else tolerance
    return parastep.parallelize(pipe, devices(ranks), tolerance=how, slots="batch", **options)


def call(name: str, steps: int, pipe: Any, **kwargs: Any) -> tuple[torch.Tensor, Any, Any]:
    """The result, the report, and the forwards that ran."""
    with tiny.count_forwards(*tiny.denoisers(host(name))) as count:
        result = tiny.run(pipe, tiny.CASES[name].kwargs(steps=steps, **kwargs))
    return result, pipe.report, count


def single(name: str, steps: int) -> int:
    """Forwards of one evaluation."""
    return own(name, steps).forwards // own(name, steps).steps


# ---- the result ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_tolerance_0_is_the_pipelines_own_result(name: str) -> None:
    """The leader evaluates for itself; all others in one batch, of which nothing is used."""
    alone, before = own(name, 7), attributes(host(name))
    kwargs = tiny.CASES[name].kwargs(steps=7)
    with no_warnings(), batch(host(name)) as together:
        with tiny.count_forwards(*tiny.denoisers(host(name))) as count:
            result = tiny.run(together, kwargs)
    report, n = together.report, alone.steps
    assert torch.equal(result, alone.result)
    assert torch.equal(kwargs["generator"].get_state(), alone.generator)
    assert frozen(host(name).scheduler) == alone.scheduler
    assert attributes(host(name)) == before and threads() == []
    assert report.rounds == n and report.evaluations == [n, n - 1, n - 2]
    assert report.unbatched is None and count.own == alone.forwards
    if name == "wan22":  # the second model is tried in a batch where it is first called
        assert report.forwards == 2 * n
    else:
        assert report.forwards == 2 * n - 1
        assert count.everywhere == single(name, 7) * report.forwards


@pytest.mark.parametrize(
    ("name", "max_stride"),
    [*((name, None) for name in NAMES), *((n, 1) for n in NAMES if n in ("sd", "flux", "wan22"))],
)
def test_as_good_as_ranks(name: str, max_stride: int | None) -> None:
    """The same rounds and, up to rounding, the same result; a round is one forward."""
    options = {"max_stride": max_stride, "tolerance": 0.02}
    with no_warnings():
        with parastep.parallelize(host(name), devices(3), **options) as apart:
            wanted, there, _ = call(name, 16, apart)
        with batch(host(name), **options) as together:
            found, here, count = call(name, 16, together)
    assert here.rounds == there.rounds and here.accepted == there.accepted
    assert here.evaluations == there.evaluations and here.interpolated == there.interpolated
    assert distance(found, wanted) < 1e-4 * own(name, 16).result.abs().max()
    assert here.unbatched is None and there.forwards == sum(there.evaluations)
    assert here.forwards <= here.rounds + 2
    if name != "wan22":  # its models are told apart by steps, not by rounds
        assert here.forwards == here.rounds + (max_stride == 1)
        assert count.everywhere == single(name, 16) * here.forwards


def test_a_trained_model_in_few_forwards() -> None:
    from parastep.demo import image

    pipe = image.MODEL.load()
    wanted = torch.as_tensor(pipe(**image.MODEL.arguments([7], 5, 50)).images)
    with batch(pipe, 4, 0.02) as together, no_warnings():
        found = torch.as_tensor(together(**image.MODEL.arguments([7], 5, 50)).images)
    report = together.report
    assert report.forwards == report.rounds < 25 and report.interpolated > 0
    assert (found - wanted).pow(2).mean() < 4 * 10**-3.8
    assert f"{report.forwards} forwards" in str(report)


def test_solvers_that_draw() -> None:
    name = "sd"
    pipe = tiny.CASES[name].build(scheduler=diffusers.EulerAncestralDiscreteScheduler)
    kwargs = [tiny.CASES[name].kwargs(steps=12) for _ in range(3)]
    alone = tiny.run(pipe, kwargs[0])
    with batch(pipe) as together, no_warnings():
        assert torch.equal(tiny.run(together, kwargs[1]), alone)
    with batch(pipe, tolerance=0.5) as together, no_warnings():
        found = tiny.run(together, kwargs[2])
    assert distance(found, alone) < 0.5 and together.report.rounds < 12
    assert together.report.forwards == together.report.rounds + 1


def test_calls_of_one_parallel_pipeline() -> None:
    """Other batch sizes, other lengths: each call is tried anew."""
    with batch(host("sd"), tolerance=0.05, max_stride=1) as together, no_warnings():
        for steps, size in ((5, 1), (8, 2), (5, 1)):
            given = tiny.CASES["sd"].kwargs(steps=steps, batch=size)
            wanted = tiny.run(host("sd"), tiny.CASES["sd"].kwargs(steps=steps, batch=size))
            assert distance(tiny.run(together, given), wanted) < 0.05
            assert together.report.forwards == together.report.rounds + 1 < steps + 2
            assert threads() == []


def test_one_device_once_is_a_single_lane() -> None:
    with batch(host("sd"), 1, 8.0) as together, no_warnings():
        _, report, count = call("sd", 20, together)
    assert report.forwards == report.rounds == count.everywhere < 20


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"devices": None}, parastep.InvalidError),
        ({"mode": "processes"}, parastep.InvalidError),
        ({"slots": "all"}, parastep.InvalidError),
    ],
)
def test_where_it_does_not_apply(options: dict[str, Any], error: type) -> None:
    with pytest.raises(error, match="slots"):
        parastep.parallelize(host("sd"), **{"devices": devices(2), "slots": "batch"} | options)


# ---- denoisers that take no batch ----------------------------------------------------------------


def changed(forward_of: Callable[[Any], Callable[..., Any]]) -> Any:
    """A pipeline whose denoiser has another forward, its replicas too."""
    pipe = tiny.CASES["sd"].build()
    cls = type(pipe.unet)
    pipe.unet.__class__ = type(cls.__name__, (cls,), {"forward": forward_of(cls.forward)})
    return pipe


def mixing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def mixed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)[0]
        return (output - 0.1 * output.mean(0, keepdim=True),)

    return mixed


def one_time(forward: Callable[..., Any]) -> Callable[..., Any]:
    def first(self: Any, sample: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, sample, timestep.reshape(-1)[0], *args, **kwargs)

    return first


def of_two(forward: Callable[..., Any]) -> Callable[..., Any]:
    def two(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if sample.shape[0] != 2:
            raise ValueError("two items, no more")
        return forward(self, sample, *args, **kwargs)

    return two


@pytest.mark.parametrize(
    ("forward_of", "reason"),
    [(mixing, "differs from that alone"), (one_time, "differs from that"), (of_two, "two items")],
)
@pytest.mark.parametrize("tolerance", [0.0, 8.0])
def test_one_by_one_with_the_reason(
    forward_of: Callable[..., Any], reason: str, tolerance: float
) -> None:
    """Noticed at step 0. One lane goes on, where it gains anything, since a batch gains nothing."""
    pipe, kwargs = changed(forward_of), tiny.CASES["sd"].kwargs
    wanted = tiny.run(pipe, kwargs(steps=20))
    with batch(pipe, 3, tolerance) as together:
        for _ in range(2):
            with caught() as texts:
                found = tiny.run(together, kwargs(steps=20))
            report = together.report
            assert reason in report.unbatched
            assert ("nobody is left" in (report.fallback or "")) == (tolerance == 0)
            assert texts and all("cannot share a batch" in text for text in texts)
            assert sorted(line.rank for line in report.failures) == [1, 2]
            assert threads() == []
    if tolerance == 0:
        assert torch.equal(found, wanted) and report.evaluations == [20, 1, 1]
        return
    with parastep.parallelize(pipe, devices(1), tolerance=tolerance) as lane:
        alone = tiny.run(lane, kwargs(steps=20))
    assert distance(found, alone) < 1e-6
    assert abs(report.rounds - lane.report.rounds) <= 2 and report.rounds < 20


class Scalars(diffusers.DiffusionPipeline):  # type: ignore[misc, name-defined]
    """Hands its denoiser the time as a number."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 20, generator: Any = None) -> Any:
        x = torch.randn(1, 4, 16, 16, generator=generator)
        text = torch.ones(1, 3, self.unet.config.cross_attention_dim)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            m = self.unet(x, t.item(), encoder_hidden_states=text, return_dict=False)[0]
            x = self.scheduler.step(m, t, x, return_dict=False)[0]
        return (x,)


@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_a_time_that_is_no_tensor(tolerance: float) -> None:
    """Not to be noticed at step 0, where all have the same one."""
    pipe = Scalars(host("sd").unet, diffusers.DDIMScheduler())
    wanted = pipe(generator=torch.Generator().manual_seed(3))[0]
    with batch(pipe, 3, tolerance, max_stride=1) as together, caught() as texts:
        found = together(generator=torch.Generator().manual_seed(3))[0]
    report = together.report
    assert "argument 2 of unet differs" in report.unbatched and len(texts) == 3
    assert "nobody is left" in report.fallback
    assert [line.rank for line in report.failures] == [1, 2]
    assert distance(found, wanted) <= tolerance and report.steps == 20
    if tolerance == 0:
        assert torch.equal(found, wanted)


def test_inputs_that_cannot_be_put_together() -> None:
    """What differs must have an axis of items; what does not is handed over once."""

    def inputs(rotary: float, time: float, items: int = 2) -> Inputs:
        latents = torch.full((items, 4, 8), time)
        given = {"timestep": torch.tensor(time), "rotary": (torch.full((5, 3), rotary),), "s": 2}
        return Inputs((latents,), given)

    joined = inputs(1.0, 7.0).joined([inputs(1.0, 6.0)])
    assert joined.kwargs["timestep"].tolist() == [7.0, 7.0, 6.0, 6.0]
    assert joined.args[0].shape == (4, 4, 8) and joined.kwargs["rotary"][0].shape == (5, 3)
    assert joined.kwargs["s"] == 2
    with pytest.raises(Apart, match=r"rotary\[0\] \(5, 3\)"):
        inputs(1.0, 7.0).joined([inputs(2.0, 6.0)])
    assert inputs(1.0, 7.0).unlike(inputs(1.0, 7.0, 3)) == "argument 1"
    assert inputs(1.0, 7.0).unlike(inputs(2.0, 6.0)) is None
    assert inputs(1.0, 7.0).equals(inputs(1.0, 7.0))
    assert not inputs(1.0, 7.0).equals(inputs(1.0, 6.0))


def test_settings_that_change_at_some_step() -> None:
    """A round across the change is two batches, or more; nobody leaves for it."""
    kwargs = {"controlnet_conditioning_scale": 1.0, "control_guidance_end": 0.5}
    given = tiny.CASES["sd_controlnet"].kwargs
    wanted = tiny.run(host("sd_controlnet"), given(steps=13, **kwargs))
    with batch(host("sd_controlnet"), 3, 0.0) as together, no_warnings():
        found = tiny.run(together, given(steps=13, **kwargs))
    assert torch.equal(found, wanted) and not together.report.failures


# ---- faults --------------------------------------------------------------------------------------


def ready(ranks: int = 4, tolerance: float = 0.0, **options: Any) -> Any:
    together = batch(host("sd"), ranks, tolerance, max_stride=1, **options)
    with no_warnings():
        tiny.run(together, tiny.CASES["sd"].kwargs(steps=1))
    return together


def poke_loop(together: Any, rank: int, iteration: int, fault: Callable[[], Any]) -> None:
    """What a rank's loop does at the end of an iteration, outside of its denoiser."""
    replica = together._ranks._replicas[rank]
    original = replica.progress_bar

    def progress_bar(*args: Any, **kwargs: Any) -> Any:
        bar, count = original(*args, **kwargs), [0]
        update = bar.update

        def counted(*args: Any) -> Any:
            count[0] += 1
            if count[0] == iteration:
                fault()
            return update(*args)

        bar.update = counted
        return bar

    replica.progress_bar = progress_bar


def explode() -> None:
    raise RuntimeError("out of cheese")


def check_next_call(together: Any) -> None:
    with no_warnings():
        result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=4))
    ranks = len(together.devices)
    assert together.report.evaluations[:2] == [4, 3] or together._options.tolerance > 0
    assert len(together._ranks._replicas) == ranks - 1 and together.report.unbatched is None
    assert distance(result, own("sd", 4).result) <= together._options.tolerance


@pytest.mark.parametrize("iteration", [1, 3])
@pytest.mark.parametrize("tolerance", [0.0, 0.5])
def test_a_rank_that_raises_before_the_meeting(iteration: int, tolerance: float) -> None:
    """The others do not wait for it, and go on in one batch."""
    together = ready(tolerance=tolerance)
    poke_loop(together, 2, iteration, explode)
    with caught() as texts:
        result, report, _ = call("sd", 10, together)
    assert len(texts) == 1 and "out of cheese" in texts[0]
    assert [line.rank for line in report.failures] == [2] and report.unbatched is None
    assert distance(result, own("sd", 10).result) <= tolerance
    if tolerance == 0:
        assert report.forwards == 19 and report.evaluations[:2] == [10, 9]
    else:
        assert report.forwards == report.rounds + 1 < 10
    check_next_call(together)


def test_a_denoiser_that_raises_in_a_batch() -> None:
    """Its steps are evaluated one by one in that round; the ranks leave after it."""
    together = ready()
    unet = together._ranks._replicas[1].unet
    forward, calls = unet.forward, [0]

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    unet.forward = faulty
    with caught() as texts:
        result, report, _ = call("sd", 8, together)
    assert torch.equal(result, own("sd", 8).result) and len(texts) == 4
    assert "nobody is left" in report.fallback
    assert "a batch raises RuntimeError: out of memory" in report.unbatched
    assert all("share a batch" in line.text for line in report.failures)
    check_next_call(together)


def test_a_rank_that_hangs_before_the_meeting() -> None:
    """It is lost at its deadline; the next call has all ranks again."""
    together = ready(deadline=2.0)
    stuck, done = together._ranks._replicas[2], [False]

    def hang() -> None:
        while not done[0]:
            time.sleep(0.01)

    poke_loop(together, 2, 2, hang)
    with caught() as texts:
        result, report, _ = call("sd", 8, together)
    done[0] = True
    lost = {line.rank: line.status for line in report.failures}
    assert torch.equal(result, own("sd", 8).result) and len(texts) == len(lost)
    assert lost[2] == "DEADLINE" and together._ranks._replicas.get(2) is not stuck
    set_options(together, deadline=None)
    check_next_call(together)


def test_nobody_waits_for_long() -> None:
    """One of three does not come: the two others share a batch without it."""
    meeting, calls, results = Meeting(3, leads=False), [], {}

    def run(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return x + time.reshape(-1, 1)

    def lane(rank: int) -> None:
        x = torch.full((1, 4), float(rank))
        results[rank] = meeting.call(rank, "unet", 0, True, run, (x, torch.tensor(0.5)), {})
        meeting.done(rank)

    meeting.open({1, 2, 3}, False, 0.2)
    for rank in (1, 2, 3):
        meeting.begin(rank, (2, 3, True))
    lanes = [threading.Thread(target=lane, args=(rank,)) for rank in (1, 2)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join(60)
    assert {rank: m.tolist() for rank, m in results.items()} == {1: [[1.5] * 4], 2: [[2.5] * 4]}
    assert calls == [(2, 4), (1, 4)]  # the second is to try the batch
    lane(3)
    assert results[3].tolist() == [[3.5] * 4] and meeting.unbatched is None


def test_the_leader_raises_while_others_wait_for_it() -> None:
    together, kwargs = ready(tolerance=0.5), tiny.CASES["sd"].kwargs

    def stop(pipe: Any, step: int, timestep: Any, given: Any) -> Any:
        if step == 3:
            raise KeyError("mine")
        return given

    with pytest.raises(KeyError, match="mine"):
        tiny.run(together, kwargs(steps=8, callback_on_step_end=stop))
    assert threads() == []
    check_next_call(together)


def test_a_callback_that_ends_speculation() -> None:
    """What followers cannot know of ends the batches too, and nobody waits for long."""
    together, kwargs = ready(tolerance=0.5), tiny.CASES["sd"].kwargs

    def turn(pipe: Any, step: int, timestep: Any, given: Any) -> Any:
        if step == 4:
            pipe._guidance_scale = 2.0
        return given

    wanted = tiny.run(host("sd"), kwargs(steps=10, callback_on_step_end=turn))
    with caught() as texts:
        found = tiny.run(together, kwargs(steps=10, callback_on_step_end=turn))
    assert "guidance_scale" in together.report.fallback and len(texts) == 1
    assert distance(found, wanted) < 0.5 and threads() == []
    check_next_call(together)
