"""Tensors of torch into the binding: in place, copied or refused, and given back."""

import pytest
from tensors import (
    ADDRESS,
    COPIED,
    NDIM,
    READONLY,
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
