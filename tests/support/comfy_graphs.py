"""Prompts for the real server, as /prompt takes them; the node names are ComfyUI's own."""

from __future__ import annotations

import re
from typing import Any

Graph = dict[str, dict[str, Any]]


def node(class_type: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def parastep(model: str = "model", devices: str = "cpu cpu cpu cpu", **inputs: Any) -> Any:
    given = {"quality": "exact", "tolerance": 0.02, "policy": "verified", "order": 1, **inputs}
    return node("ParaStep", model=[model, 0], devices=devices, **given)


def basic(
    kind: str = "sd15",
    sampler: str = "euler",
    scheduler: str = "normal",
    steps: int = 8,
    cfg: float = 3.0,
    denoise: float = 1.0,
    seed: int = 5,
    batch: int = 1,
    with_node: dict[str, Any] | None = None,
    slow_ms: float = 0.0,
    item_ms: float = 0.0,
) -> Graph:
    """Loader, KSampler, end; `with_node`: inputs of a ParaStep node in between, None for none."""
    graph = {
        "model": node("TinyModel", kind=kind, seed=0, slow_ms=slow_ms, item_ms=item_ms),
        "positive": node("TinyText", kind=kind, seed=1),
        "negative": node("TinyText", kind=kind, seed=2),
        "latent": node("TinyLatent", kind=kind, batch=batch, filled=denoise < 1),
        "sampler": node(
            "KSampler",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler,
            scheduler=scheduler,
            denoise=denoise,
        ),
        "end": node("TinyEnd", latent=["sampler", 0]),
    }
    return graph if with_node is None else insert(graph, with_node)


def insert(graph: Graph, given: dict[str, Any], report: bool = True) -> Graph:
    """The graph with a ParaStep node behind "model", and a report behind "sampler".

    The quality "rehearse", which no user has, is a node of the tests behind one of another quality.
    """
    rehearsed = given.get("quality") == "rehearse"
    last = ["rehearsal" if rehearsed else "parastep", 0]
    made = {
        name: {**each, "inputs": _rewired(each["inputs"], ["model", 0], last)}
        for name, each in graph.items()
    }
    made["parastep"] = parastep(**given | ({"quality": "balanced"} if rehearsed else {}))
    if rehearsed:
        made["rehearsal"] = node("TinyRehearsal", model=["parastep", 0])
    if report:
        made["report"] = node("ParaStepReport", model=last, latent=["sampler", 0])
        made["words"] = node("TinyString", text=["report", 1])
    return made


def _rewired(inputs: dict[str, Any], old: list[Any], new: list[Any]) -> dict[str, Any]:
    return {name: new if value == old else value for name, value in inputs.items()}


def check_parallel(words: str) -> None:
    """Of the report's words: every rank was there, and evaluated ahead."""
    assert "serially" not in words and "left out" not in words, words
    found = re.search(r"evaluations on each rank: \[(.*)\]", words)
    assert found is not None, words
    leader, *followers = map(int, found[1].split(","))
    assert followers and sum(followers) >= leader - 1, words
