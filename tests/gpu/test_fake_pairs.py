"""Leader and follower joined by NCCL, on the stand-in libraries: runs, faults, and runs after them.

The two ranks are threads of this process, each with a device of its own, as the stand-in has it;
what they tell each other beside NCCL goes through a socket, in the frames of two processes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import fake_arrays
import numpy as np
import pytest
from cases import smooth
from fake_arrays import Plain, Setting
from fake_runs import STEPS, euler, latents, on_device

import parastep
from parastep import _core

torch = pytest.importorskip("torch")

from parastep.diffusers.call import Call  # noqa: E402
from parastep.diffusers.remote import groups, link, serving, workers  # noqa: E402
from parastep.processes import pairs  # noqa: E402
from parastep.processes.frames import Kind  # noqa: E402
from parastep.processes.streams import SocketStream  # noqa: E402

HERE, THERE = torch.device("cuda", 0), torch.device("cuda", 1)
evaluate = on_device(Plain)


@pytest.fixture(scope="module")
def expected() -> Any:
    """x_N of the sequential run."""
    return parastep.sample(euler(), smooth, latents(), ranks=1, tolerance=0.0)[0]


def in_thread(body: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """The thread, and a list that gets what the body returns or raises."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(body())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def lead(leader: Any, x: Any) -> Any:
    """x_N, by hand; the followers are told that it is over."""
    try:
        for step in range(STEPS):
            if not leader.ask(step, x, leader.output()):
                leader.submit(evaluate(x, step, 0))
            x = leader.advance()
    finally:
        leader.finish()
    return x.numpy()


def leader_of(way: Any, **options: Any) -> Any:
    options = {"tolerance": 0.0, "max_stride": 1} | options
    return _core.Leader(euler(), Plain.of(latents()), ranks=2, carriers={1: (way, True)}, **options)


# ---- pairs alone ---------------------------------------------------------------------------------


def connected() -> tuple[Any, Any]:
    """Both ends of a pair."""
    name = _core.nccl_id()
    thread, there = in_thread(lambda: _core.Pair(name, False, 1, 20.0))
    here = _core.Pair(name, True, 0, 20.0)
    thread.join(20)
    assert here.alive and there[0].alive
    return here, there[0]


def follow(pair: Any, conduct: Callable[[Any, int], Any] | None = None) -> list[Any]:
    """A run's other end, served to its end; the steps that were evaluated."""
    x = Plain.of(np.zeros_like(latents()), 1)
    follower, told = _core.join(x, 1, 1, (pair, True))
    assert told is pair
    steps = []
    try:
        while (work := follower.next()) is not None:
            ((step, point),) = work
            steps.append(step)
            if conduct is not None and conduct(follower, step) is not None:
                continue
            follower.submit([evaluate(point, step, 1)])
    finally:
        follower.close()
    return steps


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_runs_over_one_pair(nccl: Any, expected: Any, tolerance: float) -> None:
    here, there = connected()
    settings: Any = {"ranks": 2, "tolerance": tolerance, "max_stride": 1}
    on_cpu, report_there = parastep.sample(euler(), smooth, latents(), **settings)
    for _ in range(3):
        thread, steps = in_thread(lambda: follow(there))
        leader = leader_of(here, tolerance=tolerance)
        assert leader.inbox(1) is here
        result = lead(leader, Plain.of(latents()))
        thread.join(20)
        np.testing.assert_array_equal(result, on_cpu)
        report = leader.report()
        assert report["failures"] == [] and report["rounds"] == report_there.rounds
        assert len(steps[0]) == report["evaluations"][1] > 0
        assert here.alive and there.alive


def test_a_rank_that_never_arrives(nccl: Any) -> None:
    for leads in (True, False):
        with pytest.raises(_core.DeadlineError, match="connecting to the other rank"):
            _core.Pair(_core.nccl_id(), leads, 0, 0.1)
    connected()


def test_what_cannot_be_a_pair(nccl: Any) -> None:
    name = _core.nccl_id()
    assert len(name) == 128 and _core.nccl_version() > 21800
    with pytest.raises(_core.InvalidError, match="an id of 3 bytes"):
        _core.Pair(b"abc", True, 0, 1.0)
    with pytest.raises(_core.InvalidError, match="above 0"):
        _core.Pair(name, True, 0, 0.0)
    with pytest.raises(_core.DeviceError, match="sees 2 CUDA devices"):
        _core.Pair(name, True, 7, 1.0)
    carrier: Any = 3
    with pytest.raises(TypeError, match=r"\(Pair, same_clock\)"):
        _core.Leader(euler(), Plain.of(latents()), ranks=2, carriers={1: carrier})
    here, there = connected()
    leader = leader_of(here)
    with pytest.raises(_core.StateError, match="another run"):
        leader_of(here)
    leader.finish()
    for end in (here, there):  # nobody takes the leader's last word
        end.lost("not wanted")
        assert not end.alive
        end.close()
    here.lost("twice")
    assert not here.alive
    with pytest.raises(_core.InvalidError, match="closed"):
        leader_of(here)


