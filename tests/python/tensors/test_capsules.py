"""DLPack capsules and their producers: released once, whatever they say of themselves."""

import contextlib
import ctypes
import threading

import numpy as np
import pytest
from dlpack import NAMES, USED, capsule_name, new_capsule
from handmade import Handmade, OldProducer, Producer
from tensors import ADDRESS, COPIED, COUNT, READONLY, assert_reads, ramp, references, refusal

from parastep import _core

# ---- capsules ------------------------------------------------------------------------------------


both_kinds = pytest.mark.parametrize("versioned", [False, True], ids=["old", "versioned"])


@both_kinds
@pytest.mark.parametrize("wrap", [Handmade.capsule, Producer, OldProducer])
def test_managed_tensors_are_released_once(versioned, wrap):
    values = ramp(3, 4)
    made = Handmade(values, versioned)
    assert_reads(wrap(made), values)
    assert made.deleted == 1


@both_kinds
def test_a_capsule_is_used_once(versioned):
    made = Handmade(ramp(3), versioned)
    capsule = made.capsule()
    _core._roundtrip(capsule)
    assert capsule_name(capsule) == USED[versioned]
    refusal(ValueError, capsule, "used already")
    assert made.deleted == 1


@both_kinds
def test_one_of_many_threads_gets_the_capsule(versioned):
    made = Handmade(ramp(3), versioned)
    capsule = made.capsule()
    taken = []

    def take():
        with contextlib.suppress(_core.Error):
            taken.append(_core._roundtrip(capsule))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == made.deleted == 1


def test_versions_are_asked_for():
    new, old = Producer(Handmade(ramp(3))), OldProducer(Handmade(ramp(3), False))
    _core._roundtrip(new)
    _core._roundtrip(old)
    assert new.asked == [(1, 3)] and old.asked == [None]


def test_foreign_capsules():
    memory = ctypes.create_string_buffer(8)
    for name, shown in ((b"PyCapsule.other", "PyCapsule.other"), (b"", "''"), (None, "''")):
        refusal(TypeError, new_capsule(ctypes.addressof(memory), name, None), "capsule", shown)


def test_a_capsule_without_a_deleter():
    for versioned in NAMES:
        values = ramp(3)
        assert_reads(Handmade(values, versioned, deleter=False).capsule(), values)


def test_another_major_version_is_deleted_untouched():
    made = Handmade(ramp(3), major=2, data=1, shape=None, ndim=-5)
    refusal(_core.Error, made.capsule(), "2.0")
    assert made.deleted == 1


def test_a_newer_minor_version_is_read():
    values = ramp(3)
    made = Handmade(values, minor=99, flags=2 | 1 << 40)
    assert_reads(made.capsule(), values)
    assert made.deleted == 1


def test_read_only_flag():
    made = Handmade(ramp(3), flags=1)
    assert _core._view(made.capsule())[READONLY]
    refusal(ValueError, made.capsule(), "read-only", writable=True)
    assert made.deleted == 2 and made.values.any()


@both_kinds
def test_capsules_are_written_in_place(versioned):
    made = Handmade(ramp(3), versioned)
    _core._roundtrip(made.capsule(), writable=True)
    assert made.deleted == 1 and not made.values.any()


@both_kinds
def test_strides_may_be_missing(versioned):
    values = ramp(3, 4)
    assert_reads(Handmade(values, versioned, strides=None).capsule(), values)


@both_kinds
def test_byte_offset(versioned):
    values = ramp(8)
    made = Handmade(values, versioned, shape=(5,), byte_offset=12)
    assert _core._view(made.capsule())[ADDRESS] == values.ctypes.data + 12
    assert_reads(made.capsule(), values[3:])


def test_memory_that_is_not_aligned_is_copied():
    raw = np.frombuffer(b"abc" + ramp(4).tobytes(), np.uint8).copy()
    made = Handmade(raw, shape=(4,), strides=(1,), bits=32, byte_offset=3)
    assert _core._view(made.capsule())[COPIED]
    assert_reads(made.capsule(), ramp(4))
    refusal(ValueError, made.capsule(), "aligned", writable=True)
    assert made.deleted == 3


def test_a_tensor_without_dimensions_may_lack_a_shape():
    made = Handmade(ramp(1), shape=None, strides=None, ndim=0)
    assert_reads(made.capsule(), np.float32(0).reshape(()))


def test_empty_capsule():
    made = Handmade(ramp(0, 3), data=None, shape=(0, 2**62, 9))
    assert _core._view(made.capsule())[COUNT] == 0
    assert made.deleted == 1


@pytest.mark.parametrize("device", [3, 11])
def test_pinned_memory_is_host_memory(device):
    assert_reads(Handmade(ramp(3), device_type=device).capsule(), ramp(3))


