"""The threads of a run: whose they are, what of the caller they see, what they leave behind."""

import contextlib
import contextvars
import functools
import gc
import math
import sys
import threading
import tracemalloc
from collections import defaultdict

import pytest
from cases import (
    Gaussian,
    drawing,
    euler,
    exact,
    latents,
    noise_of,
    resident_bytes,
    same,
    settle,
    smooth,
    tells_memory,
)

import parastep

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="no torch")

# Every step is evaluated by some rank; test_strided.py has the others.
sample = functools.partial(parastep.sample, max_stride=1)


# ---- threads and their context -------------------------------------------------------------------


def seen_by_ranks(look, ranks=4, steps=6, x=None):
    """What look() gives on every rank, each asked several times."""
    seen, lock = defaultdict(set), threading.Lock()

    def denoiser(x, step, rank):
        with lock:
            seen[rank].add(look())
        return x * 0.5

    x = latents() if x is None else x
    _, report = sample(euler(steps), denoiser, x, ranks=ranks, tolerance="rehearse")
    assert report.failures == [] and sorted(seen) == list(range(ranks))
    return [seen[rank] for rank in range(ranks)]


def test_rank_0_is_the_callers_thread_and_each_other_has_its_own():
    names = seen_by_ranks(lambda: threading.current_thread().name)
    assert names == [{threading.current_thread().name}, *({f"parastep-{k}"} for k in (1, 2, 3))]
    assert seen_by_ranks(lambda: threading.current_thread().daemon)[1:] == [{True}] * 3


def test_context_variables_are_handed_on():
    variable = contextvars.ContextVar("variable", default="nothing")
    token = variable.set("the caller's")
    assert seen_by_ranks(variable.get) == [{"the caller's"}] * 4
    variable.reset(token)


def test_context_variables_set_by_followers_stay_theirs():
    variable = contextvars.ContextVar("variable", default="nobody")

    def look():
        before = variable.get()
        variable.set(threading.current_thread().name)
        return before

    seen = seen_by_ranks(look)
    own = threading.current_thread().name
    assert seen == [{"nobody", own}, *({"nobody", f"parastep-{k}"} for k in (1, 2, 3))]
    assert variable.get() == own


def torch_modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        str(torch.empty(0).device),
    )


@needs_torch
@pytest.mark.parametrize(
    "enter",
    [
        list,
        lambda: [torch.no_grad()],
        lambda: [torch.inference_mode()],
        lambda: [torch.inference_mode(), torch.inference_mode(False)],
        lambda: [torch.autocast("cpu", torch.bfloat16)],
        lambda: [torch.autocast("cpu", torch.float16, cache_enabled=False), torch.no_grad()],
        lambda: [torch.device("meta")],
    ],
    ids=["none", "no_grad", "inference", "nested", "autocast", "half", "device"],
)
def test_torch_modes_are_handed_on(enter):
    x = latents(dtype="torch.float32")
    with contextlib.ExitStack() as stack:
        for mode in enter():
            stack.enter_context(mode)
        wanted = torch_modes()
        assert seen_by_ranks(torch_modes, x=x) == [{wanted}] * 4
    assert torch_modes() == (True, False, False, None, "cpu")


@needs_torch
def test_threads_of_torch_are_left_alone():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        seen_by_ranks(torch.get_num_threads, x=latents(dtype="torch.float32"))
        assert torch.get_num_threads() == 3
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
    finally:
        torch.set_num_threads(before)


@needs_torch
def test_a_number_of_threads_for_followers_alone():
    from parastep.threads import HostContext

    before, seen = torch.get_num_threads(), []

    def look():
        seen.append(torch.get_num_threads())

    HostContext().start(look, "counted", before + 1).join()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before + 1, before]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_may_sample_at_once(threads):
    program, denoiser = euler(12), Gaussian(12)
    starts = [latents(seed=k) for k in range(threads)]
    wanted = [sample(program, denoiser, x, ranks=3)[0] for x in starts]
    found, barrier = {}, threading.Barrier(threads)

    def work(k):
        barrier.wait()
        for _ in range(5):
            found[k] = sample(program, denoiser, starts[k], ranks=3)[0]

    workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for k in range(threads):
        assert same(found[k], wanted[k])


