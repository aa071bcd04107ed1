"""Tensors into and out of the binding: what is read, what is refused and why, what is given back.

Capsules and exchange tables that no library would hand out are made with ctypes.
"""

import array
import contextlib
import ctypes
import gc
import itertools
import os
import resource
import subprocess
import sys
import textwrap
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parastep import _core

try:
    import torch
except ImportError:
    torch = None
try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

needs_torch = pytest.mark.skipif(torch is None, reason="no torch")
needs_ml_dtypes = pytest.mark.skipif(ml_dtypes is None, reason="no ml_dtypes")
needs_exchange = pytest.mark.skipif(
    not hasattr(getattr(torch, "Tensor", None), "__dlpack_c_exchange_api__"),
    reason="no torch with the C exchange API",
)

ADDRESS, DTYPE, COUNT, NDIM, READONLY, COPIED = range(6)  # fields of _core._view

DTYPES = ["float32", "float16", "float64"]


# ---- DLPack by hand ------------------------------------------------------------------------------


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
capsule_pointer.restype = ctypes.c_void_p
capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
capsule_name = ctypes.pythonapi.PyCapsule_GetName
capsule_name.restype = ctypes.c_char_p
capsule_name.argtypes = [ctypes.py_object]
rename_capsule = ctypes.pythonapi.PyCapsule_SetName
rename_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]

NAMES = {False: b"dltensor", True: b"dltensor_versioned"}  # capsules keep the pointer
USED = {False: b"used_dltensor", True: b"used_dltensor_versioned"}