@both_kinds
@pytest.mark.parametrize(
    "error, words, fields",
    [
        (_core.DeviceError, ["CUDA", "id 5", "cpu()"], {"device_type": 2, "device_id": 5}),
        (_core.DeviceError, ["managed"], {"device_type": 13}),
        (_core.DeviceError, ["Metal"], {"device_type": 8}),
        (_core.DeviceError, ["type -1"], {"device_type": -1}),
        (_core.DtypeError, ["int32"], {"code": 0}),
        (_core.DtypeError, ["uint8"], {"code": 1, "bits": 8}),
        (_core.DtypeError, ["complex64"], {"code": 5, "bits": 64}),
        (_core.DtypeError, ["bool"], {"code": 6, "bits": 8}),
        (_core.DtypeError, ["float8"], {"code": 12, "bits": 8}),
        (_core.DtypeError, ["float8"], {"code": 2, "bits": 8}),
        (_core.DtypeError, ["float128"], {"code": 2, "bits": 128}),
        (_core.DtypeError, ["bfloat32"], {"code": 4}),
        (_core.DtypeError, ["code 200"], {"code": 200}),
        (_core.DtypeError, ["4 x float32"], {"lanes": 4}),
        (_core.DtypeError, ["0 x float32"], {"lanes": 0}),
        (_core.ShapeError, ["9 dimensions"], {"shape": (1,) * 9, "strides": (1,) * 9}),
        (_core.ShapeError, ["-1 dimensions"], {"ndim": -1}),
        (_core.ShapeError, ["2147483647 dimensions"], {"ndim": 2**31 - 1}),
        (_core.ShapeError, ["no shape"], {"shape": None}),
        (_core.ShapeError, ["negative"], {"shape": (-3,)}),
        (_core.ShapeError, ["negative"], {"shape": (0, -3), "strides": (1, 1)}),
        (_core.ShapeError, ["fit in memory"], {"shape": (2**32, 2**32), "strides": (1, 1)}),
        (_core.ShapeError, ["fit in memory"], {"shape": (2**62,)}),
        (_core.ShapeError, ["strides"], {"strides": (2**62,)}),
        (_core.ShapeError, ["strides"], {"strides": (-(2**63),)}),
        (_core.ShapeError, ["strides"], {"strides": (2**61,)}),
        (_core.ShapeError, ["strides"], {"shape": (3, 3), "strides": (2**59, 2**59)}),
        (_core.Error, ["no memory"], {"data": None}),
        (_core.Error, ["no memory"], {"data": None, "byte_offset": 64}),
    ],
)
def test_refused_capsules_are_released_once(versioned, error, words, fields):
    made = Handmade(ramp(3), versioned, **fields)
    refusal(error, made.capsule(), *words)
    assert made.deleted == 1
    refusal(error, made.capsule(), *words, writable=False)
    refusal(error, Producer(made), *words)
    assert made.deleted == 3


@both_kinds
def test_what_cannot_be_written_is_released_once(versioned):
    made = Handmade(ramp(4, 4)[:, ::2], versioned)
    refusal(ValueError, made.capsule(), "contiguous", writable=True)
    assert made.deleted == 1


def test_the_source_of_a_copy_is_released_before_the_copy_is_used():
    made = Handmade(ramp(4, 4).T)
    seen = []

    class Watcher(Producer):
        def __dlpack__(self, *, max_version=None):
            seen.append(made.deleted)
            return made.capsule()

    assert_reads(Watcher(made), made.values)
    assert seen == [0] and made.deleted == 1


# ---- producers -----------------------------------------------------------------------------------


def test_errors_of_a_producer_become_the_cause():
    class Refuses:
        def __dlpack__(self, **_options):
            raise BufferError("not today")

    error = refusal(ValueError, Refuses(), "Refuses", "not today")
    assert isinstance(error.__cause__, BufferError)


def test_an_interrupt_of_a_producer_passes():
    class Interrupted:
        def __dlpack__(self, **_options):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _core._roundtrip(Interrupted())


def test_a_type_error_that_stays():
    class Broken:
        def __dlpack__(self, **_options):
            return None + 1

    assert isinstance(refusal(ValueError, Broken(), "NoneType").__cause__, TypeError)


def test_a_producer_of_something_else():
    class Wrong:
        def __dlpack__(self, **_options):
            return "capsule"

    refusal(TypeError, Wrong(), "str", "not a capsule")


def test_errors_of_attributes_pass():
    class Strange:
        @property
        def __dlpack__(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _core._roundtrip(Strange())


def test_producers_are_given_back():
    made = Handmade(ramp(3))
    producer = Producer(made)
    count = references(producer)
    _core._roundtrip(producer)
    made.managed.tensor.lanes = 2
    refusal(TypeError, producer)
    assert references(producer) == count


def test_capsules_of_producers_are_given_back():
    class Keeps(Producer):
        def __dlpack__(self, *, max_version=None):
            return self.capsule

    keeper = Keeps(None)
    keeper.capsule = Handmade(ramp(3)).capsule()
    count = references(keeper.capsule)
    _core._roundtrip(keeper)
    refusal(ValueError, keeper, "used already")
    after = references(keeper.capsule)
    assert after == count
