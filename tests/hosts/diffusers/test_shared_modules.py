"""Two pipelines around the same modules: in two threads, or one within the other's callback.

A hook serves the call that it belongs to; a second parallel call on modules in use runs serially.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import itertools
import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import tiny  # noqa: E402
from hosting import attributes, caught, host, no_warnings, parallel  # noqa: E402

import parastep  # noqa: E402
from parastep.diffusers import claims  # noqa: E402
from parastep.diffusers.hooks import Hooks  # noqa: E402

CASE = tiny.CASES["sd"]
STEPS = 8


def sharing(pipe: Any = None) -> Any:
    """A pipeline of its own, with a scheduler of its own, around the modules of all the others."""
    made = copy.copy(pipe or host("sd"))
    made.scheduler = copy.deepcopy(made.scheduler)
    return made


def result_of(pipe: Any, cond: int = 0, **kwargs: Any) -> Any:
    return tiny.run(pipe, CASE.kwargs(steps=STEPS, cond=cond, seed=cond, **kwargs))


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    """What each of some requests gives."""
    return [result_of(sharing(), cond) for cond in range(4)]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = attributes(host("sd"))
    yield
    assert attributes(host("sd")) == before


def in_a_thread(work: Callable[[], Any]) -> Any:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(60)


class Visited:
    """A pipeline whose call is visited where its modules are hooked: when all is encoded, and at
    the end of each iteration. Followers, which run the same code, are not.
    """

    @staticmethod
    def by(visit: Callable[[], Any]) -> Any:
        owner = threading.current_thread()

        def visited() -> None:
            if threading.current_thread() is owner:
                visit()

        class Pipe(type(host("sd"))):  # type: ignore[misc]
            def prepare_latents(self, *args: Any) -> Any:
                visited()
                return super().prepare_latents(*args)

            def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
                bar = super().progress_bar(*args, **kwargs)
                update = bar.update
                bar.update = lambda *args: (visited(), update(*args))
                return bar

        made = sharing()
        made.__class__ = Pipe
        return made


@pytest.mark.parametrize("in_parallel", [False, True])
def test_another_thread_gets_the_modules_untouched(alone: list[Any], in_parallel: bool) -> None:
    """At every point of a call, whose rounds are what they are without the other."""
    others: list[Any] = []
    visits = itertools.count()
    second = parallel(sharing(), 3, math.inf) if in_parallel else sharing()
    undisturbed = parallel(sharing(), 3, math.inf)
    expected = result_of(undisturbed)

    def visit() -> None:
        if next(visits) in (0, 2, 3):
            others.append(in_a_thread(lambda: result_of(second, 1 + len(others))))

    together = parallel(Visited.by(visit), 3, math.inf)
    with caught() as texts:
        assert torch.equal(result_of(together), expected)
    assert len(others) == 3 and all(map(torch.equal, others, alone[1:]))
    assert together.report.evaluations == undisturbed.report.evaluations
    assert together.report.fallback is None and not together.report.failures
    if in_parallel:
        assert "unet is in use by another call" in second.report.fallback and len(texts) == 3
        assert second.report.evaluations == [STEPS, 0, 0]
        with no_warnings():
            result_of(second, 1)
        assert second.report.evaluations[1] > 0


@pytest.mark.parametrize("in_parallel", [False, True])
def test_a_pipeline_within_a_callback(alone: list[Any], in_parallel: bool) -> None:
    """It is called in the thread of the call that it is no part of."""
    second = parallel(sharing(), 3) if in_parallel else sharing()
    others = []

    def callback(pipe: Any, step: int, time: Any, given: Any) -> Any:
        if step in (0, 3):
            others.append(result_of(second, 1))
        return given

    together = parallel(sharing(), 3)
    with caught():
        assert torch.equal(result_of(together, callback_on_step_end=callback), alone[0])
    assert len(others) == 2 and all(torch.equal(other, alone[1]) for other in others)
    assert together.report.fallback is None and together.report.evaluations[1] > 0
    assert not in_parallel or "in use" in second.report.fallback


def test_a_call_that_raises_gives_its_modules_back(alone: list[Any]) -> None:
    def callback(pipe: Any, step: int, time: Any, given: Any) -> Any:
        raise KeyError("of the user's")

    with pytest.raises(KeyError, match="of the user's"):
        result_of(parallel(sharing(), 3), callback_on_step_end=callback)
    second = parallel(sharing(), 3)
    with no_warnings():
        assert torch.equal(result_of(second, 1), alone[1])


def test_a_scheduler_of_two_calls_is_named() -> None:
    together = parallel(sharing(), 3)
    second = parallel(copy.copy(together.pipe), 3)

    def callback(pipe: Any, step: int, time: Any, given: Any) -> Any:
        if step == STEPS - 1:
            result_of(second)
        return given

    with caught():
        result_of(together, callback_on_step_end=callback)
    assert "unet and scheduler are in use" in second.report.fallback
    assert "scheduler of its own" in second.report.fallback


def test_a_pool_and_a_loop_of_events(alone: list[Any]) -> None:
    """Requests as a server gets them: whichever comes second at a moment is serial, all right."""
    pipes = [parallel(sharing(), 3) for _ in range(2)]

    async def serve() -> list[Any]:
        return await asyncio.gather(
            *(asyncio.to_thread(result_of, pipe, cond) for cond, pipe in enumerate(pipes))
        )

    def both() -> list[Any]:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(result_of, pipes, range(2)))

    with caught():
        for results in (asyncio.run(serve()), both(), asyncio.run(serve()), both()):
            assert all(map(torch.equal, results, alone))
    for pipe in pipes:
        assert pipe.report.fallback is None or "in use" in pipe.report.fallback


# ---- busy ----------------------------------------------------------------------------------------


class Held:
    """A call that stands still in its first callback until it is let go."""

    def __init__(self, pipe: Any) -> None:
        self._inside, self._go = threading.Event(), threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._result = self._pool.submit(result_of, pipe, 0, callback_on_step_end=self._hold)
        assert self._inside.wait(60)

    def _hold(self, pipe: Any, step: int, time: Any, given: Any) -> Any:
        self._inside.set()
        assert self._go.wait(60)
        return given

    def end(self) -> Any:
        self._go.set()
        with self._pool:
            return self._result.result(60)


def in_line(waiting: int) -> None:
    """Returns when so many calls wait."""
    for _ in range(6000):
        if len(claims._waiting) == waiting:
            return
        time.sleep(0.01)
    raise AssertionError(f"{len(claims._waiting)} calls wait, not {waiting}")


@pytest.mark.parametrize("of_its_own", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.02])
def test_calls_wait_for_their_turn(alone: list[Any], of_its_own: bool, tolerance: float) -> None:
    """First come, first served, each in parallel: of one pipeline, or of pipelines that share."""
    first = parallel(sharing(), 3, tolerance, busy="wait")
    others = [first] * 3
    if not of_its_own:
        others = [parallel(sharing(), 3, tolerance, busy="wait") for _ in range(3)]
    held, ended = Held(first), []

    def call(k: int) -> Any:
        result = result_of(others[k], 1 + k)
        ended.append((k, others[k].report))
        return result

    with no_warnings(), concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = []
        for k in range(3):
            futures.append(pool.submit(call, k))
            in_line(1 + k)
        results = [held.end(), *(future.result(60) for future in futures)]
    assert [k for k, _ in ended] == [0, 1, 2]
    for report in (first.report, *(report for _, report in ended)):
        assert report.fallback is None and report.evaluations[1] > 0
    for result, expected in zip(results, alone):
        assert torch.equal(result, expected) or tolerance and distance(result, expected) < 0.1


def distance(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm())


def test_raise_says_what_is_in_use(alone: list[Any]) -> None:
    first = parallel(sharing(), 3, busy="raise")
    second = parallel(sharing(), 3, busy="raise")
    held = Held(first)
    with pytest.raises(parastep.StateError, match="unet is in use by another call; busy"):
        result_of(second, 1)
    with pytest.raises(parastep.StateError, match="in a call already"):
        result_of(first, 1)
    assert torch.equal(held.end(), alone[0])
    assert torch.equal(result_of(second, 1), alone[1])


@pytest.mark.parametrize("of_its_own", [False, True])
def test_nothing_waits_for_the_call_that_it_is_in(alone: list[Any], of_its_own: bool) -> None:
    together = parallel(sharing(), 3, busy="wait")
    inner = together if of_its_own else parallel(sharing(), 3, busy="wait")

    def callback(pipe: Any, step: int, time: Any, given: Any) -> Any:
        with pytest.raises(parastep.StateError, match="would never end"):
            result_of(inner, 1)
        return given

    assert torch.equal(result_of(together, callback_on_step_end=callback), alone[0])
    assert torch.equal(result_of(inner, 1), alone[1])


def test_a_call_that_fails_and_one_that_is_closed_let_others_go(alone: list[Any]) -> None:
    first, second = (parallel(sharing(), 3, busy="wait") for _ in range(2))
    held = Held(first)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        failing = pool.submit(lambda: first(num_inference_steps="none"))
        in_line(1)
        closed = pool.submit(result_of, second, 1)
        in_line(2)
        last = pool.submit(result_of, parallel(sharing(), 3, busy="wait"), 2)
        in_line(3)
        second.close()
        assert torch.equal(held.end(), alone[0])
        assert failing.exception(60) is not None
        with pytest.raises(parastep.StateError, match="closed"):
            closed.result(60)
        assert torch.equal(last.result(60), alone[2])
    assert not claims._claimed and not claims._waiting and not claims._calls


def test_busy_is_checked_and_kept() -> None:
    with pytest.raises(parastep.InvalidError, match="serial, wait, raise"):
        parallel(sharing(), 3, busy="later")
    together = parallel(sharing(), 3, busy="wait")
    assert copy.copy(together)._busy == pickle.loads(pickle.dumps(together))._busy == "wait"


def test_a_copy_made_in_a_call_is_of_the_module_itself(alone: list[Any]) -> None:
    """As an average of weights is copied in a callback: it evaluates its own weights."""
    copies = []

    def callback(pipe: Any, step: int, time: Any, given: Any) -> Any:
        if step == 2:
            copies.append(copy.deepcopy(pipe.unet))
        return given

    together = parallel(sharing(), 3)
    with no_warnings():
        result_of(together, callback_on_step_end=callback)
    for weight in copies[0].parameters():
        torch.nn.init.zeros_(weight)
    second = sharing()
    second.unet = copies[0]
    assert not torch.equal(result_of(second), alone[0])
    assert torch.equal(result_of(sharing()), alone[0])


# ---- hooks by themselves -------------------------------------------------------------------------


def say(word: str) -> Callable[..., Any]:
    return lambda instance, original, *args: f"{word} {original(*args)}"


class Thing:
    def speak(self) -> str:
        return "own"


@pytest.mark.parametrize("first_ends_first", [False, True])
def test_calls_that_overlap_end_in_either_order(first_ends_first: bool) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        thing, first, second = Thing(), Hooks(), other.submit(Hooks).result()
        first.wrap(thing, "speak", say("first"))
        second.wrap(thing, "speak", say("second"))
        assert other.submit(thing.speak).result() == "second own"
        assert thing.speak() == "first own" and in_a_thread(thing.speak) == "own"
    with first.aside():
        assert thing.speak() == "own"
    ends = (first, second) if first_ends_first else (second, first)
    ends[0].restore()
    assert thing.speak() == ("own" if first_ends_first else "first own")
    ends[1].restore()
    assert vars(thing) == {}


def test_a_forked_child_has_no_hooks() -> None:
    thing, hooks = Thing(), Hooks()
    hooks.wrap(thing, "speak", say("parent"))
    child = os.fork()
    if child == 0:
        os._exit(0 if vars(thing) == {} else 1)
    assert os.waitpid(child, 0)[1] == 0 and thing.speak() == "parent own"
    hooks.restore()
    assert vars(thing) == {}
