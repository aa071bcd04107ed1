"""What parastep.sample refuses, with words that say what would do."""

import array
import math

import numpy as np
import pytest
from cases import euler, latents, smooth

import parastep
from parastep import DeviceError, DtypeError, InvalidError, ShapeError, _core

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="no torch")

X = latents()


BAD_LATENTS = [
    ([1.0, 2.0], DtypeError, "x is of type list, not a tensor"),
    (None, DtypeError, "x is of type NoneType, not a tensor"),
    ("x", DtypeError, "x is of type str"),
    (3.0, DtypeError, "x is of type float"),
    (np.ndarray, DtypeError, "x is the class numpy.ndarray"),
    (X.astype("i4"), DtypeError, "x has dtype int32; give float32"),
    (X.astype("c8"), DtypeError, "x has dtype complex64"),
    (X > 0, DtypeError, "x has dtype bool"),
    (np.array([None]), DtypeError, "x has dtype object"),
    (b"12345678", DtypeError, "x is a buffer of format 'B'"),
    (array.array("i", [1, 2]), DtypeError, "x is a buffer of format 'i'"),
    (X[:0], ShapeError, "an empty latent"),
    (X[:, :0], ShapeError, "an empty latent"),
    (np.empty(0, "f"), ShapeError, "an empty latent"),
    (X.reshape((1,) * 6 + X.shape), ShapeError, "x has 9 dimensions; from 0 to 8"),
]


BAD_TORCH = [
    (lambda: torch.ones(2, 3, device="meta"), (DeviceError, InvalidError), "x .*meta"),
    (lambda: torch.ones(2, 3, dtype=torch.int64), DtypeError, "x has dtype int64"),
    (lambda: torch.ones(2, 3, dtype=torch.bool), DtypeError, "x has dtype bool"),
    (lambda: torch.eye(3).to_sparse(), (InvalidError, DtypeError), "x cannot be read: .*layout"),
    (lambda: torch.ones(2, 0), ShapeError, "an empty latent"),
    (lambda: torch.ones(2, dtype=torch.complex64), DtypeError, "x has dtype complex64"),
]


@pytest.mark.parametrize(("x", "error", "words"), BAD_LATENTS)
@pytest.mark.parametrize("ranks", [1, 4])
def test_latents_that_are_refused(x, error, words, ranks):
    with pytest.raises(error, match=words):
        parastep.sample(euler(4), smooth, x, ranks=ranks)


@needs_torch
@pytest.mark.parametrize(("make", "error", "words"), BAD_TORCH)
def test_latents_of_torch_that_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        parastep.sample(euler(4), smooth, make(), ranks=4)


def test_a_capsule_is_used_up():
    capsule = _core._roundtrip(X).__dlpack__()
    parastep.sample(euler(4), lambda x, step, rank: np.asarray(x), capsule)
    with pytest.raises(InvalidError, match="x is a DLPack capsule that was used already"):
        parastep.sample(euler(4), lambda x, step, rank: np.asarray(x), capsule)


def test_latents_beyond_memory():
    with pytest.raises(MemoryError):
        parastep.sample(euler(4), smooth, np.broadcast_to(np.float32(1), (2**45,)))


BAD_OPTIONS = [
    ({"tolerance": -0.01}, InvalidError, "tolerance -0.01: must be 0"),
    ({"tolerance": -math.inf}, InvalidError, "tolerance -inf"),
    ({"tolerance": math.nan}, InvalidError, "tolerance nan"),
    ({"tolerance": "0.1"}, InvalidError, "tolerance: '0.1': must be a number or"),
    ({"tolerance": None}, TypeError, "tolerance: None: must be a number"),
    ({"ranks": 0}, InvalidError, "ranks: 0: must be from 1 to 256"),
    ({"ranks": -1}, InvalidError, "ranks: -1: must be from 1 to 256"),
    ({"ranks": 257}, InvalidError, "ranks: 257: must be from 1 to 256"),
    ({"ranks": 10**30}, InvalidError, f"ranks: {10**30}: must be from 1 to 256"),
    ({"ranks": -(10**30)}, InvalidError, "ranks: -10+: must be from 1 to 256"),
    ({"ranks": 2.0}, TypeError, "ranks: 2.0: must be an integer"),
    ({"ranks": "4"}, TypeError, "ranks: '4': must be an integer"),
    ({"ranks": None}, TypeError, "ranks: None: must be an integer"),
    ({"order": 2}, InvalidError, "order: 2: must be from 0 to 1"),
    ({"order": -1}, InvalidError, "order: -1: must be from 0 to 1"),
    ({"order": 0.5}, TypeError, "order: 0.5: must be an integer"),
    ({"warmup": 0}, InvalidError, "warmup: 0: must be 1 or above"),
    ({"warmup": -5}, InvalidError, "warmup: -5: must be 1 or above"),
    ({"warmup": 2**40}, InvalidError, "warmup: "),
    ({"warmup": None}, TypeError, "warmup: None: must be an integer"),
    ({"deadline": 0}, InvalidError, "deadline: 0: must be seconds above 0, or None"),
    ({"deadline": -1}, InvalidError, "deadline: -1: must be seconds above 0"),
    ({"deadline": math.nan}, InvalidError, "deadline: nan: must be seconds above 0"),
    ({"deadline": "soon"}, TypeError, "deadline: 'soon': must be a number"),
    ({"policy": "fast"}, InvalidError, "policy: 'fast': must be 'verified' or 'paper'"),
    ({"policy": "pa\0per"}, InvalidError, "policy: "),
    ({"policy": None}, InvalidError, "policy: None: must be 'verified' or 'paper'"),
    ({"policy": 1}, InvalidError, "policy: 1: must be"),
    ({"on_failure": "stop"}, InvalidError, "on_failure: 'stop': must be 'continue' or 'raise'"),
    ({"on_failure": True}, InvalidError, "on_failure: True: must be"),
    ({"max_stride": 0}, InvalidError, "max_stride: 0: must be 1"),
    ({"max_stride": -2}, InvalidError, "max_stride: -2: must be 1"),
    ({"max_stride": "x"}, TypeError, "max_stride: 'x': must be an integer"),
    ({"something": 1}, TypeError, "something"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD_OPTIONS)
def test_options_that_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        parastep.sample(euler(4), smooth, X, **options)


@pytest.mark.parametrize("denoiser", [None, 3, "smooth", X])
def test_a_denoiser_is_callable(denoiser):
    with pytest.raises(TypeError, match=r"denoiser: .*must be callable as \(x, step, rank\)"):
        parastep.sample(euler(4), denoiser, X)
