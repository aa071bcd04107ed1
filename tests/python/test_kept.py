"""A rank of a CUDA device keeps its stream and its thread from call to call; on a stand-in."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fake_streams import Stream, Streams  # noqa: E402

from parastep.threads import HostContext, kept  # noqa: E402

HOME, THERE = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(kept, "_IDLE", 0.2)
    kept._streams.clear()
    yield Streams(monkeypatch)
    kept._streams.clear()


def seen(streams: Streams, name: str, device: Any, **given: Any) -> tuple[int, Any, Any]:
    """What a thread is and works on: (its id, its stream there, that at home)."""
    found: list[Any] = []

    def look() -> None:
        assert threading.current_thread().name == name
        found.append((threading.get_ident(), streams.current(device), streams.current(HOME)))

    HostContext().start(look, name, None, device, **given).join(10)
    return found[0]


def test_calls_share_a_thread_and_a_stream(streams: Streams) -> None:
    before, made = threading.active_count(), Stream.made
    calls = [seen(streams, "parastep-1", THERE, home=HOME) for _ in range(8)]
    assert len(set(calls)) == 1 and threading.active_count() == before + 1
    assert Stream.made == made + 2  # there, and one for copies from the leader's device
    _, there, home = calls[0]
    assert there is not streams.default[THERE] and home is not streams.default[HOME]
    other = seen(streams, "parastep-2", THERE, home=HOME)
    assert not set(other) & set(calls[0])


class Slow:
    """A lock that all but this thread come to late."""

    def __init__(self) -> None:
        self.lock, self.own = threading.Lock(), threading.get_ident()

    def __enter__(self) -> None:
        if threading.get_ident() != self.own:
            time.sleep(0.01)
        self.lock.acquire()

    def __exit__(self, *error: Any) -> None:
        self.lock.release()


def test_a_thread_is_there_again_as_soon_as_its_task_is_done(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_lock", Slow())
    threads: set[threading.Thread] = set()
    for _ in range(3):
        kept.start(THERE, "parastep-1", lambda: threads.add(threading.current_thread())).join(10)
    assert len(threads) == 1


def test_on_the_leaders_device_there_is_one_stream(streams: Streams) -> None:
    _, there, home = seen(streams, "parastep-1", HOME, home=HOME)
    assert there is home and home is not streams.default[HOME]
    _, there, home = seen(streams, "parastep-0", HOME, home=HOME, stream=streams.default[HOME])
    assert there is home is streams.default[HOME]


def test_what_the_leader_has_begun_is_finished_first(streams: Streams) -> None:
    seen(streams, "parastep-1", THERE, home=HOME)
    assert [streams.default[device].synchronized for device in (HOME, THERE)] == [1, 1]


def test_a_thread_that_hangs_is_not_used(streams: Streams) -> None:
    back, hung = threading.Event(), HostContext()
    task = hung.start(lambda: back.wait(20) and None, "parastep-1", None, THERE)
    try:
        task.join(0.01)
        assert task.is_alive()
        first = seen(streams, "parastep-1", THERE)
        assert seen(streams, "parastep-1", THERE) == first
    finally:
        back.set()
    task.join(10)
    assert not task.is_alive()


def test_a_thread_survives_what_its_body_raises(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)

    def fails() -> None:
        raise SystemError("of the body")

    first = seen(streams, "parastep-1", THERE)
    HostContext().start(fails, "parastep-1", None, THERE).join(10)
    assert seen(streams, "parastep-1", THERE) == first
    assert [str(line.exc_value) for line in told] == ["of the body"]


def test_idle_threads_end(streams: Streams) -> None:
    before = threading.active_count()
    seen(streams, "parastep-1", THERE)
    end = threading.Event()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        end.wait(0.1)
    assert threading.active_count() <= before
    assert seen(streams, "parastep-1", THERE)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_its_own(streams: Streams) -> None:
    seen(streams, "parastep-1", THERE)
    child = os.fork()
    if child == 0:
        try:
            seen(streams, "parastep-1", THERE)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
