"""Denoisers that keep something from call to call run serially, with the reason; others do not."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import keepers  # noqa: E402
import tiny  # noqa: E402
import written  # noqa: E402
from hosting import caught, devices, distance, no_warnings, parallel, threads  # noqa: E402
from tiny.stable import sd_parts  # noqa: E402

import parastep  # noqa: E402
from parastep.diffusers.state import _Look, averages  # noqa: E402

CASE, STEPS = tiny.CASES["sd"], keepers.STEPS
Hang = Callable[[Any], None]


def with_hung(hang: Hang) -> Any:
    pipe = CASE.build()
    hang(pipe)
    return pipe


def results(pipe: Any, seeds: Any = range(3)) -> list[torch.Tensor]:
    return [tiny.run(pipe, CASE.kwargs(steps=STEPS, seed=seed)) for seed in seeds]


def check_serial(hang: Hang, together: Any, pipe: Any, reason: str) -> None:
    """Three calls, and the pipe alone after them, are those of a pipe that we never saw."""
    wanted = results(with_hung(hang), range(4))
    for seed in range(3):
        with caught() as texts:
            found = results(together, [seed])[0]
        report = together.report
        assert reason in (report.fallback or ""), report.fallback
        assert torch.equal(found, wanted[seed]) and report.failures == [] and len(texts) == 1
        assert report.evaluations == [STEPS, *[0] * (len(together.devices) - 1)]
    assert torch.equal(results(pipe, [3])[0], wanted[3])


@pytest.mark.parametrize("tolerance", ["rehearse", 0.02])
@pytest.mark.parametrize("hang", keepers.KEEPERS)
def test_a_denoiser_that_keeps_something(hang: Hang, tolerance: Any) -> None:
    pipe = with_hung(hang)
    before = identities(pipe)
    with parallel(pipe, 3, tolerance) as together:
        check_serial(hang, together, pipe, keepers.KEEPERS[hang])
        assert not together._ranks._replicas
    changed = {key for key, value in identities(pipe).items() if before.get(key) != value}
    assert {key for _, key in changed} <= {"count", "seen", "kept", "average"}


@pytest.mark.parametrize("options", [{"slots": "batch"}, {"mode": "processes"}, {"one": True}])
def test_wherever_its_ranks_are(options: dict[str, Any]) -> None:
    hang, alone = keepers.processors_share_a_controller, options.pop("one", False)
    pipe = with_hung(hang)
    with parastep.parallelize(pipe, devices(1 if alone else 3), **options) as together:
        check_serial(hang, together, pipe, keepers.KEEPERS[hang])


@pytest.mark.parametrize("tolerance", ["rehearse", 0.02])
def test_state_that_begins_in_mid_run(tolerance: Any) -> None:
    """Seen after the first evaluation that leaves something; the calls after that are serial."""
    wanted = results(with_hung(keepers.begins_late))
    with parallel(with_hung(keepers.begins_late), 3, tolerance) as together:
        with caught() as texts:
            first = results(together, [0])[0]
        assert "kept of forward in keepers.py" in together.report.fallback and len(texts) == 1
        assert 1 < together.report.evaluations[1] < STEPS
        assert distance(first, wanted[0]) < (1e-9 if tolerance == "rehearse" else 0.02)
        with caught():
            assert all(torch.equal(*pair) for pair in zip(results(together, [1, 2]), wanted[1:]))


def test_a_part_that_is_swapped_in_mid_run() -> None:
    """By a hook that nothing tells of before: seen where the leader does it."""
    wanted = results(with_hung(keepers.swaps_a_part_late), [0])
    with parallel(with_hung(keepers.swaps_a_part_late), 3) as together, caught() as texts:
        assert torch.equal(results(together, [0])[0], wanted[0])
        assert "unet.conv_out was changed while the denoiser ran" in together.report.fallback
    assert len(texts) == 1


@pytest.mark.parametrize("tolerance", ["rehearse", 0.02])
def test_weights_that_are_written_to_in_mid_run(tolerance: Any) -> None:
    """Ranks of one device do it to their own, so that the user's are written to by the host."""
    alone, pipe = with_hung(keepers.writes_weights_late), with_hung(keepers.writes_weights_late)
    wanted = results(alone, [0])[0]
    with parallel(pipe, 3, tolerance) as together, caught():
        found = results(together, [0])[0]
        assert "unet.conv_out.weight was changed while the denoiser ran" in together.report.fallback
    assert distance(found, wanted) < (1e-9 if tolerance == "rehearse" else 0.02)
    if tolerance == "rehearse":
        assert torch.equal(alone.unet.conv_out.weight, pipe.unet.conv_out.weight)


