"""Several sampling loops in one call: a run for each, and a report that adds them up."""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import hosting  # noqa: E402
import tiny  # noqa: E402
from chunked import chunked  # noqa: E402
from hosting import caught, distance, no_warnings  # noqa: E402

import parastep  # noqa: E402
from parastep.diffusers.follower import Follower  # noqa: E402
from parastep.diffusers.replicas import AsMade  # noqa: E402

STEPS, LOOPS = 12, 3
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),  # draws in every step
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(),  # remembers outputs
}


def result_of(pipe: Any, **options: Any) -> Any:
    return pipe(generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize(
    ("name", "extra", "mode"),
    [(name, extra, "threads") for name in SCHEDULERS for extra in (False, True)]
    + [(name, False, "processes") for name in ("ddim", "ddpm")],
)
def test_every_loop_is_a_run(name: str, extra: bool, mode: str) -> None:
    """Rehearsed, as it comes, and without a limit, three calls each; a denoiser that is called
    after the last step too changes no count.
    """
    pipe = chunked(SCHEDULERS[name]())
    alone = result_of(pipe, extra=extra)
    for tolerance in ("rehearse", "balanced", math.inf):
        options = {"mode": mode, "tolerance": tolerance, "max_stride": 1}
        with parastep.parallelize(pipe, ["cpu"] * 3, **options) as together:
            for _ in range(3):
                with no_warnings():
                    result = result_of(together, extra=extra)
                report = together.report
                assert report.steps == sum(report.accepted) == LOOPS * STEPS
                assert report.evaluations[0] == report.rounds and len(report.drift) == report.steps
                if tolerance == "rehearse":
                    assert torch.equal(result, alone) and report.rounds == LOOPS * STEPS
                    each = [STEPS, STEPS - 1, STEPS - 2]
                    assert report.evaluations == [LOOPS * count for count in each]
                elif tolerance == "balanced":
                    assert distance(result, alone) < 0.02 and report.rounds < LOOPS * STEPS
                else:
                    assert report.rounds == LOOPS * (1 + math.ceil((STEPS - 1) / 3))
                steps = [record.step for record in report.timeline if record.accepted]
                assert sorted(set(steps)) == list(range(LOOPS * STEPS))


@pytest.mark.parametrize("ranks", [1, 3])
def test_lanes_and_strides(ranks: int) -> None:
    """Steps are left out in every loop, on one device too."""
    pipe = chunked(SCHEDULERS["ddim"]())
    alone = result_of(pipe, num_inference_steps=30)
    with parastep.parallelize(pipe, ["cpu"] * ranks) as together, no_warnings():
        results = [result_of(together, num_inference_steps=30) for _ in range(3)]
    report = together.report
    assert report.rounds < LOOPS * 30 and report.interpolated > 10
    assert all(torch.equal(result, results[0]) for result in results)
    assert distance(results[0], alone) < 0.02


@pytest.mark.parametrize("at", [5, STEPS + 3, 2 * STEPS + 5])
def test_a_follower_that_fails_in_some_loop(at: int) -> None:
    """It is told of once, left out of the later loops too, and there again in the next call."""
    pipe = chunked(SCHEDULERS["ddim"]())
    alone = result_of(pipe)
    together = parastep.parallelize(pipe, ["cpu"] * 3, tolerance="rehearse")
    result_of(together)
    calls, forward = [], type(pipe.unet).forward
    unet = together._ranks._replicas[1].unet

    def failing(x: Any, t: Any) -> Any:
        calls.append(t)
        if len(calls) == at:
            raise RuntimeError("on purpose")
        return forward(unet, x, t)

    unet.forward = failing
    replica = together._ranks._replicas[1]
    type(replica).as_made = AsMade(replica)  # which a follower that goes back restores
    with caught() as texts:
        assert torch.equal(result_of(together), alone)
    assert [line.rank for line in together.report.failures] == [1] and len(texts) == 1
    assert together.report.evaluations[2] > 2 * (STEPS - 2)
    with no_warnings():
        assert torch.equal(result_of(together), alone)
    assert together.report.evaluations[1] == LOOPS * (STEPS - 1)


def test_a_worker_that_dies_between_loops(monkeypatch: Any) -> None:
    pipe = chunked(SCHEDULERS["ddim"]())
    alone = result_of(pipe)
    with parastep.parallelize(
        pipe, ["cpu"] * 3, mode="processes", tolerance="rehearse"
    ) as together:
        result_of(together)
        worker = together._ranks._remote._workers[1]._process
        encode, calls = pipe.text_encoder.forward, []

        def killing(x: Any) -> Any:
            calls.append(x)
            if len(calls) == 2:  # the first loop is over
                os.kill(worker.pid, signal.SIGKILL)
            return encode(x)

        monkeypatch.setattr(pipe.text_encoder, "forward", killing)
        with caught() as texts:
            assert torch.equal(result_of(together), alone)
        assert [line.rank for line in together.report.failures] == [1] and len(texts) == 1
        monkeypatch.undo()
        with no_warnings():
            assert torch.equal(result_of(together), alone)
        assert together.report.evaluations[1] == LOOPS * (STEPS - 1)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_batches_in_every_loop(name: str, extra: bool) -> None:
    """Lanes meet in each of them; forwards are as many as rounds, but for what is called beside."""
    pipe = chunked(SCHEDULERS[name]())
    alone = result_of(pipe, extra=extra)
    for tolerance in ("rehearse", math.inf):
        options = {"slots": "batch", "tolerance": tolerance, "max_stride": 1}
        with parastep.parallelize(pipe, ["cpu"] * 3, **options) as together:
            for _ in range(3):
                with no_warnings():
                    result = result_of(together, extra=extra)
                report = together.report
                assert report.unbatched is None and not report.failures
                assert report.steps == sum(report.accepted) == LOOPS * STEPS
                if tolerance == "rehearse":  # the leader's own are no part of batches
                    assert distance(result, alone) < 1e-5 and report.rounds == LOOPS * STEPS
                    assert report.forwards == LOOPS * (STEPS + STEPS - 1)
                else:  # but for step 0, which is evaluated alone and once more in a batch
                    assert report.rounds == LOOPS * (1 + math.ceil((STEPS - 1) / 3))
                    assert report.forwards == report.rounds + LOOPS


@pytest.mark.parametrize("at", range(LOOPS))
def test_a_lane_that_fails_in_some_loop(at: int, monkeypatch: Any) -> None:
    """The others meet without it from there on, in later loops too."""
    pipe = chunked(SCHEDULERS["ddim"]())
    alone = result_of(pipe)
    together = parastep.parallelize(pipe, ["cpu"] * 3, tolerance="rehearse", slots="batch")
    result_of(together)
    set_timesteps = Follower._set_timesteps

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.rank == 2 and len(self.call.loops) >= at:
            raise RuntimeError("on purpose")
        return set_timesteps(self, *args, **kwargs)

    monkeypatch.setattr(Follower, "_set_timesteps", failing)
    with caught() as texts:
        assert distance(result_of(together), alone) < 1e-5
    report = together.report
    assert [line.rank for line in report.failures] == [2] and len(texts) == 1
    assert report.evaluations[1] == LOOPS * (STEPS - 1) and report.unbatched is None
    assert report.evaluations[2] <= (at + 1) * (STEPS - 2)


@pytest.mark.parametrize("mode", ["threads", "processes"])
@pytest.mark.parametrize(
    ("name", "tolerance"), [("skyreels_df_long", "rehearse"), ("freeinit", 1e-9)]
)
def test_teams_in_every_loop(name: str, tolerance: Any, mode: str) -> None:
    """Calls and batches are shared out in each loop, at the leader and its follower."""
    if name not in tiny.SEVERAL:
        pytest.skip("diffusers has no such pipeline")
    case, pipe = tiny.SEVERAL[name], hosting.host(name)
    alone = tiny.run(pipe, case.kwargs(steps=8))
    options = {"mode": mode, "tolerance": tolerance}
    with parastep.parallelize(pipe, [("cpu", "cpu")] * 2, **options) as together:
        for _ in range(2):
            with no_warnings():
                result = tiny.run(together, case.kwargs(steps=8))
        report = together.report
    assert torch.equal(result, alone) or (
        tolerance != "rehearse" and distance(result, alone) < 1e-4
    )
    assert report.fallback is None
    assert report.evaluations == [case.loops * 8, case.loops * 7]
    for team in report.teams:
        assert {share.step // 8 for share in team.served} == set(range(case.loops))


def test_later_loops_that_cannot_be_carried() -> None:
    pipe = chunked(SCHEDULERS["ddim"]())
    alone = result_of(pipe, within=True)
    together = parastep.parallelize(pipe, ["cpu"] * 3, tolerance="rehearse")
    for _ in range(3):
        with caught():
            assert torch.equal(result_of(together, within=True), alone)
        assert "second sampling loop" in together.report.fallback
        assert "calls an encoder at its steps" in together.report.fallback


@pytest.mark.parametrize("name", tiny.SEVERAL)
def test_pipelines_of_several_loops(name: str) -> None:
    """Those of diffusers: chunks, sections and segments of a video, FreeInit."""
    case, pipe = tiny.SEVERAL[name], hosting.host(name)
    alone = tiny.run(pipe, case.kwargs(steps=8))
    for tolerance in ("rehearse", "balanced"):
        with parastep.parallelize(pipe, ["cpu"] * 3, tolerance=tolerance) as together:
            with no_warnings():
                result = tiny.run(together, case.kwargs(steps=8))
            report, steps = together.report, 8 * case.loops
            assert report.steps == sum(report.accepted) == steps
            if tolerance == "rehearse":
                assert torch.equal(result, alone)
                assert report.evaluations == [case.loops * count for count in (8, 7, 6)]
            else:
                assert distance(result, alone) < 0.02 and report.rounds < steps


@pytest.mark.parametrize("name", ["deepfloyd_if", "kandinsky_ddpm"])
def test_without_learned_variance_as_the_reason_says(name: str) -> None:
    case = tiny.CASES[name]
    pipe = case.build()
    assert pipe.scheduler.config.variance_type == "learned_range"
    config = pipe.scheduler.config
    pipe.scheduler = diffusers.DDPMScheduler.from_config(config, variance_type="fixed_small")
    alone = tiny.run(pipe, case.kwargs(steps=6))
    with parastep.parallelize(pipe, ["cpu"] * 3, tolerance="rehearse") as together, no_warnings():
        assert torch.equal(tiny.run(together, case.kwargs(steps=6)), alone)
        assert together.report.evaluations == [6, 5, 4] and together.report.fallback is None
