"""What the tests of tensors share: values, what is read of them, what is refused and why."""

import gc
import sys

import numpy as np
import pytest

from parastep import _core

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="no torch")

ADDRESS, DTYPE, COUNT, NDIM, READONLY, COPIED = range(6)  # fields of _core._view

DTYPES = ["float32", "float16", "float64"]
TORCH_DTYPES = [*DTYPES, "bfloat16"]


def ramp(*shape, dtype=np.float32):
    return np.arange(np.prod(shape, dtype=int), dtype=dtype).reshape(shape)


def torch_ramp(*shape, dtype="float32"):
    return torch.arange(float(np.prod(shape, dtype=int))).reshape(shape).to(getattr(torch, dtype))


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
