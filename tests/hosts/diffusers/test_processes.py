"""Followers in processes of our own: the host's bits at tolerance 0, whatever a worker does."""

from __future__ import annotations

import gc
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import faults  # noqa: E402
import survival  # noqa: E402
import tiny  # noqa: E402
from hosting import (  # noqa: E402
    attributes,
    caught,
    children,
    distance,
    host,
    no_warnings,
    own,
    parallel,
    rounds_without_limit,
    set_options,
)

import parastep  # noqa: E402
from parastep.diffusers.places import by_workers  # noqa: E402

pytestmark = pytest.mark.timeout(280)  # a worker imports torch and diffusers, which takes seconds

RANKS = survival.RANKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="module")
def together(folder: Path) -> Iterator[Any]:
    """Stable Diffusion on workers that carry out faults, the same ones for all tests."""
    with survival.make(folder) as made:
        yield made
    made.close()
    with pytest.raises(parastep.StateError, match="closed"):
        run(made)
    assert children() == set()


def workers(together: Any) -> list[int]:
    return [worker._process.pid for _, worker in sorted(together._ranks._remote._workers.items())]


def run(together: Any, steps: int = 6, **changes: Any) -> torch.Tensor:
    return tiny.run(together, tiny.CASES["sd"].kwargs(steps=steps, **changes))


def check_good_call(together: Any, steps: int = 6) -> None:
    """With all ranks, and nothing said about it."""
    with no_warnings():
        result = run(together, steps)
    assert torch.equal(result, own("sd", steps).result)
    assert together.report.evaluations == [steps - rank for rank in range(RANKS)]


def test_calls(together: Any) -> None:
    """The host's bits, twice, with the same workers; the pipe is as it was."""
    check_good_call(together)
    pids, before = workers(together), attributes(together.pipe)
    assert len(set(pids)) == RANKS - 1 and set(pids) <= children()
    check_good_call(together, 7)
    assert workers(together) == pids and attributes(together.pipe) == before
    set_options(together, tolerance=math.inf)
    try:
        result = run(together, 9)
        assert together.report.rounds == rounds_without_limit(9, RANKS)
        assert distance(result, own("sd", 9).result) < 0.3
        assert together.report.bytes_sent > 0 and len(together.report.timeline) > 9
        assert together.report.transports == ["", "host", "host"]
        assert all(line.begin <= line.end for line in together.report.timeline)
    finally:
        set_options(together, tolerance="rehearse")


def test_random_state(together: Any) -> None:
    """Of the global generator, which followers get a copy of."""
    states = []
    for called in (host("sd"), together):
        torch.manual_seed(11)
        states.append(run(called, generator=None))
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[2]) and torch.equal(states[1], states[3])
    assert together.report.failures == []


@pytest.mark.parametrize(
    ("fault", "call", "status"),
    [
        ("raise", 1, "FAILED"),
        ("raise", 3, "FAILED"),
        ("exit", 2, "FAILED"),
        ("nan", 1, "DIFFERS"),
        ("kill", 3, "LOST"),
        ("rubbish", 3, "LOST"),
        ("silence", 3, "LOST"),
    ],
)
def test_worker_fails(together: Any, folder: Path, fault: str, call: int, status: str) -> None:
    faults.order(folder, fault, call)
    with caught() as texts:
        result = run(together)
    assert faults.taken(folder)
    assert torch.equal(result, own("sd", 6).result)
    assert len(together.report.failures) == len(texts) == 1
    line = together.report.failures[0]
    assert line.status == status
    if fault == "raise":
        assert line.text == "RuntimeError: out of cheese"
    check_good_call(together)


def test_faults_at_random(together: Any, folder: Path) -> None:
    """A few of those that `make chaos` injects."""
    draw = random.Random(3)
    for what in draw.sample(survival.GENTLE, 3):
        survival.survive(together, folder, what, draw)


def test_worker_hangs(together: Any, folder: Path) -> None:
    """All of it, the thread that receives too: it is given up at the deadline and ended."""
    check_good_call(together)
    pids = set(workers(together))
    set_options(together, deadline=3.0)
    faults.order(folder, "stop", 3)
    try:
        with caught() as texts:
            result = run(together)
    finally:
        set_options(together, deadline=None)
    assert torch.equal(result, own("sd", 6).result) and len(texts) >= 1
    assert "DEADLINE" in {line.status for line in together.report.failures}
    assert len(children() & pids) == RANKS - 1 - len(together.report.failures)


def test_workers_killed_between_calls(together: Any) -> None:
    check_good_call(together)
    for pid in workers(together):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(w.alive() for w in together._ranks._remote._workers.values()))
    check_good_call(together)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_loss_is_an_error_for_who_prefers_that(together: Any, folder: Path) -> None:
    check_good_call(together)
    set_options(together, on_failure="raise")
    faults.order(folder, "raise", 2)
    try:
        with pytest.raises(parastep.LostError, match="out of cheese"):
            run(together)
    finally:
        set_options(together, on_failure="continue")
    check_good_call(together)