def failures(leader: Any) -> list[Any]:
    return [(rank, status) for rank, _, status, _ in leader.report()["failures"]]


@pytest.mark.parametrize("function", ["ncclSend", "ncclRecv", "ncclCommGetAsyncError"])
@pytest.mark.parametrize("n", [1, 4])
def test_nccl_fails(nccl: Any, expected: Any, function: str, n: int) -> None:
    """At one of the two ends, in the middle of a run: the picture is there, and the next pair."""
    here, there = connected()
    thread, _ = in_thread(lambda: follow(there))
    leader = leader_of(here, deadline=0.5)
    nccl.fake_nccl_fail(function.encode(), n, 6)
    result = lead(leader, Plain.of(latents()))
    there.lost("the leader went on")  # which frames tell two processes
    thread.join(20)
    assert not thread.is_alive()
    np.testing.assert_array_equal(result, expected)
    nccl.fake_nccl_fail(b"", 0, 0)
    test_runs_over_one_pair(nccl, expected, 0.0)


def test_counts_that_differ(fake: Any, nccl: Any, expected: Any) -> None:
    """Two ranks with latents of other shapes, which hangs on a GPU: an error at one end."""
    here, there = connected()
    shape = (2, 3, 40)
    x = Plain.of(np.zeros(shape, "f4"), 1)
    leader = leader_of(here, deadline=0.3)
    follower, _ = _core.join(x, 1, 1, (there, True))
    thread, raised = in_thread(follower.next)
    result = lead(leader, Plain.of(latents()))
    there.lost("the leader went on")
    thread.join(20)
    follower.close()
    np.testing.assert_array_equal(result, expected)
    assert [rank for rank, _ in failures(leader)] == [1]
    assert isinstance(raised[0], _core.Error)
    assert b"bytes sent where" in fake.fake_complaint()
    del x, follower, leader
    forget_complaint(fake)


def forget_complaint(fake: Any) -> None:
    fake.fake_drain()
    fake.fake_set(Setting(2, 1, 1, 7))


# ---- with the frames of two processes ------------------------------------------------------------


