"""Devices as a user writes them, on a machine that seems to have several; no ComfyUI is needed."""

from __future__ import annotations

import re
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

import parastep
from parastep.comfy import guidance
from parastep.comfy.places import Places, places_of
from parastep.comfy.sampling import Sampling

DEVICES = [torch.device("cuda", k) for k in range(4)]
NAMES = ["large", "small", "large", "small"]


@pytest.fixture(autouse=True)
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    management = types.ModuleType("comfy.model_management")
    vars(management)["get_torch_device"] = lambda: torch.device("cuda")
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    vars(sys.modules["comfy"])["model_management"] = management
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAMES[device.index])


def model(device: str) -> Any:
    return types.SimpleNamespace(load_device=torch.device(device))


@pytest.mark.parametrize(
    "home, written, found",
    [
        ("cuda:1", "cuda:1, cuda", [1, 0]),
        ("cuda:0", "cuda, cuda:1, cuda", [0, 1, 0]),
        ("cuda:0", "auto", [0, 2, 1, 3]),  # like ones beside each other
        ("cuda:1", "auto", [1, 3, 0, 2]),
    ],
)
def test_a_device_without_a_number_is_the_first(home: str, written: str, found: list[int]) -> None:
    places = places_of(model(home), written)
    assert places.teams == [(DEVICES[k],) for k in found] and places.auto == (written == "auto")


def pairs(*numbers: tuple[int, ...]) -> list[tuple[torch.device, ...]]:
    return [tuple(DEVICES[k] for k in team) for team in numbers]


@pytest.mark.parametrize(
    "written",
    [
        "cuda:0+cuda:1, cuda:2+cuda:3",
        " cuda +cuda:1,cuda:2 + cuda:3 ",
        "cuda:0 + cuda:1 cuda:2+cuda:3",
        ["cuda:0+cuda:1", ("cuda:2", torch.device("cuda", 3))],
        [("cuda:0", "cuda:1"), ["cuda:2", "cuda:3"]],
    ],
)
def test_pairs(written: Any) -> None:
    assert places_of(model("cuda:0"), written) == Places(pairs((0, 1), (2, 3)))


@pytest.mark.parametrize(
    "written, words",
    [
        ("cuda:0+cuda:1, cuda:2", "as many for each"),
        ("cuda:0+cuda:1, cuda:0+cuda:2", "cuda:0 is there twice"),
        ("cuda:0+cuda, cuda:2+cuda:3", "is there twice: a device shares in one rank's work"),
        ("cuda:0+cuda:0", "write each once"),
        ("cuda:0+cuda:7", "there is no cuda:7: PyTorch sees cuda:0, cuda:1, cuda:2, cuda:3"),
        ("cuda:0+gpu1", "'gpu1' is no device: write auto"),
        ("cuda:0+1", "'1' is no device: write cuda:1"),
        ("cuda:0+", "no device on one side of +: write pairs as"),
        ("+cuda:1", "no device on one side of +"),
        ("cuda:0++cuda:1", "no device on one side of +"),
        ("cuda:0, + ,cuda:1", "no device on one side of +"),
        ("cuda:0+auto", "write auto alone"),
        ("auto+auto", "write auto alone"),
        ("cuda:1+cuda:0", "begin with that one"),
        ("cuda:0+cpu, cuda:1+cpu:1", "of one kind on both sides"),
        ("", "or pairs as 'cuda:0"),
        ("  ", "or pairs as 'cuda:0"),
        ([()], "no device on one side of +"),
        ([("cuda:0", "cuda:1"), "cuda:2"], "as many for each"),
    ],
)
def test_what_cannot_be_a_pair_says_what_to_write(written: Any, words: str) -> None:
    with pytest.raises(parastep.Error, match=re.escape(words)):
        places_of(model("cuda:0"), written)


@pytest.mark.parametrize(
    "room, share, ranks, left",
    [
        ([0, 1, 2, 3], True, [(0, 1), (2, 3)], []),
        ([0, 1, 2, 3], False, [(0,), (1,), (2,), (3,)], []),
        ([0, 1, 2], True, [(0, 1)], ["cuda:2 is left out: its partner is missing"]),
        ([0, 2, 3], True, [(0,), (2, 3)], []),  # the leader is no faster than one of them alone
        ([0, 2], True, [(0,), (2,)], []),
        ([0], True, [(0,)], []),
    ],
)
def test_written_pairs_by_the_room_there_is(room: Any, share: bool, ranks: Any, left: Any) -> None:
    places = Places(pairs((0, 1), (2, 3)))
    assert places.may_share
    assert places.shared_out([DEVICES[k] for k in room], share) == (pairs(*ranks), left)


@pytest.mark.parametrize(
    "room, share, ranks, left",
    [
        ([0, 1, 2, 3], True, [(0, 1), (2, 3)], []),
        ([0, 1, 2, 3], False, [(0,), (1,), (2,), (3,)], []),
        ([0, 2, 3], True, [(0, 2)], ["cuda:3 is idle: it has no partner"]),
        ([0, 3], True, [(0, 3)], []),
        ([0], True, [(0,)], []),
    ],
)
def test_auto_makes_pairs_of_those_with_room(room: Any, share: bool, ranks: Any, left: Any) -> None:
    places = Places(pairs((0,), (1,), (2,), (3,)), auto=True)
    assert places.may_share and not places._replace(auto=False).may_share
    assert places.shared_out([DEVICES[k] for k in room], share) == (pairs(*ranks), left)


def test_pairs_of_which_one_cannot_have_a_replica() -> None:
    """A leader alone goes beside others as they are; a follower alone, not beside a whole pair."""
    written = Places(pairs((0, 1), (2, 3)))
    for kept, ranks, left in (([0, 1, 2], [(0, 1)], [2]), ([0, 2, 3], [(0,), (2, 3)], [])):
        places = written.with_devices([DEVICES[k] for k in kept])
        found, told = places.shared_out(places.devices, True)
        assert found == pairs(*ranks) and [int(line[5]) for line in told] == left
    assert not written.with_devices([DEVICES[0], DEVICES[2]]).may_share


def test_a_flat_list_keeps_its_meaning() -> None:
    places = places_of(model("cuda:0"), "cuda:0, cuda:1, cuda:0")
    assert not places.may_share
    assert places.shared_out(places.devices, True) == (pairs((0,), (1,), (0,)), [])


def test_a_model_on_a_device_without_a_number() -> None:
    """The host's own word for it is kept, by which it finds the model; tensors have the number."""
    found = places_of(model("cuda"), "cuda:0 cuda:1 cuda:0").devices
    assert found == [torch.device("cuda"), DEVICES[1], torch.device("cuda")]
    lanes = [types.SimpleNamespace(device=device) for device in found]
    assert [Sampling._place_of(lane, DEVICES[0]) for lane in lanes] == [*DEVICES[:2], DEVICES[0]]


def test_unguided_outputs_of_all_devices_meet_on_the_leaders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And are finished there where they were made, before another stream reads them."""
    finished: list[torch.device] = []
    monkeypatch.setattr(guidance, "finish_work", finished.append)
    rows = np.ones((3, 1))
    held = guidance.Guidance(rows, 2 * rows, torch.device("meta"))
    held.take(0, torch.ones(2, 4))
    assert {z.device.type for z in held.ahead(0, 3)} == {"meta"}
    assert finished == [torch.device("cpu")]
