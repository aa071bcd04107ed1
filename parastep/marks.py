"""Marks: what tells one state of a thing from another, to be compared before and after.

For things in which a walk over attributes and items sees nothing: tensors and arrays, generators,
iterators. Used by what looks for state in a denoiser (`reach`, and each host's own look).
"""

from __future__ import annotations

import functools
import io
import operator
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def mark_of_tensor(tensor: torch.Tensor, samples: int = 64) -> Any:
    """Where it lies, its version, and that many of its elements, spread over it: a write through
    `.data`, or to an inference tensor, shows in no version.
    """
    version = None if tensor.is_inference() else tensor._version
    mark = type(tensor), tensor.shape, tensor.dtype, tensor.device, version
    seen = elements_of(tensor, samples)
    return (*mark, id(tensor)) if seen is None else (*mark, tensor.data_ptr(), seen)


def elements_of(tensor: torch.Tensor, samples: int = 64) -> bytes | None:
    """That many of its elements, spread over it; None of a subclass, sparse, or expanded."""
    count, step = min(tensor.numel(), samples), max(tensor.numel() // samples, 1)
    try:
        with torch.inference_mode():
            flat = tensor.detach().as_strided((count,), (step,), tensor.storage_offset())
            seen = flat.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        tensor.data_ptr()
        return seen
    except (RuntimeError, NotImplementedError, TypeError):
        return None


def mark_of(value: Any, samples: int = 64) -> Any:
    """None where nothing is known of things of its kind."""
    if isinstance(value, torch.Tensor):
        return mark_of_tensor(value, samples)
    if isinstance(value, np.ndarray):
        seen = value.ravel()[:: max(value.size // samples, 1)].tobytes()
        return value.ctypes.data, value.shape, value.dtype.str, seen
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        return id(value), repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return id(value), hash(value.getstate())
    if isinstance(value, bytearray):
        return id(value), bytes(value)
    if isinstance(value, io.BytesIO) and not value.closed:
        return id(value), value.tell(), value.getvalue()
    if isinstance(value, functools._lru_cache_wrapper):
        return id(value), value.cache_info()
    if isinstance(value, types.GeneratorType):
        return id(value), value.gi_frame and value.gi_frame.f_lasti
    if isinstance(value, Iterator) and type(value).__module__ in ("itertools", "builtins"):
        return id(value), repr(value), operator.length_hint(value, -1)
    return None
