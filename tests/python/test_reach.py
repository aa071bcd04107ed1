"""What functions can reach: found by name, whatever is in between, and compared by value."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import random

import pytest

torch = pytest.importorskip("torch")

from parastep.reach import difference, functions, snapshot  # noqa: E402


class Keeping:
    kind = 0

    def __init__(self):
        self.count, self.buffer, self.context = 0, torch.zeros(3), contextlib.nullcontext(0)
        self.queue = collections.deque(maxlen=2)

    def attribute(self):
        self.count += 1

    @torch.inference_mode()
    def decorated(self):
        self.count += 1

    def calling(self):
        self.attribute()

    def item(self):
        self.buffer[1] += 1

    def data(self):
        self.buffer.data[1] += 1

    def held(self):
        self.context.enter_result += 1

    def queued(self):
        self.queue.append(len(self.queue))

    @classmethod
    def of_the_class(cls):
        cls.kind += 1

    __call__ = attribute


def closure():
    seen = 0

    def function():
        nonlocal seen
        seen += 1

    return function


def helper():
    inner = closure()
    return lambda: inner()


def wrapped():
    inner = closure()

    @functools.wraps(inner)
    def function():
        return inner()

    return function


def drawing(source):
    return lambda: source()


def defaults(kept=[]):  # noqa: B006
    kept.append(1)


def attributed():
    attributed.calls = getattr(attributed, "calls", 0) + 1


CALLS = {"all": 0}


def counting():
    CALLS["all"] += 1


WAYS = {
    "an attribute": (lambda: Keeping().attribute, "count"),
    "a callable object": (Keeping, "count"),
    "under a decorator": (lambda: Keeping().decorated, "count"),
    "in a method that it calls": (lambda: Keeping().calling, "count"),
    "an item": (lambda: Keeping().item, "buffer"),
    "by way of .data": (lambda: Keeping().data, "buffer"),
    "in a held object": (lambda: Keeping().held, "context"),
    "in a queue": (lambda: Keeping().queued, "queue"),
    "in a class": (lambda: Keeping.of_the_class, "kind"),
    "in an outer function": (closure, "seen"),
    "in a helper's": (helper, "seen"),
    "in a wrapped function's": (wrapped, "seen"),
    "in a partial": (lambda: functools.partial(Keeping().attribute), "count"),
    "in defaults": (lambda: defaults, "defaults"),
    "in a function's attribute": (lambda: attributed, "calls"),
    "in a global": (lambda: counting, "CALLS"),
    "in a counter": (lambda: drawing(itertools.count().__next__), "source"),
    "in a random state": (lambda: drawing(random.Random(1).random), "source"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_function_keeps_is_named(way):
    make, name = WAYS[way]
    function = make()
    before = snapshot({"it": function})
    assert difference(before, snapshot({"it": function})) is None
    function()
    found = difference(before, snapshot({"it": function}))
    assert found is not None and found.startswith("it") and name in found


def test_tensors_of_inference_mode_have_no_version():
    with torch.inference_mode():
        buffer = torch.zeros(100_000)
        before = snapshot({"it": buffer})
        buffer += 1
        assert difference(before, snapshot({"it": buffer})) == "it"


def test_what_is_equal_is_the_same():
    """Containers and objects that are made anew with the same contents are no change."""
    kept = {"list": [1, 2.5, "a"], "object": Keeping()}
    before = snapshot({"it": kept})
    again = Keeping()
    again.buffer = kept["object"].buffer
    kept = {"list": [1, 2.5, "a"], "object": again}
    assert difference(before, snapshot({"it": kept})) is None
    kept["list"] = [1, 2.5, "b"]
    assert difference(before, snapshot({"it": kept})) == "it['list'][2]"
    kept |= {"list": [1, 2.5, "a"], "more": 1}
    assert "more" in difference(before, snapshot({"it": kept}))


def test_the_walk_ends_at_circles_and_where_it_is_told():
    circle: list = []
    circle.append(circle)
    secret = Keeping()
    roots = {"it": [circle, secret]}
    before = snapshot(roots, lambda value: value is secret)
    secret.count += 1
    assert difference(before, snapshot(roots, lambda value: value is secret)) is None
    assert difference(snapshot(roots), before) is not None


def test_functions_that_can_be_reached():
    names = {function.__qualname__ for function in functions({"it": Keeping().calling})}
    assert {"Keeping.calling", "Keeping.attribute"} <= names
    assert "closure.<locals>.function" in {f.__qualname__ for f in functions({"it": wrapped()})}