class Processes:
    """The leader's link to a follower with a device of its own, and the follower's thread."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.theirs = theirs
        self.follower = serving.Server(
            SocketStream(theirs), 1, THERE, self.jobs.put, lambda frame: None, self.jobs.put
        )
        self.link = link.Link(SocketStream(ours), "follower", True)
        self.number = 0
        self.conduct: Callable[[Any, Any, int], Any] | None = None
        self.thread, self.died = in_thread(self.serve)

    def serve(self) -> None:
        """What `Follower.serve` does, without a pipeline."""
        while not isinstance(call := self.jobs.get(), str):
            call.arrive(1)
            try:
                follower = call.follower(1)
                while (work := follower.next()) is not None:
                    ((step, point),) = work
                    if self.conduct is not None:
                        self.conduct(self, call, step)
                    follower.submit([evaluate(point, step, 1)])
            except BaseException as error:
                call.fail(1, repr(error))
            finally:
                left = f"[0, {str(call.leave()).lower()}, null]"
                self.follower.peer.send(Kind.LEFT, call.number, left.encode())
                del call

    def run(self, **options: Any) -> tuple[Any, list[Any], str]:
        """x_N, the failures and what carried the latents."""
        self.number += 1
        call = Call(2, [HERE, THERE])
        link._pair_all({1: self.link}, HERE)
        rank = link.RemoteRank(self.link, 1, self.number, call)
        call.remote = {1: rank}
        rank.begin(b"")
        leader = leader_of(rank.carrier()[0], **options)
        with call._changed:
            assert call._changed.wait_for(lambda: 1 in call._arrived, 20)
        rank.open(leader.inbox(1), Plain.of(latents()))
        try:
            result = lead(leader, Plain.of(latents()))
        finally:
            rank.over()
            assert self.link.wait(rank.has_left, time.monotonic() + 20)
        return result, failures(leader), rank.transport

    def close(self) -> None:
        self.conduct = None
        closing, _ = in_thread(self.link.close)  # each end waits for the other's goodbye
        self.follower.close(1.0)
        for thread in (closing, self.thread):
            thread.join(20)
            assert not thread.is_alive()
        vars(self).clear()  # pytest keeps this object beyond the look at what is left


def latent(shape: Any, dtype: Any, device: Any) -> Any:
    return Plain.of(np.zeros(shape, dtype), device.index)


@pytest.fixture
def processes(nccl: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    monkeypatch.setattr(pairs, "identity", str)
    monkeypatch.setattr(serving, "_latent", latent)
    made = Processes()
    yield made
    made.close()


def check(processes: Processes, expected: Any, transport: str = "nccl") -> None:
    result, failed, by = processes.run()
    np.testing.assert_array_equal(result, expected)
    assert failed == [] and by == transport


def test_calls(processes: Processes, expected: Any) -> None:
    """The pair of the first call serves the others."""
    check(processes, expected)
    pair = processes.link.pair
    check(processes, expected)
    assert processes.link.pair is pair


def test_a_follower_raises(processes: Processes, expected: Any) -> None:
    """It is left out, with its own words; the pair stays."""
    check(processes, expected)
    pair = processes.link.pair

    def fall(processes: Processes, call: Any, step: int) -> None:
        if step == 3:
            raise ValueError("out of cheese")

    processes.conduct = fall
    result, failed, _ = processes.run()
    np.testing.assert_array_equal(result, expected)
    assert failed == [(1, "FAILED")]
    processes.conduct = None
    check(processes, expected)
    assert processes.link.pair is pair


def test_a_follower_says_so_beside_the_run(processes: Processes, expected: Any) -> None:
    """As one does that has failed before it is in the run, which the leader has opened by then."""
    check(processes, expected)

    def tell(processes: Processes, call: Any, step: int) -> None:
        processes.follower.peer.send(Kind.FAILED, call.number, b"out of cheese")
        with call._changed:
            assert call._changed.wait_for(lambda: call.over, 20)

    processes.conduct = tell
    result, failed, _ = processes.run()
    np.testing.assert_array_equal(result, expected)
    assert failed == [(1, "FAILED")]
    processes.conduct = None
    check(processes, expected)


def test_a_follower_is_late(processes: Processes, expected: Any) -> None:
    """Past the deadline, with its reply still on the way: the pair ends, the next call has one."""
    check(processes, expected)
    pair, over = processes.link.pair, threading.Event()

    def sleep(processes: Processes, call: Any, step: int) -> None:
        if step == 3:
            over.wait(20)

    processes.conduct = sleep
    thread, results = in_thread(lambda: processes.run(deadline=0.2))
    while processes.link.pair is pair and pair.alive:  # until the leader has gone on
        time.sleep(0.01)
    over.set()
    thread.join(40)
    result, failed, by = results[0]
    np.testing.assert_array_equal(result, expected)
    assert failed == [(1, "DEADLINE")] and by == "nccl"
    processes.conduct = None
    check(processes, expected)
    assert processes.link.pair is not pair


def test_a_follower_is_killed(nccl: Any, processes: Processes, expected: Any) -> None:
    """NCCL itself would never notice: the end of the socket does."""
    check(processes, expected)

    def die(processes: Processes, call: Any, step: int) -> None:
        if step == 3:
            processes.theirs.shutdown(socket.SHUT_RDWR)
            time.sleep(0.2)

    processes.conduct = die
    result, failed, _ = processes.run()
    np.testing.assert_array_equal(result, expected)
    assert failed == [(1, "LOST")]
    assert processes.link.pair is None or not processes.link.pair.alive


def test_an_error_of_nccl(nccl: Any, processes: Processes, expected: Any) -> None:
    check(processes, expected)

    def fail(processes: Processes, call: Any, step: int) -> None:
        if step == 3:
            nccl.fake_nccl_fail(b"ncclCommGetAsyncError", 1, 6)

    processes.conduct = fail
    result, failed, _ = processes.run(deadline=2.0)
    np.testing.assert_array_equal(result, expected)
    assert [rank for rank, _ in failed] == [1]
    nccl.fake_nccl_fail(b"", 0, 0)
    processes.conduct = None
    check(processes, expected)


def test_the_leader_raises(processes: Processes, expected: Any) -> None:
    """In the middle of a round: its follower leaves, and the next call is fine."""
    check(processes, expected)

    def deny(x: Any) -> Any:
        raise KeyError("enough")

    leading = lead
    with contextlib.ExitStack() as undo:
        undo.callback(globals().__setitem__, "lead", leading)
        globals()["lead"] = stop_in_the_middle
        with pytest.raises(KeyError, match="enough"):
            processes.run()
    check(processes, expected)


def stop_in_the_middle(leader: Any, x: Any) -> Any:
    try:
        for step in range(STEPS):
            if not leader.ask(step, x, leader.output()):
                if step == 4:
                    raise KeyError("enough")
                leader.submit(evaluate(x, step, 0))
            x = leader.advance()
    finally:
        leader.finish()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("absent", "NCCL was not found"),
        ("absent there", "NCCL was not found"),
        ("version", "versions of NCCL differ, 9.99.99 here and 2.29.7 there"),
        ("device", "the leader's own device"),
    ],
)
def test_without_a_pair(
    nccl: Any,
    processes: Processes,
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
    words: str,
) -> None:
    """Latents go through the host, and one line says so."""
    monkeypatch.setattr(pairs, "PATIENCE", (1.0, 1.0))
    if what.startswith("absent"):
        monkeypatch.setattr(_core, "nccl_version", absent(after=what.count("there")))
    elif what == "version":
        versions = iter([22907])
        monkeypatch.setattr(_core, "nccl_version", lambda: next(versions, 99999))
    else:
        monkeypatch.setattr(pairs, "identity", lambda device: "the same")
    for _ in range(3):
        check(processes, expected, "host")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "rank 1: latents go through the host" in lines[0]
    assert words in lines[0]


@pytest.mark.parametrize("ready_after", [1, 2, 3])
def test_a_pair_that_is_late(
    processes: Processes,
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ready_after: int,
) -> None:
    """The other end does not come in time: the next call tries again, and the last one gives up."""
    monkeypatch.setattr(pairs, "PATIENCE", (20.0, 10.0))
    tried: list[float] = []
    make = _core.Pair

    def pair(name: bytes, leads: bool, device: int, seconds: float, check: Any) -> Any:
        if not leads:
            tried.append(seconds)
            if len(tried) < ready_after:
                raise _core.LostError("it does not come")
        return make(name, leads, device, seconds, check)

    monkeypatch.setattr(_core, "Pair", pair)
    ways = []
    for _ in range(4):
        result, failed, by = processes.run()
        np.testing.assert_array_equal(result, expected)
        assert failed == []
        ways.append(by)
    late = min(ready_after - 1, 2)
    assert ways == ["host"] * late + ["nccl" if ready_after < 3 else "host"] * (4 - late)
    assert tried == [20.0, 10.0][: min(ready_after, 2)] and len(caplog.records) == late


def test_an_end_that_fails_at_once(nccl: Any, processes: Processes, expected: Any) -> None:
    """Which end that happens to, and who is the first to say so, is open."""
    nccl.fake_nccl_fail(b"ncclCommInitRankConfig", 1, 5)
    check(processes, expected, "host")
    check(processes, expected)


def test_closing_ends_the_communicators(
    nccl: Any, processes: Processes, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not leave that to the collector of garbage, which may never come."""
    check(processes, expected)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    gc.disable()
    try:
        assert nccl.fake_nccl_live() == 2
        ours, theirs = processes.link, processes.follower
        closing, _ = in_thread(lambda: groups._close_all([theirs], os.getpid()))
        worker = workers._Worker.__new__(workers._Worker)
        worker._process = SimpleNamespace(end=lambda: None)  # type: ignore[assignment]
        worker.link = ours
        worker.end()
        closing.join(20)
        for _ in range(200):
            if nccl.fake_nccl_live() == 0:
                break
            time.sleep(0.01)
        assert nccl.fake_nccl_live() == 0
    finally:
        gc.enable()


