"""The real server, over /prompt and the websocket: the same graphs with our node and without."""

from __future__ import annotations

import json
import time

import comfy_graphs as graphs
import pytest
from comfy_server import PromptError

from parastep.calibration import Calibration, Cost
from parastep.tolerance import NAMES

EXACT = {"quality": "exact"}
REHEARSE = {"quality": "rehearse"}  # rounds with the stock latents


def both(server, with_node, **given):
    """(own, ours, words of the report) of a basic graph."""
    own = server.run(graphs.basic(**given)).outputs["end"]
    made = server.run(graphs.basic(**given, with_node=with_node)).outputs
    return own, made["end"], made["words"]["text"][0]


def test_nodes_are_declared(server):
    step, report = (
        server.get(f"/object_info/{name}")[name] for name in ("ParaStep", "ParaStepReport")
    )
    assert step["output"] == ["MODEL"] and report["output"] == ["LATENT", "STRING", "IMAGE"]
    assert step["category"] == report["category"] == "advanced/multigpu"
    inputs = step["input"]["required"]
    assert list(inputs) == ["model", "devices", "quality", "tolerance", "policy", "order"]
    optional = ["max_stride", "calibration", "scale"]  # graphs of before have none
    assert list(step["input"]["optional"]) == optional
    inputs = {**inputs, **step["input"]["optional"]}
    assert all(options.get("tooltip") for _, options in inputs.values())
    kind, options = inputs["quality"]
    words = kind if isinstance(kind, list) else options["options"]
    assert words == [*NAMES, "custom"]
    assert "CANNOT RUN" not in step["description"]
    if "search_aliases" in step:  # which older versions do not have
        assert "multi GPU" in step["search_aliases"] and "drift" in report["search_aliases"]


@pytest.mark.parametrize(
    "sampler, scheduler",
    [
        ("euler", "normal"),
        ("dpmpp_2m", "karras"),
        ("dpmpp_2m_sde", "sgm_uniform"),
        ("heun", "beta"),
        ("uni_pc", "simple"),
        ("euler_ancestral", "normal"),
        ("euler_cfg_pp", "normal"),
    ],
)
def test_the_same_picture(server, sampler, scheduler):
    given = {"kind": "sd15", "sampler": sampler, "scheduler": scheduler}
    own, ours, words = both(server, REHEARSE, **given)
    assert ours["digest"] == own["digest"], words
    graphs.check_parallel(words)


def test_exact_is_the_stock_sampler_alone(server):
    own, ours, words = both(server, EXACT, kind="sd15", steps=9)
    assert ours["digest"] == own["digest"]
    assert "evaluations on each rank: [9, 0, 0, 0]" in words
    assert "untouched host" in words and "3 of 4 ranks are idle" in words
    assert "serially" not in words


def test_fewer_rounds(server):
    ours = server.run(
        graphs.basic("flow", scheduler="simple", steps=20, with_node={"quality": "balanced"})
    )
    own = server.run(graphs.basic("flow", scheduler="simple", steps=20))
    words = ours.outputs["words"]["text"][0]
    steps, rounds = (int(words.split()[k]) for k in (0, 3))
    assert steps == 20 and rounds < 14, words
    assert f"ParaStep: {words.splitlines()[0]}" in server.log.read_text()
    pairs = list(zip(own.outputs["end"]["latent"], ours.outputs["end"]["latent"]))
    assert sum((a - b) ** 2 for a, b in pairs) < 1e-3 * sum(a * a for a, _ in pairs)


