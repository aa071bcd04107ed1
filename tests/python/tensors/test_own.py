"""Our own Tensor: what it says of itself, whom it shares its memory with, how it ends."""

import contextlib
import ctypes
import gc
import threading
import weakref

import numpy as np
import pytest
from cases import resident_bytes, run_script, tells_memory
from dlpack import NAMES, USED, Managed, Versioned, capsule_name, capsule_pointer, rename_capsule
from handmade import Handmade
from tensors import (
    ADDRESS,
    DTYPES,
    TORCH_DTYPES,
    assert_reads,
    needs_torch,
    ramp,
    references,
    refusal,
    torch_ramp,
)

from parastep import _core

try:
    import torch
except ImportError:
    torch = None


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
    done = run_script(script, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not tells_memory(), reason="memory cannot be told")
def test_nothing_leaks():
    """What every call takes must be given back: a leak of any kind here would be 100 MB or more."""
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
