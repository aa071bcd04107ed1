"""Whatever a follower does, the picture comes out, at tolerance 0 the host's own; nobody hangs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import tiny  # noqa: E402
from crowded import Crowded  # noqa: E402
from hosting import (  # noqa: E402
    attributes,
    caught,
    distance,
    host,
    no_warnings,
    own,
    parallel,
    rounds_without_limit,
    set_options,
    settle,
    threads,
)

import parastep  # noqa: E402
from parastep.diffusers.leader import Leader  # noqa: E402
from parastep.diffusers.replicas import fingerprint  # noqa: E402

pytestmark = pytest.mark.timeout(120)
Forward = Callable[..., Any]


def ready(name: str = "sd", ranks: int = 3, tolerance: float = 0.0, **options: Any) -> Any:
    """A parallel pipeline that has made its replicas."""
    together = parallel(host(name), ranks, tolerance, **options)
    with no_warnings():
        tiny.run(together, tiny.CASES[name].kwargs(steps=1))
    return together


def at_call(number: int, fault: Callable[[Any], Any]) -> Callable[[Forward], Forward]:
    """A forward whose output goes through `fault` in its number-th call."""

    def wrap(forward: Forward) -> Forward:
        calls = [0]

        def faulty(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            output = forward(*args, **kwargs)
            return fault(output) if calls[0] - 1 == number else output

        return faulty

    return wrap


def poke(together: Any, rank: int, wrap: Callable[[Forward], Forward]) -> None:
    replica = together._ranks._replicas[rank]
    replica.unet.forward = wrap(replica.unet.forward)
    settle(replica)


def explode(output: Any) -> Any:
    raise RuntimeError("out of cheese\nsecond line")


def spoil(value: float) -> Callable[[Any], Any]:
    def fault(output: Any) -> Any:
        return tuple(part.clone().index_fill_(0, torch.tensor([0]), value) for part in output)

    return fault


def check_next_call(together: Any, steps: int = 3) -> None:
    """The call after a fault is as good as any, with all ranks."""
    with no_warnings():
        result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=steps))
    ranks = len(together.devices)
    if together._options.tolerance == 0:
        assert torch.equal(result, own("sd", steps).result)
        assert together.report.evaluations == [max(steps - rank, 1) for rank in range(ranks)]
    else:
        assert together.report.rounds == rounds_without_limit(steps, ranks)
    assert threads() == []


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("tolerance", [0.0, math.inf])
def test_follower_raises(number: int, tolerance: float) -> None:
    together = ready(tolerance=tolerance, ranks=4)
    poke(together, 2, at_call(number, explode))
    with caught() as texts:
        result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=12))
    report, alone = together.report, own("sd", 12).result
    assert [line.rank for line in report.failures] == [2] and report.fallback is None
    assert report.failures[0].text == "RuntimeError: out of cheese"
    assert len(texts) == 1 and "rank 2" in texts[0] and "out of cheese" in texts[0]
    if tolerance == 0:
        assert torch.equal(result, alone) and report.rounds == 12
        assert report.evaluations[1] == 11 and report.evaluations[2] <= number + 1
    else:
        assert distance(result, alone) < 0.5
        assert rounds_without_limit(12, 4) <= report.rounds <= rounds_without_limit(12, 3) + 1
    check_next_call(together)


@pytest.mark.parametrize("tolerance", [0.0, 0.5, math.inf])
def test_followers_go_back(tolerance: float) -> None:
    """A lost rank moves the others' steps: who has passed its next step enters the call again."""
    case, pipe = tiny.CASES["svd"], host("svd")
    together = ready("svd", ranks=4, tolerance=tolerance)
    entries = count_entries(together, 3)
    poke(together, 1, at_call(2, explode))
    torch.manual_seed(7)
    alone = tiny.run(pipe, case.kwargs(steps=9, generator=None))
    torch.manual_seed(7)
    with caught() as texts:
        result = tiny.run(together, case.kwargs(steps=9, generator=None))
    assert len(texts) == 1 and [line.rank for line in together.report.failures] == [1]
    assert entries[0] == 2
    if tolerance == 0:
        assert torch.equal(result, alone)
    else:
        assert distance(result, alone) < 0.3
    good = [drift for drift in together.report.drift if math.isfinite(drift)]
    assert len(good) >= 5
    assert together.report.rounds < 9 or tolerance < math.inf