def test_random_draws_of_any_kind() -> None:
    """The global generator is the leader's alone: no follower draws from it."""
    found = []
    for pipe in (with_hung(keepers.draws), parallel(with_hung(keepers.draws), 3)):
        with torch.random.fork_rng(devices=[]), caught() as texts:
            torch.manual_seed(5)
            found.append((results(pipe, [0])[0], torch.get_rng_state()))
    assert all(map(torch.equal, *found))
    assert any("draws random numbers" in text for text in texts)


@pytest.mark.parametrize("hang", keepers.PURE)
def test_foreign_code_that_keeps_nothing(hang: Hang, looks: list[Any]) -> None:
    """Parallel, the first call too, in which alone it is looked at."""
    check_parallel(with_hung(hang), CASE)
    assert len(looks) == (0 if hang is keepers.compiled_in_place else 2)


@pytest.mark.parametrize("name", ["sd_lora", "sd_ip_adapter"])
def test_adapters_are_no_state(name: str, looks: list[Any]) -> None:
    check_parallel(tiny.CASES[name].build(), tiny.CASES[name])
    assert looks == []


def test_a_denoiser_of_ones_own(looks: list[Any]) -> None:
    with parallel(written.written(written.plain), 3, math.inf) as together, no_warnings():
        for _ in range(3):
            together(generator=torch.Generator().manual_seed(1))
            assert together.report.rounds == 4 and together.report.fallback is None
    assert len(looks) == 1


@pytest.fixture
def looks(monkeypatch: Any) -> list[Any]:
    """One for each first evaluation that was the leader's alone."""
    seen, own = [], _Look.begin
    monkeypatch.setattr(_Look, "begin", lambda look: (seen.append(look), own(look)))
    return seen


def check_parallel(pipe: Any, case: tiny.Case) -> None:
    wanted, before = tiny.run(pipe, case.kwargs(steps=STEPS)), identities(pipe)
    with parallel(pipe, 3) as exact, parallel(pipe, 3, math.inf) as fast, no_warnings():
        for _ in range(2):
            assert torch.equal(tiny.run(exact, case.kwargs(steps=STEPS)), wanted)
            assert exact.report.evaluations == [STEPS, STEPS - 1, STEPS - 2]
            tiny.run(fast, case.kwargs(steps=STEPS))
            assert fast.report.rounds == 1 + math.ceil((STEPS - 1) / 3) < STEPS
            assert fast.report.fallback is None
    assert identities(pipe) == before


def test_foreign_code_that_cannot_be_looked_at() -> None:
    class Odd:
        @property
        def __dict__(self) -> Any:
            raise RuntimeError("not for you")

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def __call__(self, module: Any, args: Any, output: Any) -> None:
            pass

    pipe = CASE.build()
    pipe.unet.register_forward_hook(Odd())
    with parallel(pipe, 3) as together, caught():
        assert torch.equal(*results(together, [0]), *results(CASE.build(), [0]))
    assert together.report.fallback.endswith("cannot be read: RuntimeError: not for you")


def test_a_guider_of_ones_own() -> None:
    """One that averages is found, one that does not runs in parallel."""
    case = tiny.CASES["hunyuanvideo15"]

    class Averaging(diffusers.ClassifierFreeGuidance):
        before: Any = None

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            now = output.pred
            output.pred = now if self.before is None else 0.7 * now + 0.3 * self.before
            self.before = now
            return output

    class Other(diffusers.ClassifierFreeGuidance):
        pass

    for kind, reason in ((Averaging, "a guider that keeps what it computed (before"), (Other, "")):
        pipe = case.build()
        pipe.guider = kind(guidance_scale=4.0)
        with parallel(pipe, 2, math.inf) as together, caught():
            found = tiny.run(together, case.kwargs(steps=STEPS))
        assert reason in (together.report.fallback or "")
        assert (together.report.fallback is None) == (kind is Other)
        alone = case.build()
        alone.guider = kind(guidance_scale=4.0)
        assert (
            distance(found, tiny.run(alone, case.kwargs(steps=STEPS))) < (reason == "") * 0.5 + 1e-9
        )


def test_what_is_made_once_is_no_state() -> None:
    """It is seen in the first call, and found harmless in the next."""
    pipe = CASE.build()
    pipe.unet.conv_out = keepers.Table(pipe.unet.conv_out)
    with parallel(pipe, 3, math.inf) as together:
        with caught():
            results(together, [0])
        assert "Table" in together.report.fallback
        with no_warnings():
            results(together, [1, 2])
        assert together.report.fallback is None and together.report.rounds < STEPS


def test_a_hook_that_is_taken_away() -> None:
    pipe = CASE.build()
    with parallel(pipe, 3, math.inf) as together:
        for _ in range(2):
            handle = pipe.unet.register_forward_hook(counting())
            with caught():
                results(together, [0])
            assert together.report.evaluations == [STEPS, 0, 0]
            handle.remove()
            with no_warnings():
                results(together, [0])
            assert together.report.rounds < STEPS


