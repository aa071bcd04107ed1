"""What the tests of the ComfyUI adapter share. COMFYUI_PATH is a checkout of ComfyUI, which is not
part of this repository: without it only the tests that need none run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
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