def count_entries(together: Any, rank: int) -> list[int]:
    replica, count = together._ranks._replicas[rank], [0]
    original = replica.check_inputs

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return original(*args, **kwargs)

    replica.check_inputs = counted
    return count


def test_all_followers_raise_in_turn() -> None:
    together = ready(ranks=4)
    for rank in (1, 2, 3):
        poke(together, rank, at_call(rank, explode))
    with caught() as texts:
        result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=8))
    assert torch.equal(result, own("sd", 8).result) and len(texts) == 4
    assert sorted(line.rank for line in together.report.failures) == [1, 2, 3]
    assert "nobody is left" in together.report.fallback and "rank 3" in texts[-1]
    check_next_call(together)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("number", [0, 2])
def test_follower_returns_rubbish(value: float, number: int) -> None:
    for tolerance in (0.0, math.inf):
        together = ready(tolerance=tolerance)
        poke(together, 1, at_call(number, spoil(value)))
        with caught() as texts:
            result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=8))
        assert [line.rank for line in together.report.failures] == [1] and len(texts) == 1
        assert result.isfinite().all()
        if tolerance == 0:
            assert torch.equal(result, own("sd", 8).result)


@pytest.mark.parametrize(
    "fault",
    [
        lambda output: (output[0].double(),),
        lambda output: (output[0][:, :2],),
        lambda output: (),
        lambda output: None,
    ],
)
def test_follower_returns_another_type(fault: Callable[[Any], Any]) -> None:
    together = ready()
    poke(together, 1, at_call(2, fault))
    with caught() as texts:
        result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=6))
    assert torch.equal(result, own("sd", 6).result)
    assert [line.rank for line in together.report.failures] == [1] and len(texts) == 1
    check_next_call(together)


def other_weights(replica: Any) -> None:
    replica.unet.conv_out = tiny.net(torch.nn.Conv2d, 16, 4, 3, padding=1)


def other_conditioning(replica: Any) -> None:
    encode = replica.encode_prompt
    replica.encode_prompt = lambda *a, **k: tuple(part * 1.1 for part in encode(*a, **k))


def other_guidance(replica: Any) -> None:
    replica.unet.forward = at_call(0, lambda output: (output[0] * 1.001,))(replica.unet.forward)


def other_latents(replica: Any) -> None:
    prepare = replica.prepare_latents
    replica.prepare_latents = lambda *a, **k: prepare(*a, **k) + 0.1


@pytest.mark.parametrize(
    "change", [other_weights, other_conditioning, other_guidance, other_latents]
)
def test_follower_that_computes_something_else_is_left_out(change: Callable[[Any], None]) -> None:
    together = ready(tolerance=math.inf)
    change(together._ranks._replicas[2])
    with caught() as texts:
        result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=9))
    line = together.report.failures[0]
    assert (line.rank, line.step, line.status) == (2, 0, "DIFFERS") and len(texts) == 1
    assert together.report.rounds == rounds_without_limit(9, 2)
    assert distance(result, own("sd", 9).result) < 0.3
    check_next_call(together)


def test_follower_fails_before_the_loop() -> None:
    together = ready()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("not today")

    together._ranks._replicas[1].prepare_latents = fail
    with caught() as texts:
        result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=4))
    assert torch.equal(result, own("sd", 4).result) and len(texts) == 1
    assert together.report.failures[0].text == "ValueError: not today"
    assert together.report.evaluations == [4, 0, 3]  # the first follower's steps are the second's
    check_next_call(together)


def test_follower_that_never_reaches_its_loop() -> None:
    """It leaves, or calls an encoder that the leader does not: neither keeps the leader."""
    together = ready()
    replica = together._ranks._replicas[1]
    replica.prepare_latents = lambda *args, **kwargs: sys.exit("left")
    with caught() as texts:
        result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=4))
    assert torch.equal(result, own("sd", 4).result) and len(texts) == 1
    replica = together._ranks._replicas[2]
    prepare, vae = replica.prepare_latents, replica.vae

    def encode_more(*args: Any, **kwargs: Any) -> Any:
        vae.encode(torch.zeros(1, 3, 32, 32))
        return prepare(*args, **kwargs)

    replica.prepare_latents = encode_more
    with no_warnings():
        result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=4))
    assert torch.equal(result, own("sd", 4).result)
    assert together.report.evaluations == [4, 3, 2]