def test_one_device_and_three(server):
    """Euler in 30 steps: fewer model calls than steps, near the stock latent, each step shown."""
    given = {"scheduler": "simple", "steps": 30}
    own, rounds = server.run(graphs.basic("flow", **given)).outputs["end"]["latent"], []
    for devices in ("cpu", "cpu cpu cpu"):
        node = {"quality": "balanced", "devices": devices}
        run = server.watch(graphs.basic("flow", **given, with_node=node))
        words = run.outputs["words"]["text"][0]
        assert "serially" not in words, words
        rounds.append(int(words.split()[3]))
        shown = [event["value"] for event in run.of("progress") if event["node"] == "sampler"]
        assert shown == sorted(shown) and set(range(1, 31)) <= set(shown)
        pairs = list(zip(own, run.outputs["end"]["latent"]))
        assert sum((a - b) ** 2 for a, b in pairs) < 1e-3 * sum(a * a for a, _ in pairs)
    assert rounds[1] < rounds[0] < 30


def test_every_step_verified(server):
    given = {"scheduler": "simple", "steps": 30}
    for devices, one in (("cpu", True), ("cpu cpu cpu", False)):
        node = {"quality": "balanced", "devices": devices, "max_stride": 1}
        words = server.run(graphs.basic("flow", **given, with_node=node)).outputs["words"]
        (text,) = words["text"]
        assert "interpolated" not in text
        assert (int(text.split()[3]) == 30) == one, text


def test_progress_and_previews_are_the_hosts_own(server):
    """20 events and as many previews, in order, of true latents: the same bytes as without us."""
    seen = []
    for given in (None, REHEARSE, {"quality": "balanced"}):
        graph = graphs.basic("sd15", steps=20, seed=77, with_node=given)
        run = server.watch(graph)
        own = [event["value"] for event in run.of("progress") if event["node"] == "sampler"]
        assert own == sorted(own) and own[-1] == 20 and set(range(1, 21)) <= set(own)
        seen.append([data[8:] for data in run.of("preview")])
    assert seen[0] and seen[0] == seen[1]
    assert len(seen[2]) == len(seen[0])


PAIRS = {"quality": "balanced", "devices": "cpu+cpu:1, cpu:2 + cpu:3"}


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_pairs_share_each_step(server, sampler):
    """With progress and previews as ever; at cfg 1 each device is a rank."""
    given = {"kind": "sd15", "sampler": sampler, "steps": 20}
    for cfg in (7.0, 1.0):
        own = server.run(graphs.basic(**given, cfg=cfg)).outputs["end"]["latent"]
        run = server.watch(graphs.basic(**given, cfg=cfg, with_node=PAIRS))
        words = run.outputs["words"]["text"][0]
        steps, rounds, ranks = (int(words.split()[k]) for k in (0, 3, 6))
        assert rounds < steps and ranks == (2 if cfg > 1 else 4), words
        assert ("rank 1: cpu:2 + cpu:3, split by conditions" in words) == (cfg > 1), words
        assert ("rank 3: cpu:3, unsplit: one condition a step" in words) == (cfg == 1.0), words
        assert "serially" not in words and "left out" not in words and "lost" not in words
        pairs = list(zip(own, run.outputs["end"]["latent"]))
        assert sum((a - b) ** 2 for a, b in pairs) < 1e-3 * sum(a * a for a, _ in pairs)
        shown = [event["value"] for event in run.of("progress") if event["node"] == "sampler"]
        assert shown == sorted(shown) and set(range(1, 21)) <= set(shown)
        assert run.of("preview")


def test_pairs_that_cannot_be_say_what_to_write(server):
    for devices, words in (
        ("cpu+cpu:1, cpu:2", "as many for each"),
        ("cpu+cpu:1, cpu:1+cpu:2", "cpu:1 is there twice"),
        ("cpu+", "no device on one side of +"),
        ("cpu+cuda:63", "there is no cuda:63"),
    ):
        with pytest.raises(PromptError) as caught:
            server.run(graphs.basic("eps", with_node={"devices": devices}))
        told = dict(caught.value.told)["execution_error"]
        assert told["node_type"] == "ParaStep" and words in told["exception_message"]