class Handmade:
    """A managed tensor over a NumPy array, any field of which can be wrong; counts deletions."""

    alive = []  # capsules hold a bare address

    def __init__(self, values, versioned=True, major=1, minor=0, flags=0, deleter=True, **fields):
        self.alive.append(self)
        self.values = values
        self.versioned = versioned
        self.deleted = 0
        self.callback = Deleter(self.delete) if deleter else Deleter()
        if versioned:
            self.managed = Versioned(major=major, minor=minor, deleter=self.callback, flags=flags)
        else:
            self.managed = Managed(deleter=self.callback)
        self.describe(self.managed.tensor, **fields)

    def describe(self, tensor, **fields):
        shape = fields.pop("shape", self.values.shape)
        strides = fields.pop("strides", "of values")
        if isinstance(strides, str):
            strides = [stride // self.values.itemsize for stride in self.values.strides]
        tensor.data = self.values.ctypes.data
        tensor.device_type = 1
        tensor.ndim = len(shape) if shape is not None else 1
        tensor.code, tensor.bits, tensor.lanes = 2, 8 * self.values.itemsize, 1
        if shape is not None:
            tensor.shape = (ctypes.c_int64 * len(shape))(*shape)
        if strides is not None:
            tensor.strides = (ctypes.c_int64 * len(strides))(*strides)
        for name, value in fields.items():
            setattr(tensor, name, value)

    def delete(self, _pointer):
        self.deleted += 1

    def capsule(self):
        return new_capsule(ctypes.addressof(self.managed), NAMES[self.versioned], None)


class Producer:
    """Speaks DLPack 1: hands out the capsule of a managed tensor."""

    def __init__(self, made):
        self.made = made
        self.asked = []

    def __dlpack__(self, *, max_version=None):
        self.asked.append(max_version)
        return self.made.capsule()


class OldProducer(Producer):
    def __dlpack__(self, *, stream=None):
        self.asked.append(None)
        return self.made.capsule()


@pytest.fixture(autouse=True)
def let_go_of_handmade_tensors():
    yield
    Handmade.alive.clear()


def ramp(*shape, dtype=np.float32):
    return np.arange(np.prod(shape, dtype=int), dtype=dtype).reshape(shape)


def assert_reads(obj, expected):
    result = _core._roundtrip(obj)
    assert type(result) is _core.Tensor
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype.name
    np.testing.assert_array_equal(np.asarray(result), expected)


def references(*objects):
    gc.collect()  # a caught exception and its frames are a cycle
    return [sys.getrefcount(obj) for obj in objects]


def refusal(error, obj, *words, **options):
    with pytest.raises(error) as caught:
        _core._roundtrip(obj, name="guess", **options)
    assert isinstance(caught.value, _core.Error)
    text = str(caught.value)
    assert "guess" in text
    for word in words:
        assert word in text, text
    return caught.value


# ---- NumPy in ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4), (1,) * 8])
def test_numpy_is_read_in_place(dtype, shape):
    values = ramp(*shape, dtype=dtype)
    view = _core._view(values)
    assert view == (values.ctypes.data, dtype, values.size, values.ndim, False, False)
    assert_reads(values, values)


@pytest.mark.parametrize(
    "cut",
    [
        lambda a: a.T,
        lambda a: a[::-1],
        lambda a: a[:, ::2],
        lambda a: a[:, :, ::-3],
        lambda a: a[1:, :, 2:],
        lambda a: a.transpose(1, 2, 0)[::-1, ::2],
        lambda a: np.broadcast_to(a, (3, *a.shape)),
        lambda a: np.broadcast_to(a[0, 0, 0], (7,)),
        lambda a: np.asfortranarray(a),
        lambda a: a.astype(a.dtype.newbyteorder("S")),
        lambda a: a.astype(a.dtype.newbyteorder("S"))[:, ::-2],
        lambda a: np.frombuffer(b"?" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
        lambda a: np.array([(0, 1.5), (1, 2.5)], [("pad", "u1"), ("x", a.dtype)])["x"],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_that_is_not_plain_is_copied(cut, dtype):
    values = cut(ramp(4, 6, 5, dtype=dtype))
    view = _core._view(values)
    assert view[COPIED] and view[ADDRESS] != values.ctypes.data
    assert_reads(values, values.astype(dtype))
    if values.flags.writeable:
        refusal(ValueError, values, "contiguous", "native", writable=True)


def test_strides_of_short_dimensions_say_nothing():
    values = np.lib.stride_tricks.as_strided(ramp(12), (1, 3, 1, 4), (77, 16, -5, 4))
    assert not _core._view(values)[COPIED]
    assert_reads(values, values)


@settings(deadline=None)
@given(st.data())
def test_any_slice_reads_as_numpy_says(data):
    shape = data.draw(st.lists(st.integers(1, 5), max_size=5))
    values = ramp(*shape, dtype=data.draw(st.sampled_from(DTYPES)))
    values = values.transpose(data.draw(st.permutations(range(values.ndim))))
    steps = st.sampled_from([-3, -2, -1, 1, 2, 3])
    values = values[tuple(slice(None, None, data.draw(steps)) for _ in shape)]
    assert_reads(values, values)


@settings(deadline=None)
@given(st.data())
def test_any_stride_reads_as_numpy_says(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    strides = [data.draw(st.integers(-9, 9)) for _ in shape]
    memory = ramp(400)
    start = memory[200:]
    expected = np.lib.stride_tricks.as_strided(start, shape, [4 * stride for stride in strides])
    made = Handmade(start, shape=shape, strides=strides, byte_offset=0)
    assert_reads(made.capsule(), expected)
    assert made.deleted == 1


def test_large_arrays_are_copied_while_other_threads_run():
    values = ramp(64, 64, 64)[:, ::-1]
    expected = np.ascontiguousarray(values)
    wrong = []

    def read():
        for _ in range(20):
            if not np.array_equal(np.asarray(_core._roundtrip(values)), expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_numpy_is_written_in_place():
    values = ramp(2, 3)
    before = values.copy()
    result = _core._roundtrip(values, writable=True)
    np.testing.assert_array_equal(np.asarray(result), before)
    assert not values.any()


def test_read_only_numpy_is_read_but_not_written():
    values = ramp(2, 3)
    values.flags.writeable = False
    assert _core._view(values)[READONLY]
    assert_reads(values, values)
    refusal(ValueError, values, "read-only", "copy", writable=True)
    assert values.any()


@pytest.mark.parametrize(
    "values",
    [
        ramp(3, dtype=np.int64),
        ramp(3, dtype=np.uint8),
        np.zeros(3, bool),
        np.zeros(3, np.complex64),
        np.zeros(3, np.longdouble),
        np.zeros(3, object),
        np.zeros(3, "datetime64[s]"),
        np.zeros(3, "V2"),
        np.zeros(3, [("x", "f4")]),
        np.array(["a"]),
    ],
    ids=lambda values: str(values.dtype),
)
def test_numpy_dtypes_that_are_refused(values):
    refusal(TypeError, values, str(values.dtype), "float32")
    assert isinstance(refusal(_core.DtypeError, values), TypeError)


def test_too_many_dimensions():
    refusal(_core.ShapeError, np.zeros((1,) * 9, np.float32), "9 dimensions", "8")


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5, 0)])
@pytest.mark.parametrize("writable", [False, True])
def test_empty_tensors_are_taken_in_for_the_caller_to_judge(shape, writable):
    values = np.empty(shape, np.float32)
    assert _core._view(values, writable=writable)[COUNT] == 0
    assert _core._roundtrip(values, writable=writable).shape == shape


def test_numpy_subclasses(tmp_path):
    (tmp_path / "x").write_bytes(ramp(6).tobytes())
    mapped = np.memmap(tmp_path / "x", np.float32, "r")
    assert_reads(mapped, ramp(6))
    refusal(ValueError, mapped, "read-only", writable=True)
    assert type(_core._like(mapped)) is np.ndarray


@needs_ml_dtypes
def test_numpy_bfloat16():
    values = ramp(4, 6).astype(ml_dtypes.bfloat16)
    assert _core._view(values) == (values.ctypes.data, "bfloat16", 24, 2, False, False)
    strided = values[::-1, ::2]
    result = _core._like(strided)
    assert type(result) is np.ndarray and result.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(result, strided)
    other = _core._like(ramp(3), dtype="bfloat16")
    assert other.dtype == ml_dtypes.bfloat16 and not other.any()
    refusal(TypeError, ramp(3).astype(ml_dtypes.float8_e5m2), "float8")


def test_references_to_numpy_are_given_back():
    plain, strided, wrong = ramp(4, 6), ramp(4, 6)[:, ::2], ramp(4, dtype=np.int32)
    counts = references(plain, strided, wrong)
    for _ in range(5):
        _core._roundtrip(plain)
        _core._roundtrip(strided)
        _core._like(plain)
        refusal(TypeError, wrong)
        refusal(ValueError, strided, writable=True)
    assert references(plain, strided, wrong) == counts


# ---- what is not a tensor ------------------------------------------------------------------------


@pytest.mark.parametrize("obj", [None, 1, 1.5, "x", [1.0], (1.0,), {}, object(), np, len])
def test_other_objects(obj):
    refusal(TypeError, obj, "not a tensor", type(obj).__name__, "__dlpack__")


@pytest.mark.parametrize("kind", [np.ndarray, Producer, _core.Tensor, array.array])
def test_a_class_is_not_a_tensor(kind):
    refusal(TypeError, kind, "the class", kind.__name__.rsplit(".")[-1])


# ---- buffers in ----------------------------------------------------------------------------------


def test_buffers():
    values = ramp(3, 4)
    assert_reads(memoryview(values), values)
    assert _core._view(memoryview(values))[ADDRESS] == values.ctypes.data
    assert_reads(memoryview(values.T), values.T)
    assert_reads(memoryview(values.astype(">f4")), values)
    assert_reads(array.array("d", [1, 2]), np.array([1.0, 2.0]))
    assert_reads((ctypes.c_float * 3)(1, 2, 3), np.array([1, 2, 3], np.float32))
    assert_reads(np.float16(2.5), np.array(2.5, np.float16))


def test_buffers_are_locked_only_during_the_call():
    numbers = array.array("f", [1, 2, 3])
    refusal(ValueError, memoryview(numbers).toreadonly(), "read-only", writable=True)
    refusal(ValueError, memoryview(numbers)[::2], "contiguous", writable=True)
    numbers = array.array("f", [1, 2, 3])
    _core._roundtrip(numbers, writable=True)
    assert list(numbers) == [0, 0, 0]
    numbers.append(4)  # BufferError while a buffer is held


@pytest.mark.parametrize(
    "obj", [b"abcd", bytearray(8), array.array("i", [1]), memoryview(np.zeros(2, np.complex64))]
)
def test_buffers_of_other_formats(obj):
    refusal(TypeError, obj, "format", "'f'")


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


# ---- the C exchange API --------------------------------------------------------------------------

Allocate = ctypes.PYFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
Convert = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
Describe = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(DLTensor))


class Table(ctypes.Structure):
    pass


Table._fields_ = [
    ("major", ctypes.c_uint32),
    ("minor", ctypes.c_uint32),
    ("previous", ctypes.POINTER(Table)),
    ("allocate", Allocate),
    ("managed_from_object", Convert),
    ("managed_to_object", Convert),
    ("tensor_from_object", Describe),
    ("current_stream", ctypes.c_void_p),
]


def exchanging(attribute="__dlpack_c_exchange_api__", borrows=True, works=True, **fields):
    """A type whose instances wrap a Handmade and offer an exchange table, and the calls it got."""
    calls = []

    def managed_from_object(obj, out):
        calls.append("managed")
        out[0] = ctypes.addressof(ctypes.cast(obj, ctypes.py_object).value.made.managed)
        return 0

    def tensor_from_object(obj, out):
        calls.append("borrowed")
        made = ctypes.cast(obj, ctypes.py_object).value.made
        ctypes.pointer(out[0])[0] = made.managed.tensor
        return 0

    def managed_to_object(managed, out):
        calls.append("taken")
        if not works:
            Versioned.from_address(managed).deleter(managed)
            return -1
        tensor = _core._roundtrip(new_capsule(managed, NAMES[True], None))
        result = Exchanged(tensor)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(result))
        out[0] = id(result)
        return 0

    table = Table(
        major=1,
        minor=3,
        managed_from_object=Convert(managed_from_object),
        managed_to_object=Convert(managed_to_object),
        tensor_from_object=Describe(tensor_from_object) if borrows else Describe(),
        **fields,
    )

    class Exchanged:
        keep = table

        def __init__(self, made):
            self.made = made

    capsule = new_capsule(ctypes.addressof(table), b"dlpack_exchange_api", None)
    setattr(Exchanged, attribute, capsule)
    return Exchanged, calls


@pytest.mark.parametrize("attribute", ["__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"])
def test_exchange_borrows_what_is_read(attribute):
    kind, calls = exchanging(attribute)
    made = Handmade(ramp(3, 4)[:, ::-1])
    obj = kind(made)
    count = references(obj)
    assert_reads(obj, made.values)
    assert calls == ["borrowed"] and made.deleted == 0
    assert references(obj) == count


def test_exchange_owns_what_it_writes():
    kind, calls = exchanging()
    made = Handmade(ramp(3))
    _core._roundtrip(kind(made), writable=True)
    assert calls == ["managed"] and made.deleted == 1 and not made.values.any()
    made = Handmade(ramp(3), flags=1)
    refusal(ValueError, kind(made), "read-only", writable=True)
    assert made.deleted == 1 and made.values.any()


def test_exchange_without_borrowing():
    kind, calls = exchanging(borrows=False)
    made = Handmade(ramp(3))
    assert_reads(kind(made), made.values)
    assert calls == ["managed"] and made.deleted == 1


def test_exchange_refuses_like_any_other():
    kind, _ = exchanging()
    made = Handmade(ramp(3), device_type=2)
    obj = kind(made)
    count = references(obj)
    refusal(_core.DeviceError, obj, "CUDA")
    refusal(_core.DeviceError, obj, "CUDA", writable=True)
    assert made.deleted == 1 and references(obj) == count


def test_exchange_of_another_major_version():
    kind, calls = exchanging()
    old = kind.keep
    newer = Table(major=2, previous=ctypes.pointer(old))
    kind.__dlpack_c_exchange_api__ = new_capsule(
        ctypes.addressof(newer), b"dlpack_exchange_api", None
    )
    assert_reads(kind(Handmade(ramp(3))), ramp(3))
    assert calls == ["borrowed"]
    newer.previous = None
    refusal(TypeError, kind(Handmade(ramp(3))), "not a tensor")


@pytest.mark.parametrize("table", [12345, None, "x", "a capsule"])
def test_an_exchange_attribute_that_is_no_table_is_passed_over(table):
    class Early(Producer):
        __dlpack_c_exchange_api__ = table

    if table == "a capsule":
        Early.__dlpack_c_exchange_api__ = Handmade(ramp(1)).capsule()

    made = Handmade(ramp(3))
    assert_reads(Early(made), ramp(3))
    assert made.deleted == 1


def test_where_exchange_fails_dlpack_is_asked():
    kind, _ = exchanging()
    # PyObject_IsTrue stands for a function that fails with an exception set.
    failing = ctypes.cast(ctypes.pythonapi.PyObject_IsTrue, Describe)
    kind.keep.tensor_from_object = failing
    made = Handmade(ramp(3))

    class Falls(kind, Producer):
        asked = []

        def __bool__(self):
            raise self.error

    obj = Falls(made)
    obj.error = RuntimeError("sparse")
    assert_reads(obj, ramp(3))
    assert made.deleted == 1 and obj.asked == [(1, 3)]
    obj.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        _core._roundtrip(obj)


def test_like_goes_through_the_exchange():
    kind, calls = exchanging()
    result = _core._like(kind(Handmade(ramp(3))))
    assert type(result) is kind and calls == ["borrowed", "taken"]
    assert_reads(result.made, ramp(3))


def test_like_where_the_exchange_fails():
    kind, calls = exchanging(works=False)
    with pytest.raises(_core.Error, match="failed to take in"):
        _core._like(kind(Handmade(ramp(3))))
    assert calls == ["borrowed", "taken"]


# ---- torch in ------------------------------------------------------------------------------------

TORCH_DTYPES = [*DTYPES, "bfloat16"]


def torch_ramp(*shape, dtype="float32"):
    return torch.arange(float(np.prod(shape, dtype=int))).reshape(shape).to(getattr(torch, dtype))


@needs_torch
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_torch_is_read_in_place(dtype, shape):
    values = torch_ramp(*shape, dtype=dtype)
    view = _core._view(values)
    assert view[:NDIM] == (values.data_ptr(), dtype, values.numel())
    assert not view[READONLY] and not view[COPIED]
    assert torch.equal(torch.from_dlpack(_core._roundtrip(values)), values)


@needs_torch
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t.transpose(0, 2),
        lambda t: t[:, ::2],
        lambda t: t.expand(3, *t.shape),
        lambda t: t[:, None].to(memory_format=torch.channels_last),
        lambda t: t.unfold(1, 3, 1),
    ],
)
def test_torch_that_is_not_contiguous_is_copied(cut, dtype):
    values = cut(torch_ramp(4, 6, 5, dtype=dtype))
    assert _core._view(values)[COPIED] or values.is_contiguous()
    assert torch.equal(torch.from_dlpack(_core._roundtrip(values)), values)