@pytest.mark.parametrize("number", [0, 2])
def test_hanging_follower(number: int) -> None:
    """It is given up at the deadline, and its replica, in which a thread still is, for good."""
    together = ready(deadline=0.3)
    release = threading.Event()

    def hang(output: Any) -> Any:
        assert release.wait(60)
        return output

    stuck = together._ranks._replicas[1]
    poke(together, 1, at_call(number, hang))
    with caught() as texts:
        result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=6))
    assert torch.equal(result, own("sd", 6).result)
    lost = {line.rank: line.status for line in together.report.failures}
    assert lost[1] == "DEADLINE" and len(texts) == len(lost)
    set_options(together, deadline=None)
    with no_warnings():
        result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=6))
    assert torch.equal(result, own("sd", 6).result)
    assert together.report.evaluations == [6, 5, 4]
    assert together._ranks._replicas[1] is not stuck and threads() == ["parastep-1"]
    release.set()
    wait_for(lambda: threads() == [])


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [0, 3])
def test_loss_is_an_error_for_who_prefers_that(number: int) -> None:
    together = ready(on_failure="raise")
    poke(together, 1, at_call(number, explode))
    before = attributes(host("sd"))
    with pytest.raises(parastep.LostError, match="rank 1.*out of cheese"):
        tiny.run(together, tiny.CASES["sd"].kwargs(steps=6))
    assert attributes(host("sd")) == before
    assert [line.rank for line in together.report.failures] == [1]
    check_next_call(together)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_leader_raises(number: int) -> None:
    """In its own forward: the user gets the exception, and nobody waits for the rest."""
    case = tiny.CASES["sd"]
    pipe = case.build()
    together = parallel(pipe, 3)
    with no_warnings():
        tiny.run(together, case.kwargs(steps=1))
    kept = dict(together._ranks._replicas)
    forward = pipe.unet.forward
    pipe.unet.forward = at_call(number, explode)(forward)
    together._ranks._made_from = fingerprint(pipe)
    with pytest.raises(RuntimeError, match="cheese"):
        tiny.run(together, case.kwargs(steps=6))
    assert together.report.steps == number and together._ranks._replicas == kept
    pipe.unet.forward = forward
    check_next_call(together)


def test_leader_raises_before_its_loop() -> None:
    case, pipe = tiny.CASES["sd"], host("sd")
    together = ready()
    with pytest.raises(ValueError) as ours:
        tiny.run(together, case.kwargs(height=33))
    with pytest.raises(ValueError) as own_error:
        tiny.run(pipe, case.kwargs(height=33))
    assert str(ours.value) == str(own_error.value)
    assert together.report.steps == together.report.rounds == 0
    check_next_call(together)


def test_leaders_nan_is_the_hosts() -> None:
    case = tiny.CASES["sd"]
    pipe = case.build()
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = math.nan
    for tolerance in (0.0, math.inf):
        together = parallel(pipe, 3, tolerance)
        with caught():
            result = tiny.run(together, case.kwargs(steps=6))
        assert torch.equal(result.isnan(), tiny.run(pipe, case.kwargs(steps=6)).isnan())
        assert together.report.not_finite > 0 and together.report.failures
        assert all("untouched model's" in line.text for line in together.report.failures)
        assert together.report.fallback is not None


def test_denoiser_that_draws_is_the_leaders_alone() -> None:
    """Dropout left on draws from torch's generator, which followers must not touch."""
    case = tiny.CASES["sd"]
    pipe = case.build()
    pipe.unet.mid_block.attentions[0].proj_out = torch.nn.Sequential(
        pipe.unet.mid_block.attentions[0].proj_out, torch.nn.Dropout(0.3)
    )
    for mode in (True, False):
        pipe.unet.train(mode)
        results = []
        for called in (pipe, parallel(pipe, 3)):
            torch.manual_seed(1)
            with caught() as texts:
                results.append(tiny.run(called, case.kwargs(steps=4)))
            results.append(torch.get_rng_state())
        assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
        assert len(texts) == (3 if mode else 0)  # of two ranks, and of nobody who is left
        assert all("random" in line.text for line in called.report.failures)


