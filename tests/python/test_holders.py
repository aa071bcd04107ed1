"""`_core.holds`: whether containers hold the very objects that they did, in order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest

from parastep import _core

A, B, C = object(), object(), object()


class Odd:
    """Neither dict nor sequence; `size` is what it says of itself."""

    def __init__(self, *values: Any, size: int | None = None) -> None:
        self.values, self.size = values, size

    def __len__(self) -> int:
        return len(self.values) if self.size is None else self.size

    def __iter__(self) -> Iterator[Any]:
        yield from self.values
        if self.size == 0:
            raise ValueError("it broke")


def look(*holders: Any) -> tuple[list[Any], list[Any], list[int]]:
    values = [list(h.values()) if isinstance(h, dict) else list(h) for h in holders]
    return list(holders), sum(values, []), list(map(len, values))


def test_nothing_changed() -> None:
    ordered = OrderedDict(x=A, y=B)
    assert _core.holds(*look({"a": A, "b": B}, ordered, [C, C], (), {A}, Odd(A, B), {}))
    assert _core.holds([], [], [])


@pytest.mark.parametrize("kind", [list, dict, Odd])
def test_every_change_is_seen(kind: Any) -> None:
    def made(*values: Any) -> Any:
        return (
            dict(enumerate(values)) if kind is dict else Odd(*values) if kind is Odd else [*values]
        )

    holders, items, counts = look(made(A, B), made(), made(C))
    assert _core.holds(holders, items, counts)
    for changed in (
        (made(A, C), made(), made(C)),  # another
        (made(B, A), made(), made(C)),  # another order
        (made(A), made(B), made(C)),  # moved
        (made(A, B), made(), made()),  # gone
        (made(A, B), made(), made(C, A)),  # more
        (made(A, B), made(C)),
        (made(A, B), made(), made(C), made()),
    ):
        assert not _core.holds(list(changed), items, counts)
    assert not _core.holds(holders, items[:-1], counts)
    assert not _core.holds(holders, [*items, A], counts)


def test_equal_is_not_the_same() -> None:
    one, other = [1.5], [1.5]
    assert not _core.holds([[one]], [other], [1])


def test_what_a_container_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="it broke"):
        _core.holds([Odd(size=0)], [], [0])
    with pytest.raises(TypeError):
        _core.holds([5], [], [0])
    with pytest.raises(TypeError):
        _core.holds([[A]], [A], ["1"])
    with pytest.raises(TypeError):
        _core.holds(({},), [], [0])


def test_an_iterator_that_changes_the_items() -> None:
    items = [A, B]

    class Thief(Odd):
        def __iter__(self) -> Iterator[Any]:
            yield A
            items.clear()
            yield B

    assert not _core.holds([Thief(A, B)], items, [2])