def test_cancelling_pairs(server):
    slow = graphs.basic("flow", scheduler="simple", steps=200, item_ms=30, with_node=PAIRS)
    with server.listening() as events:
        prompt = server.submit(slow)
        until = time.monotonic() + 60
        while time.monotonic() < until and sum(name == "progress" for name, _ in events) < 8:
            time.sleep(0.01)
        server.post("/interrupt", {})
        with pytest.raises(PromptError, match="interrupted"):
            server.result(prompt, 60)
    words = server.run(graphs.basic("sd15", steps=20, with_node=PAIRS)).outputs["words"]["text"][0]
    assert "rank 0: cpu + cpu:1, split by conditions" in words and "lost" not in words


def test_a_calibration_in_the_input_folder(server):
    """Its tolerance takes the place of quality; another file of that name is read again."""
    folder, node = server.base / "input", {"quality": "exact", "calibration": "found.json"}
    folder.mkdir(exist_ok=True)
    graph = graphs.basic("flow", scheduler="simple", steps=20, with_node=node)
    with pytest.raises(PromptError) as caught:
        server.run(graph)
    told = dict(caught.value.told)["execution_error"]["exception_message"]
    assert "there is no file 'found.json' in" in told and str(folder) in told
    rounds = []
    for tolerance in (0.0, 0.12):
        cost = Cost(tolerance, 50.0, 48.0, 9.0)
        found = Calibration(tolerance, 45.0, True, [cost], 4, 20, "Tiny", "1")
        found.save(folder / "found.json")
        rounds.append(int(server.run(graph).outputs["words"]["text"][0].split()[3]))
    assert rounds[1] < rounds[0] == 20
    (folder / "found.json").write_text("{}")
    with pytest.raises(PromptError, match="not a calibration of parastep"):
        server.run(graph)
    for name in ("../../outside.json", "/etc/hostname"):
        graph["parastep"]["inputs"]["calibration"] = name
        with pytest.raises(PromptError, match="is not in ComfyUI's input folder"):
            server.run(graph)


def test_cancel_and_go_on(server):
    """Cancelling answers in the steps of a second, and the next prompt runs as ever."""
    own = server.run(graphs.basic("flow", scheduler="simple")).outputs["end"]["digest"]
    slow = graphs.basic("flow", scheduler="simple", steps=200, slow_ms=50, with_node=REHEARSE)
    with server.listening() as events:
        prompt = server.submit(slow)
        until = time.monotonic() + 60
        while time.monotonic() < until and sum(name == "progress" for name, _ in events) < 3:
            time.sleep(0.01)
        server.post("/interrupt", {})
        done = sum(name == "progress" for name, _ in events)
        with pytest.raises(PromptError, match="interrupted"):
            server.result(prompt, 60)
        assert sum(name == "progress" for name, _ in events) - done < 1000 / 50
    again = server.run(graphs.basic("flow", scheduler="simple", with_node=REHEARSE))
    assert again.outputs["end"]["digest"] == own
    graphs.check_parallel(again.outputs["words"]["text"][0])


def test_errors_say_what_to_do(server):
    for devices, words in (("cuda:0", "begin with that one"), ("what", "what")):
        with pytest.raises(PromptError) as caught:
            server.run(graphs.basic("eps", with_node={"devices": devices}))
        told = dict(caught.value.told)["execution_error"]
        assert told["node_type"] == "ParaStep" and words in told["exception_message"]
    graph = graphs.basic("eps", with_node=EXACT)
    graph["report"]["inputs"]["model"] = ["model", 0]
    with pytest.raises(PromptError) as caught:
        server.run(graph)
    assert "put one in" in dict(caught.value.told)["execution_error"]["exception_message"]


def test_unload_and_run_again(server):
    graph = graphs.basic("sd15", with_node=REHEARSE)
    first = server.run(graph).outputs["end"]["digest"]
    cached = server.watch(graph).of("execution_cached")[0]["nodes"]
    assert {"model", "parastep"} <= set(cached)
    server.post("/free", {"unload_models": True, "free_memory": True})
    until = time.monotonic() + 60
    while "model" in cached and time.monotonic() < until:  # the host does it when it is idle
        time.sleep(0.1)
        again = server.watch(graph)
        cached = again.of("execution_cached")[0]["nodes"]
    assert not {"model", "parastep", "sampler"} & set(cached)
    assert again.outputs["end"]["digest"] == first
    graphs.check_parallel(again.outputs["words"]["text"][0])


