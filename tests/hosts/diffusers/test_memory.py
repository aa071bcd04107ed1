"""Devices without room for a replica are left out before the run, with a warning."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import tiny  # noqa: E402
from hosting import caught, host, no_warnings  # noqa: E402

import parastep  # noqa: E402
from parastep.diffusers import memory, ranks  # noqa: E402

CASE, STEPS = tiny.CASES["sd"], 4


@pytest.fixture
def free(monkeypatch: Any) -> dict[str, int]:
    """Bytes that are free on each device that a test names."""
    found: dict[str, int] = {}
    for module in (memory, ranks):
        monkeypatch.setattr(module, "free_on", lambda device: found.get(str(device)))
    return found


def test_weights_are_counted_once() -> None:
    unet = host("sd").unet
    size = sum(p.numel() * 4 for p in unet.parameters()) + sum(
        b.numel() * 4 for b in unet.buffers()
    )
    assert memory.weights_of(host("sd")) == size


def test_a_device_without_room(free: dict[str, int]) -> None:
    size = memory.weights_of(host("sd"))
    free |= {"cpu:1": 10 * size, "cpu:2": size // 2, "cpu:3": 10 * size}
    devices = ["cpu", "cpu:1", "cpu:2", "cpu:3"]
    with parastep.parallelize(host("sd"), devices, mode="threads") as together:
        with caught() as texts:
            tiny.run(together, CASE.kwargs(steps=STEPS))
        assert len(texts) == 1 and "cpu:2 has no room for a replica" in texts[0]
        assert [str(device) for device in together.devices] == ["cpu", "cpu:1", "cpu:3"]
        with no_warnings():  # once is enough
            tiny.run(together, CASE.kwargs(steps=STEPS))
        free["cpu:2"] = 10 * size
        with no_warnings():
            tiny.run(together, CASE.kwargs(steps=STEPS))
        assert together.report.ranks == 4 and together.report.failures == []


def test_two_replicas_on_a_device_with_room_for_one(free: dict[str, int]) -> None:
    free["cpu:1"] = int(memory.weights_of(host("sd")) * 1.5)
    with parastep.parallelize(host("sd"), ["cpu", "cpu:1", "cpu:1"], mode="threads") as together:
        with caught() as texts:
            tiny.run(together, CASE.kwargs(steps=STEPS))
        assert len(texts) == 1 and together.report.ranks == 2


@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_a_forward_needs_room_too(free: dict[str, int], mode: str, monkeypatch: Any) -> None:
    """The leader's first forward tells how much. A device that is to have a replica after that is
    asked for both, as one that ran full in its own first forward is.
    """
    size = memory.weights_of(host("sd"))
    free |= {"cpu:1": 10 * size, "cpu:2": 10 * size}
    highest = iter([size])  # before the first forward, of its encoders
    monkeypatch.setattr(memory, "allocated_on", lambda _: (size // 2, next(highest, 12 * size)))
    with parastep.parallelize(host("sd"), ["cpu", "cpu:1", "cpu:2"], mode=mode) as together:
        with no_warnings():
            tiny.run(together, CASE.kwargs(steps=STEPS))
            tiny.run(together, CASE.kwargs(steps=STEPS))
        assert together._ranks._peak.bytes == 12 * size - size // 2
        assert together.report.ranks == 3
        together._ranks._drop(2)
        with caught() as texts:
            tiny.run(together, CASE.kwargs(steps=STEPS))
        assert len(texts) == 1 and "cpu:2 has no room for a replica" in texts[0]
        assert "with what a forward takes" in texts[0] and together.report.ranks == 2


def test_a_team_without_room_for_its_helper(free: dict[str, int]) -> None:
    """The rank is its head alone; a head without room leaves the rank to its helper."""
    free |= {"cpu:1": 0, "cpu:2": 0, "cpu:3": 1 << 40}
    teams = [("cpu", "cpu:1"), ("cpu:2", "cpu:3")]
    with parastep.parallelize(host("sd"), teams, mode="threads") as together:
        with caught() as texts:
            tiny.run(together, CASE.kwargs(steps=STEPS))
        assert len(texts) == 2 and together.report.teams == []
        assert [str(device) for device in together.devices] == ["cpu", "cpu:3"]
    with parastep.parallelize(host("wan"), [("cpu", "cpu:1")], tolerance=0) as together:
        with caught() as texts:
            tiny.run(together, tiny.CASES["wan"].kwargs(steps=STEPS))
        assert "cpu:1 has no room" in texts[0] and together.report.fallback is None
