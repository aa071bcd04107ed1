"""The stand-in libraries as fixtures, and a look at what they have to say after every test."""

from __future__ import annotations

import ctypes
import gc
import shutil
import time
from collections.abc import Iterator
from typing import Any

import fake_arrays
import numpy as np
import pytest
from fake_arrays import Plain, Setting

from parastep import _core


def _driver_is_loaded() -> bool:
    with open("/proc/self/maps") as maps:
        return any("libcuda.so" in line for line in maps)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the stand-in driver with")
    if _driver_is_loaded():
        pytest.skip("a CUDA driver is loaded already")
    return fake_arrays.load(fake_arrays.build(tmp_path_factory.mktemp("fake")))


@pytest.fixture(scope="session")
def nccl_library(library: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    built = fake_arrays.build_nccl(tmp_path_factory.mktemp("fake-nccl"))
    return ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)


@pytest.fixture
def fake(library: Any) -> Iterator[Any]:
    library.fake_set(Setting(2, 1, 1, 7))
    fake_arrays.Array.fake = library
    library.fake_drain()
    before, idle = library.fake_count(), _core._pinned_idle()
    yield library
    gc.collect()  # exceptions hold frames, and these what they held
    library.fake_hang(-1)
    library.fake_fail(b"", 0, 0)
    for _ in range(2):  # what outlasted its run is buried by the next one
        library.fake_drain()
        _core.copy(Plain.of(np.zeros(1, "f4")))
    library.fake_drain()
    assert library.fake_complaint() is None
    after, kept = library.fake_count(), _core._pinned_idle()
    assert (after.blocks, after.pinned - kept) == (before.blocks, before.pinned - idle)


@pytest.fixture
def nccl(fake: Any, nccl_library: Any) -> Iterator[Any]:
    """Every communicator has ended by the end of the test, in whatever thread that takes."""
    yield nccl_library
    nccl_library.fake_nccl_fail(b"", 0, 0)
    end = time.monotonic() + 20
    while nccl_library.fake_nccl_live() > 0:
        assert time.monotonic() < end
        gc.collect()  # a thread that receives frames may have held a link, and this its pair
        _core.copy(Plain.of(np.zeros(1, "f4")))  # what has ended is destroyed with something new
        fake.fake_drain()
        time.sleep(0.001)
