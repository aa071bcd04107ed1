"""The C exchange API: borrowed where it is read, owned where it is written, never trusted."""

import ctypes

import pytest
from dlpack import NAMES, TABLE, Convert, Describe, Table, Versioned, new_capsule
from handmade import Handmade, Producer
from tensors import assert_reads, ramp, references, refusal

from parastep import _core


def exchanging(attribute="__dlpack_c_exchange_api__", borrows=True, works=True, **fields):
    """A type whose instances wrap a Handmade and offer an exchange table, and the calls it got."""
    calls = []

    def managed_from_object(obj, out):
        calls.append("managed")
        out[0] = ctypes.addressof(ctypes.cast(obj, ctypes.py_object).value.made.managed)
        return 0

    def tensor_from_object(obj, out):
        calls.append("borrowed")
        made = ctypes.cast(obj, ctypes.py_object).value.made
        ctypes.pointer(out[0])[0] = made.managed.tensor
        return 0

    def managed_to_object(managed, out):
        calls.append("taken")
        if not works:
            Versioned.from_address(managed).deleter(managed)
            return -1
        tensor = _core._roundtrip(new_capsule(managed, NAMES[True], None))
        result = Exchanged(tensor)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(result))
        out[0] = id(result)
        return 0

    table = Table(
        major=1,
        minor=3,
        managed_from_object=Convert(managed_from_object),
        managed_to_object=Convert(managed_to_object),
        tensor_from_object=Describe(tensor_from_object) if borrows else Describe(),
        **fields,
    )

    class Exchanged:
        keep = table

        def __init__(self, made):
            self.made = made

    capsule = new_capsule(ctypes.addressof(table), TABLE, None)
    setattr(Exchanged, attribute, capsule)
    return Exchanged, calls


@pytest.mark.parametrize("attribute", ["__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"])
def test_exchange_borrows_what_is_read(attribute):
    kind, calls = exchanging(attribute)
    made = Handmade(ramp(3, 4)[:, ::-1])
    obj = kind(made)
    count = references(obj)
    assert_reads(obj, made.values)
    assert calls == ["borrowed"] and made.deleted == 0
    assert references(obj) == count


def test_exchange_owns_what_it_writes():
    kind, calls = exchanging()
    made = Handmade(ramp(3))
    _core._roundtrip(kind(made), writable=True)
    assert calls == ["managed"] and made.deleted == 1 and not made.values.any()
    made = Handmade(ramp(3), flags=1)
    refusal(ValueError, kind(made), "read-only", writable=True)
    assert made.deleted == 1 and made.values.any()


def test_exchange_without_borrowing():
    kind, calls = exchanging(borrows=False)
    made = Handmade(ramp(3))
    assert_reads(kind(made), made.values)
    assert calls == ["managed"] and made.deleted == 1


def test_exchange_refuses_like_any_other():
    kind, _ = exchanging()
    made = Handmade(ramp(3), device_type=2)
    obj = kind(made)
    count = references(obj)
    refusal(_core.DeviceError, obj, "CUDA")
    refusal(_core.DeviceError, obj, "CUDA", writable=True)
    assert made.deleted == 1 and references(obj) == count


def test_exchange_of_another_major_version():
    kind, calls = exchanging()
    old = kind.keep
    newer = Table(major=2, previous=ctypes.pointer(old))
    kind.__dlpack_c_exchange_api__ = new_capsule(ctypes.addressof(newer), TABLE, None)
    assert_reads(kind(Handmade(ramp(3))), ramp(3))
    assert calls == ["borrowed"]
    newer.previous = None
    refusal(TypeError, kind(Handmade(ramp(3))), "not a tensor")


@pytest.mark.parametrize("table", [12345, None, "x", "a capsule"])
def test_an_exchange_attribute_that_is_no_table_is_passed_over(table):
    class Early(Producer):
        __dlpack_c_exchange_api__ = table

    if table == "a capsule":
        Early.__dlpack_c_exchange_api__ = Handmade(ramp(1)).capsule()

    made = Handmade(ramp(3))
    assert_reads(Early(made), ramp(3))
    assert made.deleted == 1


def test_where_exchange_fails_dlpack_is_asked():
    kind, _ = exchanging()
    # PyObject_IsTrue stands for a function that fails with an exception set.
    failing = ctypes.cast(ctypes.pythonapi.PyObject_IsTrue, Describe)
    kind.keep.tensor_from_object = failing
    made = Handmade(ramp(3))

    class Falls(kind, Producer):
        asked = []

        def __bool__(self):
            raise self.error

    obj = Falls(made)
    obj.error = RuntimeError("sparse")
    assert_reads(obj, ramp(3))
    assert made.deleted == 1 and obj.asked == [(1, 3)]
    obj.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        _core._roundtrip(obj)


def test_like_goes_through_the_exchange():
    kind, calls = exchanging()
    result = _core._like(kind(Handmade(ramp(3))))
    assert type(result) is kind and calls == ["borrowed", "taken"]
    assert_reads(result.made, ramp(3))


def test_like_where_the_exchange_fails():
    kind, calls = exchanging(works=False)
    with pytest.raises(_core.Error, match="failed to take in"):
        _core._like(kind(Handmade(ramp(3))))
    assert calls == ["borrowed", "taken"]