@needs_torch
def test_torch_slices_start_where_they_start():
    values = torch_ramp(10)
    assert _core._view(values[3:])[ADDRESS] == values.data_ptr() + 12
    assert_reads(values[3:], ramp(10)[3:])


@needs_torch
def test_torch_is_written_in_place():
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            values = torch_ramp(2, 3)
            _core._roundtrip(values, writable=True)
            assert not values.any()
    refusal(ValueError, torch_ramp(2, 3).T, "contiguous", writable=True)


@needs_torch
def test_torch_that_requires_grad_is_read_but_not_written():
    values = torch_ramp(3).requires_grad_()
    for tensor in (values, values * 1, torch.nn.Parameter(values)):
        assert_reads(tensor, ramp(3))
        refusal(ValueError, tensor, "requires grad", "detach", writable=True)
    _core._roundtrip(values.detach(), writable=True)
    assert not values.any()


@needs_torch
def test_torch_without_the_exchange_api():
    class Early:
        """What a torch before 2.10 answers: no table, no max_version, no gradients."""

        def __init__(self, tensor):
            self.tensor = tensor
            self.requires_grad = tensor.requires_grad

        def detach(self):
            return Early(self.tensor.detach())

        def __dlpack__(self, stream=None):
            return self.tensor.__dlpack__()

    assert_reads(Early(torch_ramp(3, 4).T), ramp(3, 4).T)
    assert_reads(Early(torch_ramp(3).requires_grad_()), ramp(3))
    refusal(ValueError, Early(torch_ramp(3).requires_grad_()), "requires grad", writable=True)


