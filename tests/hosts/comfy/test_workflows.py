"""The example graphs: the node pack has what the template browser shows, workflows/comfyui the same
graphs in API form. Both forms tell the same, and the server runs them.
"""

from __future__ import annotations

import itertools
import json

import comfy_graphs as graphs
import pytest
from comfy_server import ROOT

NAMES = ("image", "video", "audio")
KINDS = {"image": "sd15", "video": "wan", "audio": "stable_audio"}


def as_shown(name):
    return json.loads((ROOT / "nodes" / "example_workflows" / f"{name}.json").read_text())


def in_api_form(name):
    return json.loads((ROOT / "workflows" / "comfyui" / f"{name}.api.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same_graph(name):
    own, api = as_shown(name), in_api_form(name)
    assert {str(node["id"]): node["type"] for node in own["nodes"]} == {
        number: node["class_type"] for number, node in api.items()
    }
    links = {link[0]: link for link in own["links"]}
    for node in own["nodes"]:
        given = api[str(node["id"])]["inputs"]
        wired = {}
        for put in node["inputs"]:
            _, source, slot, target, *_ = links[put["link"]]
            assert target == node["id"]
            wired[put["name"]] = [str(source), slot]
        assert wired == {k: value for k, value in given.items() if isinstance(value, list)}
        plain = [value for value in given.values() if not isinstance(value, list)]
        left = [value for value in node["widgets_values"] if value not in ("fixed", "default")]
        assert left == [value for value in plain if value != "default"]


@pytest.mark.parametrize("name", NAMES)
def test_no_node_lies_on_another(name):
    title = 30  # above a node's position
    boxes = []
    for node in as_shown(name)["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes.append((x, y - title, x + width, y + height))
    for (left, top, right, bottom), other in itertools.combinations(boxes, 2):
        apart = right < other[0] or other[2] < left or bottom < other[1] or other[3] < top
        assert apart


def test_they_are_in_the_template_browser(server):
    assert sorted(server.get("/workflow_templates")["parastep"]) == sorted(NAMES)
    for name in NAMES:
        told = server.get(f"/api/workflow_templates/parastep/{name}.json")
        assert told == as_shown(name)


def without_weights(graph, kind):
    """The graph with tiny models of the tests in place of files that no test downloads: what loads,
    encodes text, decodes and saves is replaced, the rest is as the file has it.
    """
    made, kept = {}, {}
    for number, node in graph.items():
        named = node["class_type"]
        if named in ("CheckpointLoaderSimple", "UNETLoader"):
            made[number] = graphs.node("TinyModel", kind=kind, seed=0, slow_ms=0.0)
        elif named == "CLIPTextEncode":
            made[number] = graphs.node("TinyText", kind=kind, seed=int(number))
        elif named.startswith("Empty"):
            made[number] = graphs.node("TinyLatent", kind=kind, batch=1, filled=False)
        elif named in (
            "KSampler",
            "ParaStep",
            "ParaStepReport",
            "PreviewImage",
            "ModelSamplingSD3",
        ):
            kept[number] = node
    for number, node in list(kept.items()):
        if node["class_type"] == "KSampler":
            node["inputs"] |= {"steps": 12}
        if node["class_type"] == "ParaStep":
            node["inputs"] |= {"devices": "cpu cpu cpu"}
        if node["class_type"] == "ParaStepReport":
            made["end"] = graphs.node("TinyEnd", latent=[number, 0])
            made["words"] = graphs.node("TinyString", text=[number, 1])
    return {**made, **kept}


def as_stock(graph):
    """The graph as it was before our nodes came into it, and without what shows their report."""
    ours = {k: node for k, node in graph.items() if node["class_type"].startswith("ParaStep")}
    passed_on = {  # of our outputs, what they were given
        (k, 0): node["inputs"]["latent" if "latent" in node["inputs"] else "model"]
        for k, node in ours.items()
    }

    def before(value):
        while isinstance(value, list) and tuple(value) in passed_on:
            value = passed_on[tuple(value)]
        return value

    made = {}
    for k, node in graph.items():
        inputs = {name: before(value) for name, value in node["inputs"].items()}
        told = any(isinstance(value, list) and value[0] in ours for value in inputs.values())
        if k not in ours and not told:
            made[k] = {**node, "inputs": inputs}
    return made


def shown(run, graph):
    """Steps of the sampler in the order in which the server told of them, and its previews."""
    (sampler,) = [k for k, node in graph.items() if node["class_type"] == "KSampler"]
    told = [event["value"] for event in run.of("progress") if event["node"] == sampler]
    assert told == sorted(told)
    return sorted(set(told)), len(run.of("preview"))


@pytest.mark.parametrize("name", NAMES)
def test_they_run(server, name):
    """With the progress and previews of the graph without our nodes, and nearly its latents."""
    graph = in_api_form(name)
    for node in graph.values():  # of the host's own, with the inputs that it knows
        told = server.get(f"/object_info/{node['class_type']}")[node["class_type"]]["input"]
        known = {*told.get("required", {}), *told.get("optional", {})}
        assert set(node["inputs"]) <= known, node
        assert set(told.get("required", {})) <= set(node["inputs"]), node
    graph = without_weights(graph, KINDS[name])
    stock = server.watch(as_stock(graph))
    run = server.watch(graph)
    steps, previews = shown(run, graph)
    assert previews == shown(stock, graph)[1] and steps[-1] == 12
    if name == "audio":  # no previews: the host skips steps that come soon after one it told of
        assert previews == 0
    else:
        assert previews > 0 and steps == shown(stock, graph)[0] and set(range(1, 13)) <= set(steps)
    pairs = list(zip(stock.outputs["end"]["latent"], run.outputs["end"]["latent"]))
    assert sum((a - b) ** 2 for a, b in pairs) < 0.1**2 * sum(a * a for a, _ in pairs)
    words = run.outputs["words"]["text"][0]
    assert "on 3 ranks" in words and "serially" not in words
    (picture,) = next(o["images"] for o in run.outputs.values() if "images" in o)
    query = f"filename={picture['filename']}&type={picture['type']}&subfolder="
    assert server.fetch(f"/view?{query}").startswith(b"\x89PNG")
