"""Tensors on the stand-in devices (fake/libcuda.so.1), of two libraries that do not exist.

`Plain` speaks `__dlpack__` alone, as older libraries do, and frees memory the moment nobody holds
it; `Exchanged` has the C exchange API and a stream of its own for every thread, in whose order
memory is freed. Both put what they read and write behind all work of the devices, so that a test
sees a race as a complaint of the stand-in, not as a wrong number now and then.
"""

from __future__ import annotations

import ctypes
import pathlib
import subprocess
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
from dlpack import (
    NAMES,
    TABLE,
    USED,
    Allocate,
    Convert,
    Current,
    Deleter,
    Describe,
    DLTensor,
    Table,
    Versioned,
    capsule_pointer,
    new_capsule,
    rename_capsule,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
CUDA = 2  # of DLPack


class Setting(ctypes.Structure):
    _fields_ = [
        ("devices", ctypes.c_int),
        ("pools", ctypes.c_int),
        ("peers", ctypes.c_int),
        ("seed", ctypes.c_uint64),
    ]


class Counts(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("bytes", "blocks", "pinned", "streams", "events", "kernels", "copies")
    ]


def build(folder: pathlib.Path) -> pathlib.Path:
    """Compiles the stand-in driver; it is loaded by path, before anyone asks for libcuda.so.1."""
    return _compile(folder / "libcuda.so.1", "engine", "memory", "libcuda", "work")


def build_nccl(folder: pathlib.Path) -> pathlib.Path:
    """The stand-in for NCCL, to be loaded after the driver's."""
    return _compile(folder / "libnccl.so.2", "libnccl")


def _compile(library: pathlib.Path, *names: str) -> pathlib.Path:
    flags = (ROOT / "compile_flags.txt").read_text().split()
    sources = [f"tests/gpu/fake/{name}.c" for name in names]
    command = ["gcc", "-shared", *flags, "-O1", "-fPIC", "-fvisibility=default", "-Wl,-Bsymbolic"]
    command += [f"-Wl,-soname,{library.name}", *sources, "-o", str(library)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return library


def load(library: pathlib.Path) -> Any:
    fake = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    fake.fake_count.restype = Counts
    fake.fake_complaint.restype = ctypes.c_char_p
    fake.fake_alloc.restype = fake.fake_stream.restype = ctypes.c_void_p
    fake.fake_set.argtypes = [ctypes.POINTER(Setting)]
    fake.fake_free.argtypes = [ctypes.c_void_p]
    fake.fake_free_on.argtypes = [ctypes.c_void_p] * 2
    fake.fake_read.argtypes = fake.fake_write.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t]
    fake.fake_fail.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
    return fake


# ---- DLPack --------------------------------------------------------------------------------------

_exported: dict[int, Any] = {}  # managed tensors that are out, with what they hold


class Block:
    """Memory of a device, given back with its last holder: at once, or in order of a stream."""

    def __init__(self, fake: Any, device: int, size: int, stream: Any = None) -> None:
        self.fake, self.device, self.stream = fake, device, stream
        self.address = fake.fake_alloc(device, max(size, 1))

    def __del__(self) -> None:
        if self.stream is None:
            self.fake.fake_free(self.address)
        else:
            self.fake.fake_free_on(self.stream, self.address)


class Array:
    """What both kinds are: (shape) of a NumPy dtype at an address, and whoever owns it."""

    fake: Any = None  # the stand-in; set by the tests' fixture

    def __init__(self, address: int, owner: Any, device: int, shape: Any, dtype: Any) -> None:
        self.address, self.owner, self.device = address, owner, device
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.order = "C"  # or "F", of its elements in memory

    @classmethod
    def of(cls, values: Any, device: int = 0) -> Any:
        values = np.ascontiguousarray(values)
        block = Block(cls.fake, device, values.nbytes, cls.current(device))
        assert cls.fake.fake_write(block.address, values.ctypes.data, values.nbytes) == 0
        return cls(block.address, block, device, values.shape, values.dtype)

    @classmethod
    def scattered(cls, values: Any, device: int = 0) -> Any:
        """Of these values, in the other order: what `.T`, chunks and channels_last come to."""
        made = cls.of(np.ascontiguousarray(np.asarray(values).T), device)
        made.shape, made.order = np.shape(values), "F"
        return made

    @classmethod
    def current(cls, device: int) -> Any:
        """The stream on which the library works in this thread; None: it is always done."""
        return None

    def numpy(self) -> Any:
        values = np.empty(self.shape, self.dtype, order=self.order)
        assert self.fake.fake_read(values.ctypes.data, self.address, values.nbytes) == 0
        return values

    def managed(self) -> Versioned:
        """Its memory as DLPack hands it on, held until the deleter runs."""
        made = Versioned(major=1, minor=3)
        describe(made.tensor, self)
        made.deleter = Deleter(lambda pointer: _exported.pop(pointer, None) and None)
        _exported[ctypes.addressof(made)] = (made, self.owner)
        return made

    @classmethod
    def taking(cls, pointer: int) -> Any:
        """The array behind a managed tensor of somebody else, which it owns from now on."""
        managed = Versioned.from_address(pointer)
        tensor = managed.tensor
        assert tensor.device_type == CUDA and tensor.code == 2
        shape = [tensor.shape[d] for d in range(tensor.ndim)]
        address = (tensor.data or 0) + tensor.byte_offset
        return cls(address, Taken(managed), tensor.device_id, shape, f"f{tensor.bits // 8}")


class Taken:
    def __init__(self, managed: Versioned) -> None:
        self.managed = managed

    def __del__(self) -> None:
        self.managed.deleter(ctypes.addressof(self.managed))


def describe(tensor: DLTensor, array: Array) -> None:
    strides = np.empty(array.shape, array.dtype, order=array.order).strides
    tensor.data, tensor.device_type, tensor.device_id = array.address, CUDA, array.device
    tensor.ndim = len(array.shape)
    tensor.code, tensor.bits, tensor.lanes = 2, 8 * array.dtype.itemsize, 1
    tensor.shape = (ctypes.c_int64 * tensor.ndim)(*array.shape)
    size = array.dtype.itemsize
    tensor.strides = (ctypes.c_int64 * tensor.ndim)(*(stride // size for stride in strides))


class Plain(Array):
    """Its namespace makes contiguous copies; `Exchanged` has a method for that."""

    streams: list[Any] = []  # what consumers asked for

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        self.streams.append(stream)
        return new_capsule(ctypes.addressof(self.managed()), NAMES[True], None)

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(
            from_dlpack=Plain.from_dlpack,
            ascontiguousarray=lambda array: Plain.of(array.numpy(), array.device),
        )

    @classmethod
    def from_dlpack(cls, producer: Any) -> Any:
        capsule = producer.__dlpack__(stream=1, max_version=(1, 3))
        pointer = capsule_pointer(capsule, NAMES[True])
        rename_capsule(capsule, USED[True])
        return cls.taking(pointer)


def _array(address: int) -> Any:
    return ctypes.cast(address, ctypes.py_object).value


class Exchanged(Array):
    local = threading.local()  # each thread has streams of its own

    def contiguous(self) -> Any:
        return Exchanged.of(self.numpy(), self.device)

    @classmethod
    def current(cls, device: int) -> Any:
        streams = cls.local.__dict__.setdefault("streams", {})
        if device not in streams:
            streams[device] = cls.fake.fake_stream(device)
        return streams[device]


@Allocate
def _allocate(prototype: Any, out: Any, context: Any, set_error: Any) -> int:
    tensor = prototype[0]
    shape = [tensor.shape[d] for d in range(tensor.ndim)]
    dtype = np.dtype(f"f{tensor.bits // 8}")
    size = int(np.prod(shape)) * dtype.itemsize
    block = Block(Array.fake, tensor.device_id, size, Exchanged.current(tensor.device_id))
    made = Array(block.address, block, tensor.device_id, shape, dtype).managed()
    out[0] = ctypes.addressof(made)
    return 0


@Convert
def _managed_from_object(obj: Any, out: Any) -> int:
    out[0] = ctypes.addressof(_array(obj).managed())
    return 0


@Convert
def _managed_to_object(managed: Any, out: Any) -> int:
    made = Exchanged.taking(managed)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    out[0] = id(made)
    return 0


@Describe
def _tensor_from_object(obj: Any, out: Any) -> int:
    array = _array(obj)
    array.described = out[0]
    describe(out[0], array)
    return 0


@Current
def _current_stream(device_type: int, device: int, out: Any) -> int:
    out[0] = Exchanged.current(device)
    return 0


_table = Table(
    major=1,
    minor=3,
    allocate=_allocate,
    managed_from_object=_managed_from_object,
    managed_to_object=_managed_to_object,
    tensor_from_object=_tensor_from_object,
    current_stream=_current_stream,
)
Exchanged.__dlpack_c_exchange_api__ = new_capsule(  # type: ignore[attr-defined]
    ctypes.addressof(_table), TABLE, None
)