@needs_torch
@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: torch.zeros(3, dtype=torch.int64), TypeError, ["int64", "float32"]),
        (lambda: torch.zeros(3, dtype=torch.bool), TypeError, ["bool"]),
        (lambda: torch.zeros(3, dtype=torch.complex64), TypeError, ["complex64"]),
        # An older torch refuses these two by itself, which is an error of another class.
        (lambda: torch.zeros(3, dtype=torch.complex64).conj(), _core.Error, []),
        (lambda: torch.zeros(3).to(torch.float8_e5m2), _core.Error, ["float8"]),
        (lambda: torch.zeros(3, device="meta"), ValueError, ["meta"]),
        (lambda: torch.zeros(3).to_sparse(), ValueError, ["layout"]),
        (lambda: torch._neg_view(torch.ones(3)), ValueError, ["negated", "resolve_neg()"]),
        (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, ValueError, ["negated"]),
        (lambda: torch.zeros((1,) * 9), ValueError, ["9 dimensions"]),
    ],
)
def test_torch_tensors_that_are_refused(make, error, words):
    tensor = make()
    count = references(tensor)
    refusal(error, tensor, *words)
    refusal(error, tensor, writable=True)
    assert references(tensor) == count


@needs_torch
def test_fake_tensors_have_no_memory():
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode():
        tensor = torch.zeros(3)
    refusal(ValueError, tensor)
    refusal(ValueError, tensor, writable=True)


