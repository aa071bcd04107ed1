"""Ranks of several devices: forwards are shared out, and the picture is the one it would have been.

Calls that are foretold give the host's own bits, at tolerance 0 too; a batch that is cut gives them
up to rounding, and is cut above tolerance 0 alone.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import keepers  # noqa: E402
import tiny  # noqa: E402
import written  # noqa: E402
from hosting import (  # noqa: E402
    caught,
    distance,
    host,
    no_warnings,
    own,
    parallel,
    set_options,
    settle,
    threads,
)

import parastep  # noqa: E402
from parastep.diffusers import places  # noqa: E402
from parastep.diffusers.teams import helpers  # noqa: E402
from parastep.diffusers.teams.crew import Cuts  # noqa: E402
from parastep.diffusers.teams.team import Team  # noqa: E402
from parastep.diffusers.tensors import map_tensors  # noqa: E402

PAIR = ("cpu", "cpu")
STEPS = 6
CALLS, BATCH = "calls (bit for bit)", "batch (to rounding)"
# Their guidance is in the model, or off: one item a step.
WITHOUT = {"flux", "ltx_condition", "lcm", "sdxs"}


def pairs(pipe: Any, count: int = 1, tolerance: Any = 0, **options: Any) -> Any:
    options.setdefault("mode", "threads")
    return parastep.parallelize(pipe, [PAIR] * count, tolerance=tolerance, **options)


@pytest.mark.parametrize("name", tiny.CASES)
def test_a_pair_is_the_host_bit_for_bit(name: str) -> None:
    """At tolerance 0: calls are shared, batches are not, and both are named."""
    case = tiny.CASES[name]
    with pairs(host(name)) as together, no_warnings():
        for _ in range(2):
            assert torch.equal(tiny.run(together, case.kwargs()), own(name).result)
            (team,) = together.report.teams
            assert together.report.fallback is None and together.report.failures == []
            assert team.devices == ["cpu", "cpu"] and team.split in (None, CALLS)
            assert (team.shared > 0) == (team.split == CALLS) == (team.unsplit is None)
    assert threads() == []


@pytest.mark.parametrize("name", tiny.CASES)
def test_two_pairs_are_two_ranks(name: str) -> None:
    """The same rounds, and latents within rounding; the same bits where calls are shared."""
    case = tiny.CASES[name]
    with parastep.parallelize(host(name), ["cpu"] * 2) as ranks, caught():
        wanted = tiny.run(ranks, case.kwargs(steps=STEPS))
    with pairs(host(name), 2, "balanced") as together, caught():
        for number in range(2):
            found, report = tiny.run(together, case.kwargs(steps=STEPS)), together.report
            assert report.rounds == ranks.report.rounds and report.failures == []
            assert report.evaluations == ranks.report.evaluations
            kinds = {team.split for team in report.teams}
            busy = [t for t, n in zip(report.teams, report.evaluations) if n > 2]
            assert len({bool(team.shared) for team in busy}) <= 1, report
            assert distance(found, wanted) <= (1e-5 if BATCH in str(kinds) else 0.0)
            if number > 0 and kinds - {None}:  # no trial any more
                assert report.teams[0].whole <= STEPS


def test_a_trial_is_made_once() -> None:
    """Step 0 of the first call is evaluated whole beside it; later calls cut it at once."""
    with pairs(host("sd"), 1, "balanced") as together, no_warnings():
        for whole in (1, 0):
            tiny.run(together, tiny.CASES["sd"].kwargs(steps=STEPS))
            (team,) = together.report.teams
            assert (team.split, team.whole) == (BATCH, whole)
            assert team.shared == together.report.rounds - whole


@pytest.mark.parametrize("count", [2, 3, 5])
def test_teams_of_any_size(count: int) -> None:
    case = tiny.CASES["sd"]
    devices = ["cpu"] * count
    kwargs: dict[str, Any] = {"steps": STEPS, "num_images_per_prompt": 2}
    wanted = tiny.run(host("sd"), case.kwargs(**kwargs))
    options: dict[str, Any] = {"split": count, "tolerance": math.inf, "max_stride": 1}
    with parastep.parallelize(host("sd"), devices, **options) as together, no_warnings():
        found = tiny.run(together, case.kwargs(**kwargs))
        assert distance(found, wanted) < 1e-5
        assert together.report.teams[0].shared == STEPS - 1


def test_residuals_stay_where_they_were_made(monkeypatch: Any) -> None:
    """A helper is handed the very tensors that its ControlNet gave."""
    given: list[Any] = []
    served: list[Any] = []
    start, evaluated = helpers.LocalHelper.start, helpers.evaluated

    def started(helper: Any, name: str, inputs: Any, watched: bool = False) -> Any:
        if name == "unet":
            given.append(inputs.kwargs["down_block_additional_residuals"][0])
        return start(helper, name, inputs, watched)

    def watching(module: Any, *args: Any) -> Any:
        found = evaluated(module, *args)
        if "ControlNet" in type(module).__name__:
            served.append(found.output[0][0])
        return found

    case = tiny.CASES["sd_controlnet"]
    options: dict[str, Any] = {"tolerance": math.inf, "max_stride": 1, "mode": "threads"}
    two = [("cpu", "cpu:1")]  # another device, by its name
    with parastep.parallelize(host("sd_controlnet"), two, **options) as together, no_warnings():
        tiny.run(together, case.kwargs(steps=STEPS))
        monkeypatch.setattr(helpers.LocalHelper, "start", started)
        monkeypatch.setattr(helpers, "evaluated", watching)
        tiny.run(together, case.kwargs(steps=STEPS))
    assert len(given) == len(served) == STEPS
    assert all(ours is theirs for ours, theirs in zip(given, served))


# ---- what the host does meanwhile ----------------------------------------------------------------


def negative_embeds(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    if step == 2:
        given["negative_prompt_embeds"] = given["negative_prompt_embeds"] * 0.5
    return given


def guidance_off(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    if step == 2:
        pipe._guidance_scale = 1.0
    return given


def other_processors(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    if step == 2:
        pipe.transformer.proj_out.weight.data = pipe.transformer.proj_out.weight.data * 1.5
    return given


@pytest.mark.parametrize("tolerance", [0, "rehearse"])
@pytest.mark.parametrize("callback", [negative_embeds, guidance_off, other_processors])
def test_a_callback_that_changes_what_calls_are_given(callback: Any, tolerance: Any) -> None:
    case = tiny.CASES["wan"]
    given: dict[str, Any] = {
        "steps": STEPS,
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "negative_prompt_embeds"],
    }
    results, teams = [], []
    for count in (0, 1 if tolerance == 0 else 2):
        pipe = case.build()
        together = pairs(pipe, count, tolerance) if count else pipe
        with caught():
            results.append(tiny.run(together, case.kwargs(**given)))
        teams = together.report.teams if count else []
    assert torch.equal(*results)
    shared = {negative_embeds: STEPS - 2, guidance_off: 2, other_processors: 2}
    assert (teams[0].shared, teams[0].split) == (shared[callback], CALLS)
    assert teams[0].missed == (callback is not other_processors)


class Guided(written.Net):
    """Two branches; `shift` is what a loop may change between their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Identity()

    def forward(self, x: torch.Tensor, t: Any, by: float = 1.0) -> torch.Tensor:
        return self.last(super().forward(x, t)) * by


