"""Results of the caller's own kind of tensor, or of ours where it has none."""

import array
import gc
import sys

import numpy as np
import pytest
from handmade import Handmade, Producer
from tensors import DTYPES, TORCH_DTYPES, assert_reads, needs_torch, ramp, torch_ramp

from parastep import _core

try:
    import torch
except ImportError:
    torch = None


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