@needs_torch
def test_torch_references_are_given_back():
    plain, strided = torch_ramp(4, 6), torch_ramp(4, 6)[:, ::2]
    counts = references(plain, strided)
    for _ in range(5):
        _core._roundtrip(plain)
        _core._roundtrip(plain, writable=True)
        _core._roundtrip(strided)
        _core._roundtrip(plain.__dlpack__())
        _core._like(plain)
    assert references(plain, strided) == counts


# ---- of the caller's kind ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_like_numpy(dtype):
    values = ramp(4, 6, dtype=dtype)[:, ::-2]
    result = _core._like(values)
    assert type(result) is np.ndarray and result.dtype == dtype
    assert result.flags.c_contiguous and result.flags.owndata and result.flags.writeable
    np.testing.assert_array_equal(result, values)
    for name in set(DTYPES) - {dtype}:
        other = _core._like(values, dtype=name)
        assert other.dtype == name and other.shape == values.shape and not other.any()


def test_like_numpy_in_bfloat16_needs_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(_core.DtypeError, match="ml_dtypes"):
        _core._like(ramp(3), dtype="bfloat16")


@needs_torch
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_like_torch(dtype):
    values = torch_ramp(4, 6, dtype=dtype).T
    result = _core._like(values)
    assert type(result) is torch.Tensor and result.is_contiguous()
    assert not result.requires_grad
    assert torch.equal(result, values)
    result.add_(1)
    other = _core._like(values, dtype="bfloat16")
    assert other.dtype == torch.bfloat16 or dtype == "bfloat16"
    assert other.shape == values.shape and (dtype == "bfloat16" or not other.any())


