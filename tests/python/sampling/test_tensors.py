"""Tensors that denoisers are given and give: private, of any kind, layout and dtype."""

import array
import functools
import math
import threading

import numpy as np
import pytest
from cases import (
    DTYPES,
    bits,
    drawing,
    euler,
    exact,
    latents,
    multistep,
    noise_of,
    same,
    smooth,
)

import parastep
from parastep import _core

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="no torch")

# Every step is evaluated by some rank; test_strided.py has the others.
sample = functools.partial(parastep.sample, max_stride=1)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("torch.bfloat16", marks=needs_torch)])
def test_tensors_are_private(dtype):
    """What a denoiser keeps is never overwritten, and what it writes is seen by nobody."""
    program, x = euler(8), latents(dtype=dtype)
    lock, kept = threading.Lock(), []

    def keeping(x, step, rank):
        output = smooth(x, step, rank)
        with lock:
            kept.extend((tensor, bits(tensor)) for tensor in (x, output))
        return output

    found, _ = sample(program, keeping, x, ranks=4, tolerance="rehearse")
    kept.append((found, bits(found)))
    sample(program, smooth, latents(dtype=dtype, seed=5), ranks=4)
    for tensor, before in kept:
        assert bits(tensor) == before
    places = [
        np.asarray(t).__array_interface__["data"][0]
        if torch is None or not isinstance(t, torch.Tensor)
        else t.data_ptr()
        for t, _ in kept
    ]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_denoiser_may_edit_its_input(dtype, ranks):
    program, x = multistep(7), latents(dtype=dtype)
    before = bits(x)

    def editing(x, step, rank):
        output = smooth(x, step, rank)
        x *= 0
        x += 1e3
        return output

    found, _ = sample(program, editing, x, ranks=ranks, tolerance="rehearse")
    assert same(found, exact(program, smooth, x))
    assert bits(x) == before


def in_place(x, step, rank):
    x *= 0.125
    return x


@pytest.mark.parametrize("denoiser", [lambda x, step, rank: x, in_place], ids=["same", "in place"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_denoiser_may_return_its_input(dtype, denoiser):
    program, x = multistep(7), latents(dtype=dtype)
    plain = (lambda x, step, rank: x * 0.125) if denoiser is in_place else lambda x, s, r: x * 1
    found, report = sample(program, denoiser, x, ranks=4, tolerance="rehearse")
    assert same(found, exact(program, plain, x))
    assert report.failures == []


@pytest.mark.parametrize("dtype", ["float32", pytest.param("torch.float32", marks=needs_torch)])
def test_a_denoiser_may_return_one_buffer_every_time(dtype):
    program, x = multistep(7), latents(dtype=dtype)
    buffers = [x * 0 for _ in range(4)]  # one a rank

    def reusing(x, step, rank):
        buffers[rank][...] = smooth(x, step, rank)
        return buffers[rank]

    found, _ = sample(program, reusing, x, ranks=4, tolerance="rehearse")
    assert same(found, exact(program, smooth, x))


LAYOUTS = {
    "fortran": np.asfortranarray,
    "reversed": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "every other": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "transposed": lambda x: x.transpose(2, 0, 1).copy().transpose(1, 2, 0),
    "swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "unaligned": lambda x: (
        np.frombuffer(b"." + x.tobytes(), "u1")[1:].view(x.dtype).reshape(x.shape)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Of x, of outputs and of noise; tensors that come out are plain."""
    lay = LAYOUTS[layout]
    program, x, z = drawing(6), latents(), noise_of(6)

    def laid_out(x, step, rank):
        assert x.flags.c_contiguous and x.flags.writeable and x.dtype.isnative
        return lay(smooth(x, step, rank))

    options = {"ranks": 3, "tolerance": "rehearse", "noise": [lay(step) for step in z]}
    found, report = sample(program, laid_out, lay(x), **options)
    assert same(found, exact(program, smooth, x, noise=z))
    assert report.failures == []


@needs_torch
@pytest.mark.parametrize(
    "lay",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x[0, 0, 0].expand(x.shape),
        lambda x: x.clone().requires_grad_(),
        lambda x: torch.nn.Parameter(x.clone()),
        lambda x: x.to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "every other", "expanded", "requires grad", "parameter", "channels last"],
)
def test_layouts_of_torch(lay):
    x = latents((2, 3, 4, 5), "torch.float32")
    plain = lay(x).detach().contiguous()

    def laid_out(x, step, rank):
        assert x.is_contiguous() and not x.requires_grad and type(x) is torch.Tensor
        return lay(smooth(x, step, rank))

    def contiguous(x, step, rank):
        return lay(smooth(x, step, rank)).detach().contiguous()

    found, report = sample(multistep(6), laid_out, lay(x), ranks=3, tolerance="rehearse")
    assert same(found, exact(multistep(6), contiguous, plain))
    assert report.failures == []


@needs_torch
def test_outputs_with_a_graph():
    model = torch.nn.Linear(4, 4)
    x = latents(dtype="torch.float32")

    def denoiser(x, step, rank):
        output = model(x)
        assert output.requires_grad
        return output

    found, report = sample(euler(6), denoiser, x, ranks=3, tolerance="rehearse")
    assert same(found, exact(euler(6), denoiser, x))
    assert not found.requires_grad and report.failures == []


@needs_torch
@pytest.mark.parametrize("m", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("x", ["float32", "float16", "bfloat16", "float64"])
def test_outputs_of_another_dtype(x, m):
    """As far as 4 bytes an element, or x's own size, go."""
    program, start = multistep(7), latents(dtype=f"torch.{x}")

    def denoiser(x, step, rank):
        return smooth(x, step, rank).to(getattr(torch, m))

    found, report = sample(program, denoiser, start, ranks=4, tolerance="rehearse")
    assert same(found, exact(program, denoiser, start))
    assert report.failures == []
    _, report = sample(program, denoiser, start, ranks=4, tolerance=math.inf)
    assert report.rounds == 3 and report.failures == []


def other_kinds():
    values = latents((12,))
    yield "Tensor", _core._roundtrip(values), _core.Tensor
    yield "capsule", _core._roundtrip(values).__dlpack__(), _core.Tensor
    yield "buffer", array.array("f", values), _core.Tensor
    yield "memoryview", memoryview(values), _core.Tensor


@pytest.mark.parametrize("kind", [name for name, _, _ in other_kinds()])
def test_other_kinds_of_tensors(kind):
    given, wanted = next(parts[1:] for parts in other_kinds() if parts[0] == kind)
    types = set()

    def denoiser(x, step, rank):
        types.add(type(x))
        return smooth(np.asarray(x), step, rank)

    found, report = sample(euler(6), denoiser, given, ranks=3, tolerance="rehearse")
    assert types == {wanted} and type(found) is wanted
    assert bits(found) == bits(exact(euler(6), smooth, latents((12,))))
    assert report.failures == []


def test_large_latents():
    x = latents((3, 5, 1001))
    found, _ = sample(multistep(5), smooth, x, ranks=4, tolerance="rehearse")
    assert same(found, exact(multistep(5), smooth, x))
