"""Devices as a user writes them, on a machine that seems to have several; no ComfyUI is needed."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from parastep.comfy import guidance
from parastep.comfy.places import places_of
from parastep.comfy.sampling import Sampling

DEVICES = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    management = types.ModuleType("comfy.model_management")
    vars(management)["get_torch_device"] = lambda: torch.device("cuda")
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    vars(sys.modules["comfy"])["model_management"] = management
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def model(device: str) -> Any:
    return types.SimpleNamespace(load_device=torch.device(device))


@pytest.mark.parametrize(
    "home, written, found",
    [
        ("cuda:1", "cuda:1, cuda", [1, 0]),
        ("cuda:0", "cuda, cuda:1, cuda", [0, 1, 0]),
        ("cuda:0", "auto", [0, 1]),
        ("cuda:1", "auto", [1, 0]),
    ],
)
def test_a_device_without_a_number_is_the_first(home: str, written: str, found: list[int]) -> None:
    places = places_of(model(home), written)
    assert places.teams == [(DEVICES[k],) for k in found] and places.auto == (written == "auto")


def test_a_model_on_a_device_without_a_number() -> None:
    """The host's own word for it is kept, by which it finds the model; tensors have the number."""
    found = places_of(model("cuda"), "cuda:0 cuda:1 cuda:0").devices
    assert found == [torch.device("cuda"), DEVICES[1], torch.device("cuda")]
    lanes = [types.SimpleNamespace(device=device) for device in found]
    assert [Sampling._place_of(lane, DEVICES[0]) for lane in lanes] == [*DEVICES, DEVICES[0]]


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
