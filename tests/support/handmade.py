"""Managed tensors that no library would hand out, and producers that hand them out."""

from __future__ import annotations

import ctypes

from dlpack import NAMES, Deleter, Managed, Versioned, new_capsule


class Handmade:
    """A managed tensor over a NumPy array, any field of which can be wrong; counts deletions."""

    alive = []  # capsules hold a bare address

    def __init__(self, values, versioned=True, major=1, minor=0, flags=0, deleter=True, **fields):
        self.alive.append(self)
        self.values = values
        self.versioned = versioned
        self.deleted = 0
        self.callback = Deleter(self.delete) if deleter else Deleter()
        if versioned:
            self.managed = Versioned(major=major, minor=minor, deleter=self.callback, flags=flags)
        else:
            self.managed = Managed(deleter=self.callback)
        self.describe(self.managed.tensor, **fields)

    def describe(self, tensor, **fields):
        shape = fields.pop("shape", self.values.shape)
        strides = fields.pop("strides", "of values")
        if isinstance(strides, str):
            strides = [stride // self.values.itemsize for stride in self.values.strides]
        tensor.data = self.values.ctypes.data
        tensor.device_type = 1
        tensor.ndim = len(shape) if shape is not None else 1
        tensor.code, tensor.bits, tensor.lanes = 2, 8 * self.values.itemsize, 1
        if shape is not None:
            tensor.shape = (ctypes.c_int64 * len(shape))(*shape)
        if strides is not None:
            tensor.strides = (ctypes.c_int64 * len(strides))(*strides)
        for name, value in fields.items():
            setattr(tensor, name, value)

    def delete(self, _pointer):
        self.deleted += 1

    def capsule(self):
        return new_capsule(ctypes.addressof(self.managed), NAMES[self.versioned], None)


class Producer:
    """Speaks DLPack 1: hands out the capsule of a managed tensor."""

    def __init__(self, made):
        self.made = made
        self.asked = []

    def __dlpack__(self, *, max_version=None):
        self.asked.append(max_version)
        return self.made.capsule()


class OldProducer(Producer):
    def __dlpack__(self, *, stream=None):
        self.asked.append(None)
        return self.made.capsule()