@needs_torch
def test_like_a_parameter_is_a_tensor():
    result = _core._like(torch.nn.Parameter(torch.ones(3)))
    assert type(result) is torch.Tensor and not result.requires_grad


@needs_torch
def test_memory_of_a_torch_result_ends_with_its_last_view():
    result = _core._like(torch_ramp(1000))
    view = result[500:]
    del result
    gc.collect()
    assert torch.equal(view, torch_ramp(1000)[500:])


def test_like_through_an_array_namespace():
    class Space:
        @staticmethod
        def from_dlpack(obj):
            return Library(np.from_dlpack(obj))

    class Library:
        def __init__(self, values):
            self.values = values

        def __array_namespace__(self):
            return Space

        def __dlpack__(self, **options):
            return self.values.__dlpack__(**options)

    result = _core._like(Library(ramp(3)))
    assert type(result) is Library
    np.testing.assert_array_equal(result.values, ramp(3))
    # What is written afterwards is seen, as the memory is shared.
    assert not _core._like(Library(ramp(3)), dtype="float64").values.any()


def test_like_where_the_library_copies():
    class Space:
        @staticmethod
        def from_dlpack(obj):
            return np.array(np.from_dlpack(obj))

    class Copies(Producer):
        def __array_namespace__(self):
            return Space

    result = _core._like(Copies(Handmade(ramp(3))))
    assert type(result) is _core.Tensor  # what is written to it would not be seen in a copy
    assert_reads(result, ramp(3))


def test_like_through_the_package_of_the_type(monkeypatch):
    package = type(sys)("grove")
    package.from_dlpack = np.from_dlpack
    monkeypatch.setitem(sys.modules, "grove", package)

    class Leaf(Producer):
        __module__ = "grove.leaf"

    result = _core._like(Leaf(Handmade(ramp(3))))
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, ramp(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: _core._roundtrip(ramp(3)),
        lambda: Handmade(ramp(3)).capsule(),
        lambda: Producer(Handmade(ramp(3))),
        lambda: array.array("f", [0, 1, 2]),
        lambda: memoryview(ramp(3)),
    ],
)
def test_like_anything_else_is_ours(make):
    result = _core._like(make())
    assert type(result) is _core.Tensor
    assert_reads(result, ramp(3))


def test_errors_of_from_dlpack_pass():
    class Space:
        @staticmethod
        def from_dlpack(obj):
            raise ZeroDivisionError

    class Fails(Producer):
        def __array_namespace__(self):
            return Space

    with pytest.raises(ZeroDivisionError):
        _core._like(Fails(Handmade(ramp(3))))


# ---- our Tensor ----------------------------------------------------------------------------------


def test_attributes():
    tensor = _core._roundtrip(ramp(2, 3, dtype=np.float64))
    assert tensor.shape == (2, 3) and tensor.ndim == 2
    assert tensor.dtype == "float64" and tensor.nbytes == 48
    assert repr(tensor) == "parastep.Tensor(shape=(2, 3), dtype='float64')"
    assert tensor.__dlpack_device__() == (1, 0)
    assert _core._view(tensor)[ADDRESS] % 64 == 0


def test_a_tensor_is_made_by_the_library_alone():
    tensor = _core._roundtrip(ramp(3))
    with pytest.raises(TypeError):
        _core.Tensor()
    with pytest.raises(TypeError):
        object.__new__(_core.Tensor)
    with pytest.raises(TypeError):
        type("Sub", (_core.Tensor,), {})
    with pytest.raises(TypeError):
        _core.Tensor.shape = 1
    with pytest.raises(AttributeError):
        tensor.shape = (1,)
    with pytest.raises(AttributeError):
        tensor.other = 1


def test_a_tensor_is_taken_in_again():
    tensor = _core._roundtrip(ramp(2, 3))
    assert_reads(tensor, ramp(2, 3))
    _core._roundtrip(tensor, writable=True)
    assert not np.asarray(tensor).any()


@needs_torch
def test_a_bfloat16_tensor_is_taken_in_again():
    tensor = _core._roundtrip(_core._roundtrip(torch_ramp(3, dtype="bfloat16")))
    assert torch.equal(torch.from_dlpack(tensor), torch_ramp(3, dtype="bfloat16"))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3), (1,) * 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_shares_the_memory(shape, dtype):
    values = ramp(*shape, dtype=dtype)
    tensor = _core._roundtrip(values)
    for array_of in (np.asarray, np.from_dlpack):
        shared = array_of(tensor)
        np.testing.assert_array_equal(shared, values)
        assert shared.dtype == dtype and shared.shape == shape
        if values.size:
            assert shared.ctypes.data == _core._view(tensor)[ADDRESS]
    np.asarray(tensor)[...] = 7
    assert (np.asarray(_core._roundtrip(tensor)) == 7).all()