def test_two_threads() -> None:
    """A parallel pipeline runs one call at a time and tells who comes second."""
    together, errors, inside = ready(), [], threading.Event()

    def wait(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        inside.set()
        if step == 1:
            wait_for(lambda: bool(errors))
        return kwargs

    def second() -> None:
        inside.wait(30)
        try:
            together(**tiny.CASES["sd"].kwargs(steps=2))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=4, callback_on_step_end=wait))
    thread.join()
    assert isinstance(errors[0], parastep.StateError)
    assert torch.equal(result, own("sd", 4).result)


def test_two_pipelines_in_two_threads() -> None:
    results: dict[str, torch.Tensor] = {}

    def run(name: str) -> None:
        together = parallel(host(name), 3)
        results[name] = tiny.run(together, tiny.CASES[name].kwargs(steps=5))
        assert together.report.evaluations == [5, 4, 3]

    running = [threading.Thread(target=run, args=(name,)) for name in ("sd", "flux")]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for name, result in results.items():
        assert torch.equal(result, own(name, 5).result)
    assert len(results) == 2


INTERRUPTED = """
    import signal, sys, threading, time
    import tiny, torch
    from hosting import attributes, distance, parallel, settle, threads
    from parastep.diffusers.replicas import fingerprint

    case = tiny.CASES["sd"]
    pipe = case.build()
    alone = tiny.run(pipe, case.kwargs(steps=6))
    before = attributes(pipe)
    for rank, options in {scenes!r}:
        together = parallel(pipe, 3, **options)
        tiny.run(together, case.kwargs(steps=1))
        replica = together._ranks._replicas[rank] if rank else None
        inner = (replica or pipe).unet.mid_block
        forward, calls = inner.forward, [0]

        def interrupt(*args, **kwargs):
            calls[0] += 1
            if calls[0] == 3:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                if rank > 0:
                    time.sleep(1)  # meanwhile the leader is through and waits for this rank
            return forward(*args, **kwargs)

        inner.forward = interrupt
        if rank:
            settle(replica)
        together._ranks._made_from = fingerprint(pipe)
        try:
            tiny.run(together, case.kwargs(steps=6))
            print("no interrupt")
        except KeyboardInterrupt:
            print("interrupted at", together.report.steps)
        del inner.forward
        if rank:
            settle(replica)
        assert attributes(pipe) == before
        result = tiny.run(together, case.kwargs(steps=6))
        report, tolerance = together.report, together._options.tolerance
        print(distance(result, alone) <= tolerance, report.evaluations, report.failures)
        assert threads() == []
"""


@pytest.mark.timeout(300)
def test_keyboard_interrupt() -> None:
    """In the leader's forward, in its wait for a follower, in a batch of the followers' and in one
    of the leader's; the next call is as good as any.
    """
    scenes = [(0, {}), (1, {}), (1, {"slots": "batch"}), (1, {"slots": "batch", "tolerance": 0.5})]
    script = INTERRUPTED.format(scenes=scenes)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[:4] == ["interrupted at 2", "True [6, 5, 4] []"] * 2, run.stdout
    assert lines[5] == "True [6, 5, 4] []", run.stdout
    for interrupted, after in (lines[4:6], lines[6:]):  # whose forward runs a batch is not settled
        assert interrupted.startswith("interrupted at"), run.stdout
        assert after.startswith("True") and after.endswith(" []"), run.stdout


@pytest.mark.parametrize("at", [0, 3])
def test_no_memory_for_the_leader_beside_its_followers(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone there would be: they leave, and it goes on."""
    crowded, together, plain = Crowded(at), ready(), Leader._with_room

    def beside(leads: bool) -> Callable[[Forward], Forward]:
        def wrap(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                with crowded(leads):
                    return forward(*args, **kwargs)

            return run

        return wrap

    for rank in (1, 2):
        poke(together, rank, beside(False))
    with monkeypatch.context() as patch:
        wrap = beside(True)
        patch.setattr(
            Leader, "_with_room", lambda self, run, *a, **k: plain(self, wrap(run), *a, **k)
        )
        with caught() as texts:
            result = tiny.run(together, tiny.CASES["sd"].kwargs(steps=6))
    assert torch.equal(result, own("sd", 6).result)
    assert crowded.refused == 1 and len(texts) == 1
    assert "no memory" in together.report.fallback and threads() == []
    together.close()
