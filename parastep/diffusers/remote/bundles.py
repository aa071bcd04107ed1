"""Python objects with tensors as bytes, for what goes over in every step: quicker than torch's own
serialisation, and a tensor that went over before does not travel again.

A bundle is a pickle with its tensors' memory behind it. Both ends remember what the last few
bundles held: conditioning is the same tensor, or the same part of one, step after step.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

_LENGTH = struct.Struct("<Q")
_ALIGNED = 64
_SMALL = 512  # bytes that are not worth remembering
_MEMORY = 4  # bundles after which a tensor that none of them held is forgotten


class _Sent(NamedTuple):
    """A tensor that the other end has; its memory belongs to nobody else while we hold it."""

    number: Any
    tensor: torch.Tensor
    bundle: int  # the last one that held it


# Where a tensor's memory lies in the bundle, and how to make a tensor of it: the number under which
# it is remembered, or -1; the first byte; dtype by name; shape, in the order of memory; the order
# of the dimensions there, where it is not theirs; whether it is on a device of the sender's. What
# the other end has is named by its number alone, or (bundle, number) where it was made there.
_Placed = tuple[int, int, str, tuple[int, ...], tuple[int, ...] | None, bool]


class Sender:
    """Makes bundles for one receiver, which opens all of them in order. `remembers`: that end keeps
    tensors for the bundles to come.
    """

    def __init__(self, remembers: bool = True) -> None:
        self._remembers = remembers
        self._sent: dict[Any, _Sent] = {}
        self._bundles = self._numbers = 0

    def learn(self, tensors: Sequence[torch.Tensor], bundle: int) -> None:
        """That the receiver has these, which came from there, as it has learnt itself."""
        for k, tensor in enumerate(tensors):
            key = _identity(tensor)
            if key is not None:
                self._sent[key] = _Sent((bundle, k), tensor, self._bundles)

    def pack(self, value: Any) -> bytes:
        """Raises what pickle raises where something cannot be sent; the next bundle is fine."""
        self._bundles += 1
        old = {k: s for k, s in self._sent.items() if s.bundle < self._bundles - _MEMORY}
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, self._sent, self._bundles, self._numbers, self._remembers)
        pickler.dump(([sent.number for sent in old.values()], value))
        head = buffer.getvalue()
        self._sent |= pickler.held
        for key in old.keys() - pickler.held.keys():
            del self._sent[key]
        self._numbers = pickler.numbers
        begin = _LENGTH.size + len(head)
        return b"".join((_LENGTH.pack(len(head)), head, bytes(-begin % _ALIGNED), *pickler.memory))


class _Pickler(pickle.Pickler):
    def __init__(
        self, buffer: Any, sent: dict[Any, _Sent], bundle: int, numbers: int, remembers: bool
    ) -> None:
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self.memory: list[Any] = []
        self.held: dict[Any, _Sent] = {}  # by this bundle
        self.numbers = numbers
        self._size, self._sent, self._bundle, self._remembers = 0, sent, bundle, remembers

    def persistent_id(self, value: Any) -> Any:
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or not _is_plain(value):
            return None
        key = _identity(value) if self._remembers else None
        known = self.held.get(key) or self._sent.get(key)
        number = -1
        if known is not None:
            self.held[key] = known._replace(bundle=self._bundle)
            return known.number
        if key is not None:
            number = self.numbers = self.numbers + 1
            self.held[key] = _Sent(number, value, self._bundle)
        return self._append(value.detach(), number)

    def _append(self, tensor: torch.Tensor, number: int) -> _Placed:
        order, begin, away = None, self._size, tensor.device.type != "cpu"
        if not tensor.is_contiguous():  # the other end's has its strides, which kernels go by
            order = tuple(sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d)))
            tensor = tensor.permute(order)
        flat = tensor.contiguous().reshape(-1)
        if flat.numel() == 1:  # whatever its stride is, expanded ones have 0
            flat = flat.as_strided((1,), (1,))
        data = flat.view(torch.uint8).cpu().numpy().data
        self.memory += [data, bytes(-data.nbytes % _ALIGNED)]
        self._size += data.nbytes + -data.nbytes % _ALIGNED
        return number, begin, str(tensor.dtype)[6:], tuple(tensor.shape), order, away


def _is_plain(tensor: torch.Tensor) -> bool:
    kinds = tensor.is_conj() or tensor.is_neg() or tensor.is_quantized or tensor.is_nested
    return tensor.layout is torch.strided and tensor.device.type in ("cpu", "cuda") and not kinds


def _identity(tensor: torch.Tensor) -> Any:
    """The same for the same contents; None where nothing would tell that somebody wrote to it.

    A part of a tensor shares its version, and is made anew in every step.
    """
    if tensor.is_inference() or tensor.nbytes < _SMALL:
        return None
    base = tensor if tensor._base is None else tensor._base
    form = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    return id(base), tensor._version, form


class Receiver:
    """Opens one sender's bundles, in order; tensors that were on a device are on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[Any, tuple[torch.Tensor, int]] = {}  # and the version they came with

    def learn(self, tensors: Sequence[torch.Tensor], bundle: int) -> bool:
        """What was made of this bundle may come back; whether anything would tell that somebody
        wrote to it.
        """
        told = not any(tensor.is_inference() for tensor in tensors)
        for k, tensor in enumerate(tensors if told else ()):
            self._known[bundle, k] = tensor, tensor._version
        return told

    def unpack(self, data: bytes | bytearray) -> Any:
        """Tensors have memory of their own."""
        (length,) = _LENGTH.unpack_from(data)
        end = _LENGTH.size + length
        unpickler = _Unpickler(io.BytesIO(memoryview(data)[_LENGTH.size : end]))
        unpickler.persistent_load = self._load  # type: ignore[method-assign]
        self._data, self._begin = data, end + -end % _ALIGNED
        if torch.is_inference_mode_enabled():  # what it makes would have no version
            with torch.inference_mode(False):
                forgotten, value = unpickler.load()
        else:
            forgotten, value = unpickler.load()
        for number in forgotten:
            self._known.pop(number, None)
        return value

    def _load(self, told: Any) -> torch.Tensor:
        if not isinstance(told, tuple) or len(told) == 2:
            tensor, version = self._known[told]
            if tensor._version != version:
                raise RuntimeError("it writes to its own inputs")
            return tensor
        number, begin, dtype, shape, order, away = told
        tensor = self._tensor(begin, getattr(torch, dtype), shape)
        if away and self._device.type != "cpu":
            tensor = tensor.to(self._device)
        if order is not None:
            tensor = tensor.permute([order.index(d) for d in range(len(order))])
        if number >= 0:
            self._known[number] = tensor, tensor._version
        return tensor

    def _tensor(self, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype, device="cpu")
        data = memoryview(self._data)  # the bundle's memory has another alignment than torch's
        there = torch.frombuffer(data, dtype=dtype, count=count, offset=self._begin + begin)
        return there.view(shape).clone()


class _Unpickler(pickle.Unpickler):
    """With an attribute to be set: `persistent_load`."""