def counting() -> Any:
    n: list[int] = []
    return lambda *_: n.append(1)


# ---- what is left behind -------------------------------------------------------------------------


def identities(pipe: Any, *names: str) -> dict[tuple[str, str], Any]:
    """Every attribute of every module, with what is in its dicts, by identity."""
    found = {}
    for name in names or pipe.components:
        component = getattr(pipe, name)
        for path, part in getattr(component, "named_modules", lambda: ())():
            for key, value in vars(part).items():
                inner = value.items() if type(value) in (dict, OrderedDict) else ()
                found[f"{name}.{path}", key] = id(value), tuple((k, id(v)) for k, v in inner)
    return found


@pytest.mark.parametrize("fault", ["callback", "first forward", "later forward"])
def test_a_run_that_ends_early_leaves_the_modules_as_they_were(fault: str) -> None:
    pipe, kwargs, at = CASE.build(), CASE.kwargs(steps=STEPS), [0]

    def end(*given: Any) -> Any:
        at[0] += 1
        if at[0] == (1 if fault == "first forward" else 3):
            raise KeyError("enough")
        return given[-1] if len(given) == 4 else None

    keepers.hook_that_scales(pipe)
    if fault == "callback":
        kwargs["callback_on_step_end"] = end
    else:
        pipe.unet.conv_out.register_forward_pre_hook(end)
    before = identities(pipe)
    with parallel(pipe, 3) as together, caught():
        with pytest.raises(KeyError, match="enough"):
            tiny.run(together, kwargs)
        assert identities(pipe) == before and threads() == []


def pag() -> Any:
    pipe = diffusers.StableDiffusionPAGPipeline(**sd_parts(), pag_applied_layers=["mid", "up"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_modules_altered_in_a_call_and_put_back_at_its_end(mode: str) -> None:
    """PAG on and off: followers, which never come to the end of a call, are put back too."""
    alone, pipe = pag(), pag()
    with parallel(pipe, 3, mode=mode) as together, no_warnings():
        kept = None
        for scale in (3.0, 0.0, 3.0, 0.0):
            kwargs = {"steps": STEPS, "pag_scale": scale}
            wanted = tiny.run(alone, CASE.kwargs(**kwargs))
            assert torch.equal(tiny.run(together, CASE.kwargs(**kwargs)), wanted)
            assert together.report.evaluations == [STEPS, STEPS - 1, STEPS - 2]
            now = [identities(replica, "unet") for replica in together._ranks._replicas.values()]
            assert kept in (None, now)
            kept = now


# ---- averages of the loop's ----------------------------------------------------------------------


def test_momentum_of_the_loop() -> None:
    def call(self: Any, num_inference_steps: int = 9, generator: Any = None) -> torch.Tensor:
        momentum = None
        x = written.begin(self, num_inference_steps, generator)
        for t in self.scheduler.timesteps:
            m = self.denoiser(x, t)
            momentum = m if momentum is None else 0.7 * m + 0.3 * momentum
            x = self.scheduler.step(momentum, t, x).prev_sample
        return x

    pipe = written.written(written.plain)
    pipe.__class__ = type("Momentum", (type(pipe),), {"__call__": torch.no_grad()(call)})
    wanted = pipe(generator=torch.Generator().manual_seed(1))
    with parallel(pipe, 3, 0.02) as together, caught() as texts:
        found = together(generator=torch.Generator().manual_seed(1))
    assert torch.equal(found, wanted) and len(texts) == 1
    assert "its loop averages over the outputs of earlier steps (momentum)" in texts[0]


@pytest.mark.skipif(not hasattr(diffusers, "AceStepPipeline"), reason="an older diffusers")
def test_a_pipeline_of_diffusers_with_momentum_in_its_loop() -> None:
    """Where it guides; its distilled models do not."""
    for guided in (True, False):
        own = {"do_classifier_free_guidance": guided}
        pipe = object.__new__(type("Ace", (diffusers.AceStepPipeline,), own))
        assert (averages(pipe) is not None) == guided


def test_a_guider_with_momentum() -> None:
    case = tiny.CASES["hunyuanvideo15"]
    pipe = case.build()
    pipe.guider = diffusers.AdaptiveProjectedGuidance(
        guidance_scale=4.0, adaptive_projected_guidance_momentum=-0.5
    )
    wanted = tiny.run(pipe, case.kwargs(steps=4))
    with parallel(pipe, 2, 0.02) as together, caught():
        assert torch.equal(tiny.run(together, case.kwargs(steps=4)), wanted)
    assert together.report.fallback == "its guider averages over the outputs of earlier steps"