def test_a_denoiser_may_sample():
    inner = euler(4)

    def nested(x, step, rank):
        refined, report = sample(inner, smooth, x, ranks=2, tolerance="rehearse")
        assert report.failures == []
        return smooth(refined, step, rank)

    x = latents()
    found, report = sample(euler(5), nested, x, ranks=3, tolerance="rehearse")
    assert same(found, exact(euler(5), nested, x))
    assert report.failures == []


def test_denoisers_of_all_kinds():
    class Callable:
        def __call__(self, x, step, rank):
            return smooth(x, step, rank)

        def method(self, x, step, rank):
            return smooth(x, step, rank)

    def outputs():
        output = None
        while True:
            output = smooth(*(yield output))

    generators = {rank: outputs() for rank in range(3)}
    for generator in generators.values():
        next(generator)
    x = latents()
    wanted = exact(euler(5), smooth, x)
    for denoiser in [
        Callable(),
        Callable().method,
        functools.partial(lambda rate, x, step, rank: smooth(x, step, rank), 1.0),
        lambda x, step, rank: generators[rank].send((x, step, rank)),
        lambda *args: smooth(*args),
    ]:
        found, report = sample(euler(5), denoiser, x, ranks=3, tolerance="rehearse")
        assert same(found, wanted)
        assert report.failures == []


# ---- nothing is left behind ----------------------------------------------------------------------


def test_references_are_given_back():
    program, x, z, denoiser = drawing(6), latents(), noise_of(6), Gaussian(6)
    things = (program, x, z, denoiser)

    def work():
        for ranks in (1, 4):
            for tolerance in (0, 0.02, math.inf):
                options = {"ranks": ranks, "tolerance": tolerance, "noise": z}
                sample(program, denoiser, x, **options)

    work()
    gc.collect()
    before = [sys.getrefcount(thing) for thing in things]
    for _ in range(3):
        work()
    gc.collect()
    assert [sys.getrefcount(thing) for thing in things] == before
    settle()


def test_memory_does_not_grow():
    """200 runs: what one run forgot of its arrays, its links or its report would show."""
    program, denoiser, x = euler(6), Gaussian(6), latents((2, 500))

    def work(times):
        for _ in range(times):
            sample(program, denoiser, x, ranks=3)
        gc.collect()

    tracemalloc.start()
    try:
        work(50)
        before, _ = tracemalloc.get_traced_memory()
        work(150)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000  # a point alone is 4 kB a step and run
    settle()


@pytest.mark.skipif(not tells_memory(), reason="memory cannot be told")
def test_memory_of_the_core_does_not_grow():
    program, denoiser, x = euler(3), Gaussian(3), latents((4, 2**15))  # 512 kB

    def work(times):
        for _ in range(times):
            sample(program, denoiser, x, ranks=3)
        gc.collect()

    work(20)
    before = resident_bytes()
    work(100)
    assert resident_bytes() - before < 30e6  # a link is 1 MB, an arena more


@needs_torch
@pytest.mark.parametrize("at", [0, 2])
def test_no_memory_beside_the_followers(at):
    """The leader goes on alone where they have left it no room; a lone one's error is its own."""
    from crowded import Crowded

    crowded, x = Crowded(at), latents(dtype="torch.float32")

    def denoiser(x, step, rank):
        with crowded(rank == 0):
            return 0.3 * x

    own, _ = parastep.sample(euler(), lambda x, step, rank: 0.3 * x, x, ranks=1, tolerance=0)
    with pytest.warns(parastep.SerialWarning):
        found, report = parastep.sample(euler(), denoiser, x, ranks=3, tolerance="rehearse")
    assert torch.equal(found, own) and crowded.refused == 1
    assert "no memory" in report.fallback

    def full(x, step, rank):
        raise torch.OutOfMemoryError("always")

    with pytest.raises(torch.OutOfMemoryError, match="always"):
        parastep.sample(euler(), full, x, ranks=1)


@needs_torch
def test_a_full_device_gives_back_what_torch_keeps(monkeypatch):
    from parastep import speculation

    emptied, tries = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))

    def make():
        tries.append(True)
        if len(tries) < 2:
            raise parastep.OutOfMemoryError("full")
        return len(tries)

    assert speculation.with_room(make) == 2 and len(emptied) == 1
    tries[:] = []
    with pytest.raises(parastep.OutOfMemoryError):
        speculation.with_room(lambda: tries.append(1) or (_ for _ in ()).throw(
            parastep.OutOfMemoryError("full")))  # fmt: skip
    assert len(tries) == 2