LEAVES = """
import ctypes, sys, threading
sys.path[:0] = {path!r}
import fake_arrays
from fake_arrays import Array
Array.fake = fake_arrays.load({driver!r})
Array.fake.fake_set(fake_arrays.Setting(2, 1, 1, 7))
nccl = ctypes.CDLL({nccl!r}, mode=ctypes.RTLD_GLOBAL)
from parastep import _core
name = _core.nccl_id()
there = []
thread = threading.Thread(target=lambda: there.append(_core.Pair(name, False, 1, 20.0)))
thread.start()
here = _core.Pair(name, True, 0, 20.0)
thread.join()
nccl.fake_nccl_abort_takes({ms})
here.close()
"""


def test_a_process_that_ends_while_a_communicator_does(
    library: Any, nccl_library: Any, tmp_path: pathlib.Path
) -> None:
    """It waits for that, though not for ever."""
    path = [str(pathlib.Path(fake_arrays.__file__).parent), *sys.path]
    for ms, code in ((300, 0), (30000, 3)):
        script = LEAVES.format(path=path, driver=library._name, nccl=nccl_library._name, ms=ms)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == code, done.stderr


def absent(after: int) -> Callable[[], int]:
    """The version of a library that is not there, but where it is first asked for."""
    versions = iter([22907] * after)

    def version() -> int:
        for number in versions:
            return number
        raise _core.UnsupportedError("NCCL was not found")

    return version
