"""Compiled denoisers: replicas are compiled alike, and nobody keeps what their code reuses."""

from __future__ import annotations

import math
import os
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import graphs  # noqa: E402
import tiny  # noqa: E402
from hosting import caught, no_warnings, parallel, threads  # noqa: E402

from parastep.diffusers import compiling  # noqa: E402
from parastep.diffusers.remote.packing import (  # noqa: E402
    pipeline_from_memory,
    pipeline_to_memory,
)

WAYS: dict[str, dict[str, Any]] = {
    "another backend": {"backend": "eager", "dynamic": False, "fullgraph": True},
    "inductor": {"mode": "max-autotune-no-cudagraphs", "dynamic": True},
    "as it comes": {},
}


def compiled(pipe: Any) -> dict[str, dict[str, Any]]:
    """By path, how the parts of its transformer were compiled."""
    return {path: how for (_, path), how in compiling.compiled_parts(pipe).items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("blocks", [False, True])
def test_a_replica_is_compiled_as_its_original(way: str, blocks: bool) -> None:
    pipe, twin = tiny.CASES["sd3"].build(), tiny.CASES["sd3"].build()
    for each in (pipe, twin):
        model = each.transformer
        for part in model.transformer_blocks if blocks else [model]:
            part.compile(**WAYS[way])
    wanted = compiled(twin)
    assert len(wanted) == (len(pipe.transformer.transformer_blocks) if blocks else 1)
    with parallel(pipe, 2) as together:
        together._ranks._refresh(pipe, together._options, lane=True)
        for replica in together._ranks._replicas.values():
            assert compiled(replica) == wanted
    memory = pipeline_to_memory(pipe)
    try:
        assert compiled(pipeline_from_memory(memory, torch.device("cpu"))) == wanted
    finally:
        os.close(memory)


@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_blocks_compiled_in_place_in_calls(mode: str) -> None:
    case, pipe = tiny.CASES["sd3"], tiny.CASES["sd3"].build()
    for part in pipe.transformer.transformer_blocks:
        part.compile(backend="eager", fullgraph=True)
    alone = tiny.run(pipe, case.kwargs(steps=4))
    with no_warnings(), parallel(pipe, 2, mode=mode) as together:
        assert torch.equal(tiny.run(together, case.kwargs(steps=4)), alone)
        assert together.report.evaluations == [4, 3]


def test_one_that_does_not_tell_how_it_was_compiled(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny.CASES["sd3"].build()
    pipe.transformer._compiled_call_impl = pipe.transformer._call_impl
    assert compiling.compiled_parts(pipe) == {}
    assert "replicas run transformer uncompiled" in caplog.text


class Graphed(torch.Tensor):
    """An output in memory of a CUDA graph of torch's: the next run takes it back, and an alias that
    is used after that raises.
    """

    run: list[int]  # one item a run
    made_at: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        graphed = [value for value in args if isinstance(value, cls)]
        if any(len(value.run) != value.made_at for value in graphed):
            raise RuntimeError("accessing tensor output of CUDAGraphs that has been overwritten")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.detach:
            return cls.output(result, graphed[0].run)
        return result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result

    @classmethod
    def output(cls, tensor: torch.Tensor, run: list[int]) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            made = tensor.as_subclass(cls)
            made.run, made.made_at = run, len(run)
        return made


def graphed(module: Any, inputs: Any) -> Any:
    """A backend for torch.compile."""

    def run(*given: Any) -> Any:
        runs = vars(threading.current_thread()).setdefault("runs", [])  # each thread has its own
        runs.append(1)
        return tuple(Graphed.output(output, runs) for output in module(*given))

    return run


def test_outputs_whose_memory_the_next_run_takes_back() -> None:
    case, pipe = tiny.CASES["sd3"], tiny.CASES["sd3"].build()
    pipe.transformer.compile(backend=graphed, fullgraph=True)
    alone = tiny.run(pipe, case.kwargs(steps=6))
    with no_warnings():
        with parallel(pipe, 2, math.inf) as together:
            tiny.run(together, case.kwargs(steps=6))
            assert together.report.rounds < 6 and together.report.fallback is None
        with parallel(pipe, 2) as together:
            assert torch.equal(tiny.run(together, case.kwargs(steps=6)), alone)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("path", ["", "transformer_blocks.0"])
def test_a_forward_that_replays_a_graph(ranks: int, path: str) -> None:
    case, pipe = tiny.CASES["sd3"], tiny.CASES["sd3"].build()
    graphs.replay(pipe.transformer.get_submodule(path))
    alone = tiny.run(pipe, case.kwargs(steps=20))
    with parallel(pipe, ranks, math.inf, max_stride=None) as together:
        with caught() as texts:
            assert torch.equal(tiny.run(together, case.kwargs(steps=20)), alone)
        assert len(texts) == 1 and f"{path} replays a CUDA graph" in together.report.fallback
        assert not together._ranks._replicas


class Captures:
    """A forward that is captured when it is first called, into memory of its own."""

    def __init__(self, own: Any) -> None:
        self.own, self.output = own, None
        self.beside: list[str] = []  # threads of followers meanwhile

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        m, *rest = self.own(*args, **kwargs)
        if self.output is None:
            self.beside, self.output = threads(), m.clone()
        self.output.copy_(m)
        return (self.output, *rest)


def test_a_graph_that_the_first_forward_captures() -> None:
    """Nobody else is at work by then, whose allocations would end the capture."""
    case, pipe = tiny.CASES["sd3"], tiny.CASES["sd3"].build()
    alone = tiny.run(pipe, case.kwargs(steps=6))
    pipe.transformer.forward = Captures(pipe.transformer.forward)
    with parallel(pipe, 3, math.inf) as together:
        with caught():
            assert torch.equal(tiny.run(together, case.kwargs(steps=6)), alone)
        assert "keeps what it computed" in (together.report.fallback or "")
    assert pipe.transformer.forward.beside == []


@pytest.mark.parametrize("way", ["in place", "around"])
def test_graphs_that_other_threads_cannot_run(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch before 2.13, whose graphs are known to its own threads alone."""
    case, pipe = tiny.CASES["sd3"], tiny.CASES["sd3"].build()
    with parallel(pipe, 2) as together:
        monkeypatch.setattr(compiling, "_home", lambda pipe: "cuda")
        monkeypatch.setattr(compiling, "_release", lambda version: (2, 11))
        with no_warnings():
            tiny.run(together, case.kwargs(steps=3))
        assert together.report.fallback is None
        plain = pipe.transformer
        if way == "in place":
            pipe.transformer.compile(mode="reduce-overhead")
        else:
            pipe.transformer = torch.compile(plain, mode="reduce-overhead")
        reason = compiling.unfit_for_threads(pipe)
        assert reason is not None and "mode='processes'" in reason
        _, followers, fallback = together._ranks.call(pipe, ((), {}), together._options)
        assert followers == [] and fallback == reason
        monkeypatch.setattr(compiling, "_release", lambda version: (2, 13))
        assert compiling.unfit_for_threads(pipe) is None
