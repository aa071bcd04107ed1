"""What the tests of the ComfyUI adapter share. COMFYUI_PATH is a checkout of ComfyUI, which is not
part of this repository: without it only the tests that need none run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfy_server import NO_HOST, PATH, Server


@pytest.fixture(scope="session")
def host() -> None:
    """The checkout, importable in this process."""
    if PATH is None:
        pytest.skip(NO_HOST)
    import inprocess

    inprocess.load_host()


@pytest.fixture(scope="session")
def server(tmp_path_factory: Any) -> Iterator[Server]:
    """A running server, one for all tests."""
    if PATH is None:
        pytest.skip(NO_HOST)
    made = Server(tmp_path_factory.mktemp("comfyui"))
    try:
        made.wait()
        yield made
    finally:
        made.stop()


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, host: None) -> Iterator[Any]:
    """{device: bytes} that the host is made to believe free; {} asks the real functions."""
    from comfy import model_management

    free, asked = {}, []
    real_free, real_room = model_management.get_free_memory, model_management.free_memory

    def told(device=None, torch_free_too=False):
        if device not in free:
            return real_free(device, torch_free_too)
        return (free[device], free[device]) if torch_free_too else free[device]

    def asking(wanted, device, *more, **others):
        asked.append((device, wanted))
        return real_room(wanted, device, *more, **others)

    devices = [torch.device(name) for name in ("cpu", "cpu:1", "cpu:2", "cpu:3")]
    monkeypatch.setattr(model_management, "get_free_memory", told)
    monkeypatch.setattr(model_management, "free_memory", asking)
    monkeypatch.setattr(
        model_management, "get_all_torch_devices", lambda **given: devices, raising=False
    )
    yield free, asked
    free.clear()
    for device in devices:
        real_room(1e30, device)
