"""NumPy and buffers into the binding: read in place, copied or refused, and given back."""

import array
import ctypes
import itertools
import threading

import numpy as np
import pytest
from handmade import Handmade, Producer
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import (
    ADDRESS,
    COPIED,
    COUNT,
    DTYPES,
    READONLY,
    assert_reads,
    ramp,
    references,
    refusal,
)

from parastep import _core

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

needs_ml_dtypes = pytest.mark.skipif(ml_dtypes is None, reason="no ml_dtypes")


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


# ---- the private functions themselves ------------------------------------------------------------


def test_probes_check_their_arguments():
    for function, options in itertools.product(
        (_core._roundtrip, _core._like, _core._view), ({"nothing": 1}, {"dtype": "int8"})
    ):
        with pytest.raises(TypeError):
            function(ramp(3), **options)