def test_arrays_outlive_the_tensor():
    arrays = [share(_core._roundtrip(ramp(1000))) for share in (np.asarray, np.from_dlpack)]
    gc.collect()
    for values in arrays:
        np.testing.assert_array_equal(values, ramp(1000))


@needs_torch
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_torch_shares_the_memory(dtype):
    tensor = _core._roundtrip(torch_ramp(2, 3, dtype=dtype))
    shared = torch.from_dlpack(tensor)
    assert shared.data_ptr() == _core._view(tensor)[ADDRESS]
    del tensor
    shared += 1
    assert torch.equal(shared, torch_ramp(2, 3, dtype=dtype) + 1)
    copy = torch.from_dlpack(_core._roundtrip(shared).__dlpack__())  # an old capsule
    assert torch.equal(copy, shared)


@needs_torch
def test_bfloat16_has_no_buffer():
    with pytest.raises(BufferError, match="from_dlpack"):
        memoryview(_core._roundtrip(torch_ramp(3, dtype="bfloat16")))


def test_memoryview():
    view = memoryview(_core._roundtrip(ramp(2, 3)))
    assert view.shape == (2, 3) and view.strides == (12, 4) and view.format == "f"
    assert view.itemsize == 4 and view.nbytes == 24 and not view.readonly and view.c_contiguous
    assert view.tolist() == ramp(2, 3).tolist()
    assert bytes(_core._roundtrip(ramp(2, 3))) == ramp(2, 3).tobytes()
    assert np.frombuffer(_core._roundtrip(ramp(2, 3)), np.float32).shape == (6,)


class PyBuffer(ctypes.Structure):
    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


@contextlib.contextmanager
def buffer_of(obj, flags):
    buffer = PyBuffer()
    get = ctypes.pythonapi.PyObject_GetBuffer
    get(ctypes.py_object(obj), ctypes.byref(buffer), flags)
    yield buffer
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


SIMPLE, WRITABLE, FORMAT, ND, STRIDES = 0, 1, 4, 8, 0x18
C_CONTIGUOUS, F_CONTIGUOUS, ANY_CONTIGUOUS = 0x20 | STRIDES, 0x40 | STRIDES, 0x80 | STRIDES


def test_buffers_give_what_was_asked_for():
    tensor = _core._roundtrip(ramp(2, 3))
    count = references(tensor)
    with buffer_of(tensor, SIMPLE) as simple:
        assert (simple.ndim, simple.len) == (1, 24)
        assert not simple.shape and not simple.strides and simple.format is None
    with buffer_of(tensor, ND | WRITABLE) as shaped:
        assert shaped.ndim == 2 and shaped.shape[:2] == [2, 3] and not shaped.strides
    for flags in (STRIDES, C_CONTIGUOUS, ANY_CONTIGUOUS):
        with buffer_of(tensor, flags | FORMAT) as strided:
            assert strided.strides[:2] == [12, 4] and strided.format == b"f"
    with pytest.raises(BufferError, match="C-contiguous"), buffer_of(tensor, F_CONTIGUOUS):
        pass
    assert references(tensor) == count


@pytest.mark.parametrize("shape", [(), (5,), (1, 5, 1), (0, 3, 3)])
def test_some_shapes_are_contiguous_both_ways(shape):
    with buffer_of(_core._roundtrip(ramp(*shape)), F_CONTIGUOUS) as buffer:
        assert buffer.ndim == len(shape)


@pytest.mark.parametrize(
    "options, name",
    [
        ({}, b"dltensor"),
        ({"max_version": None}, b"dltensor"),
        ({"max_version": (0, 8)}, b"dltensor"),
        ({"max_version": (1, 0)}, b"dltensor_versioned"),
        ({"max_version": (1, 3)}, b"dltensor_versioned"),
        ({"max_version": (2, 0)}, b"dltensor_versioned"),
        ({"stream": None, "dl_device": None, "copy": None}, b"dltensor"),
        ({"stream": -1, "dl_device": (1, 0), "copy": False}, b"dltensor"),
    ],
)
def test_dlpack_options(options, name):
    tensor = _core._roundtrip(ramp(2, 3))
    capsule = tensor.__dlpack__(**options)
    assert capsule_name(capsule) == name
    kind = Versioned if name == NAMES[True] else Managed
    described = kind.from_address(capsule_pointer(capsule, name)).tensor
    assert described.data == _core._view(tensor)[ADDRESS]
    assert (described.device_type, described.device_id) == (1, 0)
    assert (described.code, described.bits, described.lanes) == (2, 32, 1)
    assert described.shape[:2] == [2, 3] and described.strides[:2] == [3, 1]
    assert described.byte_offset == 0
    assert_reads(capsule, ramp(2, 3))


