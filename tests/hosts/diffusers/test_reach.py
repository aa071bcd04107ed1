"""A footprint of a walk is fresh as long as another walk would find the same, and no longer."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from parastep.diffusers.reach import Footprint, Reach  # noqa: E402

seen = 0
latest = contextvars.ContextVar("latest")


class Keeper:
    shared = 0

    def __init__(self) -> None:
        self.list: list[Any] = [{"deep": [1.5]}]
        self.set: set[int] = set()
        self.tensor, self.array = torch.zeros(8), np.zeros(8)
        self.state: dict[str, Any] = {}


class Slotted:
    __slots__ = ("value",)


def walked(function: Any) -> tuple[Footprint, Any]:
    footprint = Footprint()
    reach = Reach({}, {}, {__name__}, False, footprint)
    reach.walk(function, ("root",))
    footprint.close()
    return footprint, reach.values


def hook_and_changes() -> tuple[Any, dict[str, Callable[[], Any]]]:
    keeper, slotted, count = Keeper(), Slotted(), 0
    slotted.value = 0
    steps = (k for k in range(9))
    Keeper.shared = 0

    def hook(given: Any, _cache: Any = {}, *, own: Any = {}) -> Any:  # noqa: B006
        return seen, keeper, slotted, count, steps, latest

    def counted() -> None:
        nonlocal count
        count += 1

    def global_one() -> None:
        global seen
        seen += 1

    changes: dict[str, Callable[[], Any]] = {
        "a variable of an outer function": counted,
        "a global": global_one,
        "an attribute": lambda: setattr(keeper, "other", 1),
        "an attribute of a class": lambda: setattr(Keeper, "shared", Keeper.shared + 1),
        "an attribute of the function": lambda: setattr(hook, "calls", 1),
        "an item within a list": lambda: keeper.list[0]["deep"].append(2),
        "another item": lambda: keeper.list[0].update(deep=[1.5]),
        "a set": lambda: keeper.set.add(1),
        "a key": lambda: keeper.state.update(a=1),
        "a tensor": lambda: keeper.tensor.add_(1),
        "a tensor's data": lambda: keeper.tensor.data.add_(1),
        "an array": lambda: keeper.array.__setitem__(3, 1.0),
        "a default": lambda: hook.__defaults__[0].update(a=1),
        "a default of a keyword": lambda: hook.__kwdefaults__["own"].update(a=1),
        "a slot": lambda: setattr(slotted, "value", 1),
        "a generator": lambda: next(steps),
        "a context": lambda: latest.set(1),
    }
    return hook, changes


@pytest.mark.parametrize("change", sorted(hook_and_changes()[1]))
def test_what_a_walk_sees_makes_its_footprint_old(change: str) -> None:
    hook, changes = hook_and_changes()
    footprint, values = walked(hook)
    assert walked(hook)[1] == values
    changes[change]()
    assert walked(hook)[1] != values and not footprint.is_fresh()


def test_what_did_not_change_is_fresh() -> None:
    keeper, box = Keeper(), []

    def hook(given: Any) -> Any:
        return keeper, box

    footprint, _ = walked(hook)
    assert footprint.is_fresh() and footprint.is_fresh()
    box.append(keeper)
    assert not footprint.is_fresh()