def test_a_cached_rerun_still_reports(server):
    graph = graphs.basic("flow", scheduler="simple", with_node=EXACT)
    words = server.run(graph).outputs["words"]["text"][0]
    again = server.watch(graph)
    cached = again.of("execution_cached")[0]["nodes"]
    assert "sampler" in cached and "report" not in cached
    assert again.outputs["words"]["text"][0] == words


def test_two_samplers_on_one_patched_model(server):
    def chained(graph):
        second = json.loads(json.dumps(graph["sampler"]))
        second["inputs"] |= {"latent_image": ["sampler", 0], "denoise": 0.5, "seed": 9}
        return {**graph, "second": second, "end": graphs.node("TinyEnd", latent=["second", 0])}

    own = chained(graphs.basic("flow", scheduler="simple"))
    ours = graphs.insert(own, REHEARSE)
    ours["report"]["inputs"]["latent"] = ["second", 0]
    made = server.run(ours).outputs
    assert made["end"]["digest"] == server.run(own).outputs["end"]["digest"]
    graphs.check_parallel(made["words"]["text"][0])


def test_img2img_batch_and_cfg_1(server):
    for given in (
        {"denoise": 0.5},
        {"batch": 3},
        {"cfg": 1.0},
        {"steps": 1},
        {"steps": 2},
    ):
        own, ours, words = both(server, REHEARSE, kind="sd15", **given)
        assert ours["digest"] == own["digest"], (given, words)
        if given == {"steps": 1}:
            assert "nothing to gain" in words
        else:
            graphs.check_parallel(words)


def test_advanced_and_custom_samplers(server):
    base = graphs.basic("flow")
    common = {name: base["sampler"]["inputs"][name] for name in ("model", "positive", "negative")}
    advanced = graphs.node(
        "KSamplerAdvanced",
        **common,
        latent_image=["latent", 0],
        add_noise="enable",
        noise_seed=3,
        steps=12,
        cfg=2.0,
        sampler_name="dpmpp_2m",
        scheduler="simple",
        start_at_step=2,
        end_at_step=9,
        return_with_leftover_noise="enable",
    )
    graph = {**base, "sampler": advanced}
    own = server.run(graph).outputs["end"]["digest"]
    ours = server.run(graphs.insert(graph, REHEARSE)).outputs
    assert ours["end"]["digest"] == own
    graphs.check_parallel(ours["words"]["text"][0])
    custom = {
        **base,
        "noise": graphs.node("RandomNoise", noise_seed=4),
        "guider": graphs.node("CFGGuider", **common, cfg=2.5),
        "third": graphs.node("TinyText", kind="flow", seed=3),
        "solver": graphs.node("KSamplerSelect", sampler_name="dpmpp_2m"),
        "sigmas": graphs.node(
            "BasicScheduler", model=["model", 0], scheduler="simple", steps=9, denoise=1.0
        ),
        "sampler": graphs.node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["solver", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
    }
    alone = graphs.node("BasicGuider", model=["model", 0], conditioning=["positive", 0])
    texts = {"cond1": ["positive", 0], "cond2": ["third", 0], "negative": ["negative", 0]}
    strengths = {"cfg_conds": 3.0, "cfg_cond2_negative": 2.0, "style": "regular"}
    dual = graphs.node("DualCFGGuider", model=["model", 0], **texts, **strengths)
    for guider in (custom["guider"], alone, dual):
        graph = {**custom, "guider": guider}
        own = server.run(graph).outputs["end"]["digest"]
        ours = server.run(graphs.insert(graph, REHEARSE)).outputs
        assert ours["end"]["digest"] == own
        graphs.check_parallel(ours["words"]["text"][0])