def test_an_empty_tensor_exports_no_address():
    capsule = _core._roundtrip(ramp(0, 3)).__dlpack__()
    assert Managed.from_address(capsule_pointer(capsule, b"dltensor")).tensor.data is None


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_dlpack_copy(version):
    tensor = _core._roundtrip(ramp(3))
    capsule = tensor.__dlpack__(copy=True, max_version=version)
    if version:
        managed = Versioned.from_address(capsule_pointer(capsule, NAMES[True]))
        assert managed.flags == 2 and (managed.major, managed.minor) == (1, 3)
    _core._roundtrip(tensor, writable=True)
    assert_reads(capsule, ramp(3))


@pytest.mark.parametrize(
    "error, options",
    [
        (TypeError, {"max_version": 1}),
        (TypeError, {"max_version": (1,)}),
        (TypeError, {"max_version": ("1", "0")}),
        (TypeError, {"dl_device": "cpu"}),
        (OverflowError, {"max_version": (2**70, 0)}),
        (BufferError, {"dl_device": (2, 0)}),
        (BufferError, {"dl_device": (1, 1)}),
        (BufferError, {"stream": 1}),
        (BufferError, {"stream": "x"}),
        (TypeError, {"other": 1}),
    ],
)
def test_dlpack_options_that_are_refused(error, options):
    tensor = _core._roundtrip(ramp(3))
    with pytest.raises(error):
        tensor.__dlpack__(**options)
    with pytest.raises(TypeError):
        tensor.__dlpack__(None)


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_the_deleter_needs_no_gil_and_no_tensor(version):
    capsules = [_core._roundtrip(ramp(1000)).__dlpack__(max_version=version) for _ in range(8)]
    name, kind = (NAMES[True], Versioned) if version else (NAMES[False], Managed)

    def consume(capsule):
        pointer = capsule_pointer(capsule, name)
        rename_capsule(capsule, USED[version is not None])
        kind.from_address(pointer).deleter(pointer)  # ctypes lets go of the GIL around it

    threads = [threading.Thread(target=consume, args=(capsule,)) for capsule in capsules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_tensor_is_freed():
    made = _core._roundtrip(ramp(3))
    count = references(_core.Tensor)
    tensors = [_core._roundtrip(ramp(3)) for _ in range(10)]
    grown = references(_core.Tensor)
    del tensors
    shrunk = references(_core.Tensor)
    assert grown == [count[0] + 10] and shrunk == count
    with pytest.raises(TypeError):
        weakref.ref(made)


def test_tensors_outlive_the_interpreter():
    script = """
        import numpy as np
        from parastep import _core
        kept = np.from_dlpack(_core._roundtrip(np.ones(1000, np.float32)))
        capsule = _core._roundtrip(kept).__dlpack__()
        try:
            import torch
            also = torch.from_dlpack(_core._roundtrip(kept))
            own = _core._like(also)
        except ImportError:
            pass
        import builtins
        builtins.leftover = [kept, capsule, _core._roundtrip(kept)]
        builtins.leftover.append(builtins.leftover)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=240)


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
def test_nothing_leaks():
    """What every call takes must be given back: a leak of any kind here would be 100 MB or more."""
    with open("/proc/self/maps") as maps:
        if "libasan" in maps.read():
            pytest.skip("the sanitizer keeps freed memory for a while")
    values = ramp(512, 512)  # 1 MB
    strided = values[::-1]
    wrong = Handmade(strided)

    def work():
        _core._roundtrip(values)
        _core._roundtrip(strided)
        _core._like(strided)
        _core._roundtrip(values).__dlpack__(max_version=(1, 3))
        _core._roundtrip(values).__dlpack__(copy=True)
        _core._roundtrip(_core._roundtrip(values).__dlpack__())
        np.from_dlpack(_core._roundtrip(values))
        refusal(ValueError, wrong.capsule(), writable=True)
        if torch is not None:
            _core._like(torch.from_dlpack(_core._roundtrip(strided)).T)

    for _ in range(5):
        work()
    before = resident_bytes()
    for _ in range(100):
        work()
    assert resident_bytes() - before < 50e6


# ---- the private functions themselves ------------------------------------------------------------


def test_probes_check_their_arguments():
    for function, options in itertools.product(
        (_core._roundtrip, _core._like, _core._view), ({"nothing": 1}, {"dtype": "int8"})
    ):
        with pytest.raises(TypeError):
            function(ramp(3), **options)