def test_the_leader_raises(together: Any) -> None:
    """Before its loop, and in it: the exception is the user's, the workers stay."""
    check_good_call(together)
    pids = workers(together)
    with pytest.raises(ValueError, match="height"):
        run(together, height=33)

    def stop(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 2:
            raise KeyError("enough")
        return kwargs

    with pytest.raises(KeyError, match="enough"):
        run(together, callback_on_step_end=stop)
    check_good_call(together)
    assert workers(together) == pids


def test_weights_changed_between_calls(together: Any) -> None:
    """They go over again, to the same workers."""
    check_good_call(together)
    pids, bias = workers(together), together.pipe.unet.conv_out.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias += 0.25
    try:
        with no_warnings():
            result = run(together)
        assert torch.equal(result, run(together.pipe))
        assert workers(together) == pids
    finally:
        with torch.no_grad():
            bias.copy_(before)


def test_arguments_that_cannot_be_sent(together: Any) -> None:
    with caught() as texts:
        result = run(together, cross_attention_kwargs={"unused": lambda: None})
    assert torch.equal(result, own("sd", 6).result)
    assert together.report.fallback is not None and "cannot be sent" in together.report.fallback
    assert len(texts) == 1


def test_pipelines_that_cannot_be_sent(caplog: pytest.LogCaptureFixture) -> None:
    class Local(torch.nn.Identity):
        """A class that no other process can import."""

    pipe = tiny.CASES["sd"].build()
    pipe.unet.conv_out = torch.nn.Sequential(pipe.unet.conv_out, Local())
    with parallel(pipe, RANKS, mode="processes") as together, caught() as texts:
        result = run(together)
    assert torch.equal(result, own("sd", 6).result)
    assert "Local" in together.report.fallback and "mode='threads'" in together.report.fallback
    assert together.report.evaluations == [6, 0, 0] and len(texts) == 1
    with parallel(pipe, RANKS, mode="processes") as together:
        together._ranks._auto = True  # as where mode="auto" has chosen processes
        with caplog.at_level("WARNING"):
            check_good_call(together)
        assert together.report.transports == ["", "threads", "threads"]
    (line,) = caplog.messages
    assert "ranks are threads" in line and "Local" in line


def test_auto_means_processes_on_devices_of_ones_own() -> None:
    def chosen(*names: str) -> bool:
        return by_workers("auto", [torch.device(name) for name in names])

    assert chosen("cuda:0", "cuda:1") and not chosen("cuda:0")
    assert not chosen("cuda:0", "cuda:1", "cuda:0") and not chosen("cpu", "cpu")
    assert by_workers("processes", [torch.device("cpu")])
    assert not by_workers("threads", [torch.device("cuda", k) for k in range(2)])


def open_descriptors() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name}: {os.readlink(entry)}")
        except OSError:
            pass
    return found


def test_nothing_is_left(together: Any) -> None:
    """No process, descriptor, thread or shared memory, where nobody closes it."""
    before, shared = open_descriptors(), set(os.listdir("/dev/shm"))
    mine, running = children(), set(threading.enumerate())
    made = parallel(host("flux"), 2, mode="processes")
    tiny.run(made, tiny.CASES["flux"].kwargs(steps=2))
    assert len(children() - mine) == 1
    del made
    gc.collect()
    assert children() == mine and set(threading.enumerate()) <= running
    assert open_descriptors() == before
    # Other processes of this machine may have something there for a while.
    wait_for(lambda: set(os.listdir("/dev/shm")) <= shared, 100)


SCRIPT = """
    import os, signal, sys, threading, time
    import faults, tiny, torch
    from hosting import parallel

    case = tiny.CASES["sd"]
    pipe = case.build()
    alone = tiny.run(pipe, case.kwargs(steps=4))
    pipe.unet.mid_block.resnets[0] = faults.Faulty(pipe.unet.mid_block.resnets[0], {folder!r})
    together = parallel(pipe, 2, mode="processes")
    tiny.run(together, case.kwargs(steps=1))

    def once_it_hangs(act):
        def wait():
            while not faults.taken({folder!r}):
                time.sleep(0.01)
            time.sleep(0.5)  # by then the leader waits for it
            act()

        faults.order({folder!r}, "hang", 2)
        threading.Thread(target=wait, daemon=True).start()

    once_it_hangs(lambda: os.killpg(os.getpgid(0), signal.SIGINT))
    try:
        tiny.run(together, case.kwargs(steps=4))
        print("no interrupt")
    except KeyboardInterrupt:
        print("interrupted", faults.taken({folder!r}))
    result = tiny.run(together, case.kwargs(steps=4))
    print("equal", torch.equal(result, alone), together.report.evaluations)
    workers = together._ranks._remote._workers.values()
    print(*(worker._process.pid for worker in workers), flush=True)
    once_it_hangs(lambda: os.kill(os.getpid(), signal.SIGKILL))
    tiny.run(together, case.kwargs(steps=4))
"""


def test_the_leader_is_interrupted_and_killed(tmp_path: Path) -> None:
    """Ctrl-C reaches the leader, which waits for a worker that hangs; the next call is fine. When
    the leader is killed the pipe ends, and a worker in the middle of its work with it.
    """
    text = SCRIPT.format(folder=str(tmp_path))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=200,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[:2] == ["interrupted True", "equal True [4, 3]"] and len(lines) == 3
    pids = [int(word) for word in lines[2].split()]
    assert len(pids) == 1
    wait_for(lambda: not any(Path("/proc", str(pid), "cmdline").exists() for pid in pids))
