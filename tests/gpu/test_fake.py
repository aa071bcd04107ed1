"""Runs on CUDA devices, on the stand-in driver: the results of the CPU, in order, nothing left.

The stand-in complains of races, of memory used after it was freed and of broken rules; every test
ends with a look at what it has to say.
"""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
from cases import drawing, noise_of, smooth
from fake_arrays import Exchanged, Plain, Setting
from fake_runs import STEPS, euler, latents, on_device

import parastep
from parastep import _core

KINDS = [Plain, Exchanged]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8"])
@pytest.mark.parametrize("tolerance", ["rehearse", 0.05])
def test_a_run_on_a_device_is_that_on_the_cpu(
    fake: Any, kind: Any, dtype: str, tolerance: float
) -> None:
    x = latents(dtype)
    settings: Any = {"ranks": 4, "tolerance": tolerance, "max_stride": 1}
    expected, there = parastep.sample(euler(), smooth, x, **settings)
    result, here = parastep.sample(euler(), on_device(kind), kind.of(x), **settings)
    assert isinstance(result, kind)
    np.testing.assert_array_equal(result.numpy(), expected)
    assert here.failures == [] and here.rounds == there.rounds
    np.testing.assert_allclose(here.drift, there.drift, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_strides_and_the_second_device(fake: Any, kind: Any) -> None:
    program, noise, x = drawing(STEPS, 0.1), noise_of(STEPS, (2, 3, 50)), latents()
    expected, _ = parastep.sample(program, smooth, x, ranks=3, noise=noise)
    there = [kind.of(z, 1) for z in noise]
    result, report = parastep.sample(program, on_device(kind), kind.of(x, 1), ranks=3, noise=there)
    assert result.device == 1 and report.failures == []
    np.testing.assert_array_equal(result.numpy(), expected)


def drive(leader: Any, kind: Any, program: Any, x: Any, followers: list[int]) -> Any:
    """The leader's loop by hand, followers in threads; returns x_N."""
    threads = []

    def serve(follower: Any) -> None:
        try:
            while (work := follower.next()) is not None:
                follower.submit([on_device(kind)(point, step, 1) for step, point in work])
        except BaseException as error:
            follower.fail(repr(error))

    for rank in followers:
        threads.append(threading.Thread(target=serve, args=(leader.follower(rank),)))
        threads[-1].start()
    try:
        for step in range(len(program)):
            if not leader.ask(step, x, leader.output()):
                leader.submit(on_device(kind)(x, step, 0))
            x = leader.advance()
    finally:
        leader.finish()
        for thread in threads:
            thread.join(10)
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", [(2, 1, 1), (2, 1, 0), (2, 0, 1)])
def test_ranks_on_several_devices(fake: Any, kind: Any, setting: Any) -> None:
    """Direct copies, copies through the host, and a driver without memory pools."""
    fake.fake_set(Setting(*setting, 5))
    x = latents()
    expected, _ = parastep.sample(euler(), smooth, x, ranks=4, max_stride=1)
    leader = _core.Leader(euler(), kind.of(x), ranks=4, max_stride=1, devices=[0, 1, 0, 1])
    result = drive(leader, kind, euler(), kind.of(x), [1, 2, 3])
    assert leader.report()["failures"] == []
    np.testing.assert_array_equal(result.numpy(), expected)


def test_work_goes_to_the_stream_of_the_librarys_thread(fake: Any) -> None:
    x = latents()
    Plain.streams.clear()
    _core.copy(Plain.of(x))
    assert set(Plain.streams) == {1}  # the legacy default stream, which is what it works on
    copied = _core.copy(Exchanged.of(x))
    np.testing.assert_array_equal(copied.numpy(), x)


def test_what_lies_elsewhere_is_refused(fake: Any) -> None:
    x = latents()
    leader = _core.Leader(euler(), Plain.of(x))
    with pytest.raises(_core.DeviceError, match="x lies on the host, but the run is on cuda:0"):
        leader.ask(0, x)
    with pytest.raises(_core.DeviceError, match="cuda:1, but the run is on cuda:0"):
        leader.ask(0, Plain.of(x, 1))
    with pytest.raises(_core.DeviceError, match="CUDA device"):
        _core.Leader(euler(), x).ask(0, Plain.of(x))
    with pytest.raises(_core.DeviceError, match="rank 0 is on device 1, but x on 0"):
        _core.Leader(euler(), Plain.of(x), ranks=2, devices=[1, 0])
    with pytest.raises(_core.DeviceError, match="sees 2 CUDA devices"):
        _core.Leader(euler(), Plain.of(x), ranks=2, devices=[0, 2])
    with pytest.raises(_core.DeviceError, match="all on CUDA devices"):
        _core.Leader(euler(), Plain.of(x), ranks=2, devices=[0, -1])
    with pytest.raises(_core.InvalidError, match="3 numbers for 2 ranks"):
        _core.Leader(euler(), Plain.of(x), ranks=2, devices=[0, 1, 1])


def test_a_tensor_of_ours_on_a_device(fake: Any) -> None:
    class Dumb(Plain):
        """A library that takes nothing in: it gets our own tensors."""

        __array_namespace__ = None  # type: ignore[assignment]

    x = latents()
    ours = _core.copy(SimpleProducer(Dumb.of(x)))
    assert repr(ours) == "parastep.Tensor(shape=(2, 3, 50), dtype='float32', device='cuda:0')"
    assert ours.__dlpack_device__() == (2, 0)
    with pytest.raises(BufferError, match="memory of a device"):
        memoryview(ours)
    with pytest.raises(BufferError, match="stream must not be 0"):
        ours.__dlpack__(stream=0)
    with pytest.raises(BufferError, match="own device"):
        ours.__dlpack__(dl_device=(1, 0))
    taken = Plain.from_dlpack(ours)
    del ours
    np.testing.assert_array_equal(taken.numpy(), x)


class SimpleProducer:
    """`__dlpack__` and nothing else."""

    def __init__(self, array: Any) -> None:
        self.__dlpack__ = array.__dlpack__
        self.__dlpack_device__ = array.__dlpack_device__


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_follower_on_a_device_costs_nothing_but_speed(fake: Any, kind: Any) -> None:
    """It raises, hangs past its deadline while its device works for it, or returns NaN."""
    x = latents()
    expected, _ = parastep.sample(euler(), smooth, x, ranks=1, tolerance=0.0)
    hang = threading.Event()

    def denoiser(x: Any, step: int, rank: int) -> Any:
        if rank == 1 and step > 2:
            raise ValueError("no more")
        if rank == 2 and step > 2:
            hang.wait(20)
        m = smooth(x.numpy(), step, rank)
        return kind.of(m * np.nan if rank == 3 and step > 2 else m, x.device)

    with pytest.warns(parastep.FollowerWarning):
        result, report = parastep.sample(
            euler(), denoiser, kind.of(x), ranks=4, tolerance="rehearse", deadline=0.5
        )
    hang.set()
    time.sleep(0.2)
    np.testing.assert_array_equal(result.numpy(), expected)
    assert {line.rank for line in report.failures} == {1, 2, 3}


def test_a_device_that_hangs_is_a_follower_lost(fake: Any) -> None:
    """Its stream never ends: the leader goes on, and nothing is freed under it."""
    x = latents()
    expected, _ = parastep.sample(euler(), smooth, x, ranks=1, tolerance=0.0)
    leader = _core.Leader(
        euler(), Plain.of(x), ranks=2, devices=[0, 1], tolerance=0.0, deadline=0.3
    )
    follower = leader.follower(1)
    errors = []

    def serve() -> None:
        try:
            while (work := follower.next()) is not None:
                outputs = [on_device(Plain)(point, step, 1) for step, point in work]
                fake.fake_hang(1)
                follower.submit(outputs)
        except parastep.Error as error:
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    here = Plain.of(x)
    for step in range(STEPS):
        if not leader.ask(step, here, leader.output()):
            leader.submit(on_device(Plain)(here, step, 0))
        here = leader.advance()
    leader.finish()
    report = leader.report()
    assert [line[0] for line in report["failures"]] == [1]
    np.testing.assert_array_equal(here.numpy(), expected)
    fake.fake_hang(-1)
    thread.join(10)
    assert not thread.is_alive() and len(errors) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_ends_with_the_devices_work(fake: Any, kind: Any) -> None:
    """Not with its launch: by it followers are waited for, and the report tells it."""
    x, released = kind.of(latents()), []
    leader = _core.Leader(euler(), x)
    leader.ask(0, x)
    m = on_device(kind)(x, 0, 0)
    began = _core.now_ns()
    fake.fake_hang(0)

    def release() -> None:
        time.sleep(0.05)
        released.append(_core.now_ns())
        fake.fake_hang(-1)

    thread = threading.Thread(target=release)
    thread.start()
    leader.submit(m, began)
    thread.join()
    leader.finish()
    [record] = leader.report()["timeline"]
    assert 1e9 * (record[4] - record[3]) >= released[0] - began - 1e3


@pytest.mark.parametrize("function", ["cuMemAllocFromPoolAsync", "cuLaunchKernel", "cuMemcpyAsync"])
def test_a_failing_driver_is_an_error_and_the_next_run_is_fine(fake: Any, function: str) -> None:
    x = latents()
    settings: Any = {"ranks": 3, "tolerance": "rehearse"}
    expected, _ = parastep.sample(euler(), smooth, x, **settings)
    failed = 0
    for n in range(1, 40, 3):
        fake.fake_fail(function.encode(), n, 2)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result, _ = parastep.sample(euler(), on_device(Plain), Plain.of(x), **settings)
            np.testing.assert_array_equal(result.numpy(), expected)
        except parastep.Error:
            failed += 1
        fake.fake_fail(function.encode(), 0, 0)
    result, report = parastep.sample(euler(), on_device(Plain), Plain.of(x), **settings)
    np.testing.assert_array_equal(result.numpy(), expected)
    assert report.failures == []
    assert failed or function == "cuLaunchKernel"  # a build without kernels launches none


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8"])
def test_scattered_tensors_are_copied_by_their_library(fake: Any, kind: Any, dtype: str) -> None:
    """As on the host: x, outputs of all ranks, noise; what is to be written must be contiguous."""
    program, noise, x = drawing(STEPS, 0.1), noise_of(STEPS, (2, 3, 50)), latents(dtype)
    noise = [z.astype(dtype) for z in noise]
    settings: Any = {"ranks": 3, "max_stride": 1}
    expected, _ = parastep.sample(program, smooth, x, noise=noise, **settings)

    def denoiser(x: Any, step: int, rank: int) -> Any:
        return kind.scattered(smooth(x.numpy(), step, rank), x.device)

    there = [kind.scattered(z) for z in noise]
    result, report = parastep.sample(program, denoiser, kind.scattered(x), noise=there, **settings)
    np.testing.assert_array_equal(result.numpy(), expected)
    assert report.failures == []
    leader = _core.Leader(euler(), kind.of(x))
    with pytest.raises(_core.InvalidError, match="written in place"):
        leader.ask(0, kind.of(x), kind.scattered(x))


def test_scattered_tensors_that_nobody_copies(fake: Any) -> None:
    class Helpless(Plain):
        def __array_namespace__(self) -> Any:
            return object()

    with pytest.raises(_core.InvalidError, match=r"x is not contiguous in the memory of cuda:0"):
        _core.copy(Helpless.scattered(latents()))


def test_what_was_found_is_told(fake: Any) -> None:
    assert parastep.build_info()["backends"]["cuda"].startswith("2 devices")