class Aside(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5


def guided(change: Callable[[Any, int], None], undo: Callable[[Any], None]) -> Any:
    """A loop of two calls a step, which alters its denoiser between them from step 3 on."""

    def loop(pipe: Any, steps: int, generator: Any) -> torch.Tensor:
        x = written.begin(pipe, steps, generator)
        for step, t in enumerate(pipe.scheduler.timesteps):
            first = pipe.denoiser(x, t)
            change(pipe, step)
            second = pipe.denoiser(x, t, by=0.8)
            undo(pipe)
            x = pipe.scheduler.step(second + 3 * (first - second), t, x).prev_sample
        return x

    return written.written(loop, Guided())


def patch(pipe: Any, step: int) -> None:
    own = type(pipe.denoiser.last).forward
    if step >= 3:
        vars(pipe.denoiser.last)["forward"] = lambda x: own(pipe.denoiser.last, x) * 0.5


def unpatch(pipe: Any) -> None:
    vars(pipe.denoiser.last).pop("forward", None)


def test_a_loop_that_alters_its_denoiser_between_two_calls() -> None:
    pipe = guided(patch, unpatch)
    wanted = pipe(generator=torch.Generator().manual_seed(0))
    with pairs(pipe) as together, caught():
        found = together(generator=torch.Generator().manual_seed(0))
        assert torch.equal(found, wanted)
        assert together.report.teams[0].shared <= 3


def test_pag_is_not_taken_for_guidance() -> None:
    """Its processors, which it puts in for the time of a call, know the branches of a batch."""
    pipe = tiny.CASES["sd"].build()
    pag = diffusers.StableDiffusionPAGPipeline(
        **pipe.components, requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    case = tiny.CASES["sd"]
    pag.set_progress_bar_config(disable=True)
    with pairs(pag, 1, math.inf, max_stride=1) as together, caught():
        for scale, guidance in ((0.0, 5.0), (3.0, 0.0), (3.0, 5.0), (0.0, 5.0)):
            given = {"pag_scale": scale, "guidance_scale": guidance, "steps": STEPS}
            wanted = tiny.run(pag, case.kwargs(**given))
            found = tiny.run(together, case.kwargs(**given))
            assert distance(found, wanted) < 1e-5
            (team,) = together.report.teams
            assert (team.shared > 0) == (scale == 0.0)
            assert scale == 0.0 or "alters its denoisers within its call" in team.unsplit


# ---- denoisers that keep something ---------------------------------------------------------------


@pytest.mark.parametrize("hang", list(keepers.KEEPERS))
def test_what_keeps_something_is_not_shared(hang: Any) -> None:
    """At tolerance 0: three calls, and the pipe alone after them, are the untouched pipe's."""
    case = tiny.CASES["sd"]
    results = []
    for with_team in (False, True):
        pipe = case.build()
        hang(pipe)
        together = pairs(pipe) if with_team else pipe
        with caught():
            results.append([tiny.run(together, case.kwargs(steps=4)) for _ in range(3)])
            results[-1].append(tiny.run(pipe, case.kwargs(steps=4)))
        if with_team:
            report = together.report
            assert keepers.KEEPERS[hang] in (report.fallback or report.teams[0].unsplit)
    assert all(map(torch.equal, *results))


def test_a_denoiser_that_draws() -> None:
    """The global generator is the head's alone."""
    case, found = tiny.CASES["wan"], []
    for with_team in (False, True):
        pipe = case.build()
        pipe.transformer.register_forward_hook(
            lambda m, a, out: tuple(part * (0.9 + 0.1 * torch.rand(())) for part in out)
        )
        together = pairs(pipe) if with_team else pipe
        with torch.random.fork_rng(devices=[]), caught():
            torch.manual_seed(5)
            found.append((tiny.run(together, case.kwargs(steps=4)), torch.get_rng_state()))
    assert all(map(torch.equal, *found))
    assert "draws random numbers" in together.report.teams[0].unsplit


# ---- who makes a rank ----------------------------------------------------------------------------


def test_auto_takes_pairs_where_the_call_is_guided() -> None:
    case = tiny.CASES["sd"]
    with parastep.parallelize(host("sd"), ["cpu"] * 4, split="auto") as together, no_warnings():
        for guidance, ranks in ((5.0, 2), (1.0, 4), (5.0, 2)):
            tiny.run(together, case.kwargs(steps=STEPS, guidance_scale=guidance))
            assert len(together.devices) == together.report.ranks == ranks
            assert f"{ranks} ranks" in repr(together)
            assert len(together.report.teams) == (2 if ranks == 2 else 0)


def test_auto_learns_where_guidance_makes_no_second_branch(monkeypatch: Any) -> None:
    """A model that takes its guidance as a number and does not say so: from the second call on."""
    monkeypatch.setattr("parastep.diffusers.run.guidance_of", lambda pipe, bound: ("scale", 3.5))
    with parastep.parallelize(host("flux"), ["cpu"] * 4, split="auto") as together, caught():
        for ranks in (2, 4):
            tiny.run(together, tiny.CASES["flux"].kwargs(steps=STEPS))
            assert together.report.ranks == ranks


@pytest.mark.parametrize(
    ("devices", "options", "words"),
    [
        (["cpu"] * 3, {"split": 2}, "no whole number of teams of 2"),
        (["cpu"] * 2, {"split": "some"}, "must be 'auto', 'none' or a team's size"),
        (["cpu"] * 2, {"split": 0}, "must be 'auto', 'none' or a team's size"),
        ([PAIR, PAIR], {"split": 2}, "are teams already"),
        ([PAIR, ()], {}, "a rank without a device"),
        ([PAIR, "cpu:x"], {}, "devices"),
        ([PAIR, ("cuda:0", "cpu")], {}, "all CPU, or all CUDA"),
        ([PAIR], {"slots": "batch"}, "leave out split"),
    ],
)
def test_devices_that_make_no_teams(devices: Any, options: Any, words: str) -> None:
    with pytest.raises(parastep.Error, match=words):
        parastep.parallelize(host("sd"), devices, **options)


def test_uneven_teams() -> None:
    """A rank of two devices beside one of one."""
    with parastep.parallelize(host("sd"), [PAIR, "cpu"]) as together, no_warnings():
        tiny.run(together, tiny.CASES["sd"].kwargs(steps=STEPS))
        assert [team.devices for team in together.report.teams] == [["cpu", "cpu"], ["cpu"]]
        assert together.report.ranks == 2


def test_a_second_call_on_the_same_modules_is_not_shared() -> None:
    case, inner = tiny.CASES["wan"], []
    pipe = case.build()
    other = diffusers.WanPipeline(**(pipe.components | {"scheduler": case.build().scheduler}))
    other.set_progress_bar_config(disable=True)

    def call_other(_: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            with pairs(other) as second, caught():
                inner.append(tiny.run(second, case.kwargs(steps=3)))
                assert "in use by another call" in second.report.fallback
        return given

    wanted = [tiny.run(pipe, case.kwargs(steps=n)) for n in (STEPS, 3)]
    with pairs(pipe) as together, no_warnings():
        found = tiny.run(together, case.kwargs(steps=STEPS, callback_on_step_end=call_other))
    assert torch.equal(found, wanted[0]) and torch.equal(inner[0], wanted[1])


def test_ranks_in_one_run_are_as_told() -> None:
    with parallel(host("sd"), 2, math.inf, split=None) as together:
        assert [len(share) for share in together._ranks.shares] == [1, 1]


def test_a_helper_slower_than_its_head_is_told() -> None:
    case = tiny.CASES["sd"]
    with pairs(host("sd"), 1, math.inf, max_stride=1) as together, caught():
        tiny.run(together, case.kwargs(steps=STEPS))
        module = together._ranks._replicas[1].unet
        handle = module.register_forward_pre_hook(lambda *given: time.sleep(0.3))
        settle(together._ranks._replicas[1])
        tiny.run(together, case.kwargs(steps=STEPS))
        assert together.report.teams[0].waited > 0.2 * (STEPS - 2)
        assert "a helper is slower than its head" in str(together.report)
        handle.remove()


# ---- helpers that are lost -----------------------------------------------------------------------


def explode(output: Any) -> Any:
    raise RuntimeError("out of cheese\nsecond line")


def not_finite(output: Any) -> Any:
    return map_tensors(lambda tensor: tensor * math.nan, output)


def another_form(output: Any) -> Any:
    return map_tensors(lambda tensor: tensor[..., :1], output)


def no_output(output: Any) -> Any:
    return "rubbish"


def too_late(output: Any) -> Any:
    time.sleep(4.0)
    return output


FAULTS = {
    explode: "RuntimeError: out of cheese",
    not_finite: "holds NaN or Inf",
    another_form: "does not fit",
    no_output: "does not fit",
    too_late: "no output within 1.5 s",
}


@contextlib.contextmanager
def poked(
    together: Any, place: int, number: int, fault: Callable[[Any], Any]
) -> Iterator[list[int]]:
    """Within, the number-th forward, from 0, of the replica at a place goes through a fault."""
    replica, calls = together._ranks._replicas[place], [0]
    (module,) = tiny.denoisers(replica)
    forward = module.forward

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        output = forward(*args, **kwargs)
        return fault(output) if calls[0] - 1 == number else output

    vars(module)["forward"] = faulty
    try:
        yield calls
    finally:
        del vars(module)["forward"]


def left() -> list[str]:
    """Threads of ours, after those that slept through their deadline have woken."""
    until = time.monotonic() + 10
    while threads() and time.monotonic() < until:
        time.sleep(0.05)
    return threads()


@pytest.mark.parametrize("number", [0, 2, 4])
@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize(("name", "count"), [("sd", 1), ("wan", 1), ("wan", 2)])
def test_a_lost_helper_costs_speed(name: str, count: int, fault: Any, number: int) -> None:
    """The leader's, or the only follower's: its rank goes on with the head alone."""
    case, wanted = tiny.CASES[name], own(name, STEPS).result
    tolerance = 0 if name == "wan" and count == 1 else "rehearse" if name == "wan" else math.inf
    options: dict[str, Any] = {"max_stride": 1, "deadline": 3.0 if fault is too_late else None}
    with pairs(host(name), count, tolerance, **options) as together:
        for _ in range(2):
            tiny.run(together, case.kwargs(steps=STEPS))
        with poked(together, 2 * count - 1, number, fault) as calls, caught() as texts:
            found = tiny.run(together, case.kwargs(steps=STEPS))
        report = together.report
        assert distance(found, wanted) <= (1e-5 if name == "sd" else 0.0)
        assert report.fallback is None and report.evaluations[0] == STEPS
        if number < calls[0]:
            (line,) = report.failures
            assert (line.rank, line.status) == (count - 1, "HELPER_LOST")
            assert FAULTS[fault] in line.text and "helper on cpu" in line.text
            assert report.teams[-1].shared <= number and len(texts) == 1
        else:
            assert report.failures == []
        with no_warnings():
            set_options(together, deadline=None)
            assert distance(tiny.run(together, case.kwargs(steps=STEPS)), wanted) <= 1e-5
            assert together.report.teams[-1].shared > 0
    assert left() == []


@pytest.mark.skipif("z_image" not in tiny.CASES, reason="not in this diffusers")
@pytest.mark.parametrize("fault", [not_finite, another_form])
def test_a_helper_that_gives_lists(fault: Any) -> None:
    """An entry for each item, of which a host may take any shape."""
    case = tiny.CASES["z_image"]
    with pairs(host("z_image"), 1, math.inf, max_stride=1) as together:
        for _ in range(2):
            tiny.run(together, case.kwargs(steps=STEPS))
        assert together.report.teams[0].shared == STEPS
        with poked(together, 1, 2, fault), caught():
            found = tiny.run(together, case.kwargs(steps=STEPS))
        assert distance(found, own("z_image", STEPS).result) <= 1e-5
        assert FAULTS[fault] in together.report.failures[0].text


def test_a_follower_that_lost_its_helper_is_left_out() -> None:
    """At its head's speed it would hold the others up, which can do without it."""
    case, wanted = tiny.CASES["wan"], own("wan", STEPS).result
    with pairs(host("wan"), 3, "rehearse", max_stride=1) as together:
        tiny.run(together, case.kwargs(steps=STEPS))
        with poked(together, 3, 1, explode), caught():
            assert torch.equal(tiny.run(together, case.kwargs(steps=STEPS)), wanted)
        report = together.report
        assert {line.rank for line in report.failures} == {1}
        assert report.evaluations[1] < report.evaluations[2] and report.fallback is None


def test_a_lost_helper_may_be_an_error() -> None:
    with pairs(host("wan"), 1, 0, on_failure="raise") as together:
        tiny.run(together, tiny.CASES["wan"].kwargs(steps=STEPS))
        with (
            poked(together, 1, 1, explode),
            pytest.raises(parastep.LostError, match="helper on cpu was lost"),
        ):
            tiny.run(together, tiny.CASES["wan"].kwargs(steps=STEPS))
        assert torch.equal(
            tiny.run(together, tiny.CASES["wan"].kwargs(steps=STEPS)), own("wan", STEPS).result
        )


def test_a_model_that_gives_nan_itself() -> None:
    """Its helpers are not to blame."""
    pipe = tiny.CASES["wan"].build()
    pipe.transformer.proj_out.bias.data[0] = math.nan
    with pairs(pipe, 1, 0) as together, caught():
        for _ in range(2):
            tiny.run(together, tiny.CASES["wan"].kwargs(steps=STEPS))
            assert together.report.failures == []


@pytest.mark.parametrize("count", [1, 2])
def test_interrupted(count: int) -> None:
    """Ctrl-C in a callback, while helpers evaluate: all leave, and the next call is as good."""
    case = tiny.CASES["wan"]

    def interrupt(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return given

    with pairs(host("wan"), count, "rehearse", max_stride=1) as together:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                tiny.run(together, case.kwargs(steps=STEPS, callback_on_step_end=interrupt))
            assert threads() == []
        with no_warnings():
            assert torch.equal(
                tiny.run(together, case.kwargs(steps=STEPS)), own("wan", STEPS).result
            )


def test_devices_of_one_kind_are_neighbours(monkeypatch: Any) -> None:
    """Where none are given: a team is as slow as its slowest, so like goes with like."""
    names = ["small", "big", "small", "big", "big"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    found = places._devices_of(torch.device("cuda", 1), None)
    assert [device.index for device in found] == [1, 3, 4, 0, 2]


def test_tolerance_0_needs_devices_of_one_kind() -> None:
    """Another kind of device rounds in another way, if not in this forward, then in the next."""
    devices = [torch.device("cpu"), torch.device("meta")]
    for exact in (True, False):
        team = Team(devices, [], Cuts(), exact, None)
        unsplit = team.record().unsplit or ""
        assert ("needs devices of one kind: cpu and meta" in unsplit) == exact
