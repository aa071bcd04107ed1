"""The node pack by itself: its older form, what it says where parastep cannot run, its metadata."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
import shutil
import subprocess
import sys
import types

import comfy_graphs as graphs
import pytest
import tomllib
from comfy_server import NO_HOST, PATH, ROOT, PromptError, Server

import parastep
from parastep.calibration import Calibration, Cost
from parastep.tolerance import NAMES, SCALE

NODES = ROOT / "nodes"

# Imports the pack at the first argument as the host does, and prints what the second evaluates to.
LOAD = """
import importlib.util, json, sys
folder, wanted = sys.argv[1:]
spec = importlib.util.spec_from_file_location("pack", folder + "/__init__.py",
                                              submodule_search_locations=[folder])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
print(json.dumps(eval(wanted)))
"""


def in_a_process(wanted, folder=NODES, flags=(), ahead=()):
    """What an expression over `pack` gives in a Python of its own."""
    environment = {"PYTHONPATH": ":".join(map(str, ahead)), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, *flags, "-c", LOAD, str(folder), wanted]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


@pytest.fixture
def unbuilt(tmp_path):
    """A folder for the front of a path: parastep as a clone has it before it is built."""
    kept = shutil.ignore_patterns("_core*.so", "__pycache__", "*.npz")
    shutil.copytree(ROOT / "parastep", tmp_path / "parastep", ignore=kept)
    return tmp_path


@pytest.fixture
def older(monkeypatch):
    """The pack in a host that has no V3 nodes."""
    monkeypatch.setitem(sys.modules, "comfy_api", None)
    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
    found = importlib.util.spec_from_file_location(
        "older_pack", NODES / "__init__.py", submodule_search_locations=[str(NODES)]
    )
    pack = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "older_pack", pack)
    found.loader.exec_module(pack)
    yield pack
    for name in [name for name in sys.modules if name.startswith("older_pack.")]:
        del sys.modules[name]


def test_a_host_without_v3_nodes_gets_the_older_form(older):
    assert not hasattr(older, "comfy_entrypoint")
    assert older.NODE_DISPLAY_NAME_MAPPINGS == {
        "ParaStep": "ParaStep",
        "ParaStepReport": "ParaStep Report",
    }
    step, report = (older.NODE_CLASS_MAPPINGS[name] for name in ("ParaStep", "ParaStepReport"))
    assert step.RETURN_TYPES == ("MODEL",) and report.RETURN_TYPES == ("LATENT", "STRING", "IMAGE")
    for node in (step, report):
        assert node.CATEGORY == "advanced/multigpu" and node.DESCRIPTION
        groups = node.INPUT_TYPES()
        inputs = {**groups["required"], **groups["optional"]}
        assert all(options.get("tooltip") for _, options in inputs.values())
        assert callable(getattr(node(), node.FUNCTION))
    assert math.isnan(report.IS_CHANGED(model=None, latent=None))  # never cached
    assert step.IS_CHANGED(model=None, devices="cpu") == step.IS_CHANGED(model=None, order=0)
    given = {"devices": "cpu", "quality": "exact", "tolerance": 0.0, "policy": "verified"}
    with pytest.raises(parastep.InvalidError, match="not a ComfyUI MODEL"):
        step().run(model=object(), order=1, **given)


OF_SCALE_1 = json.dumps(
    {
        "tolerance": 0.02,
        "target": 45.0,
        "reached": True,
        "table": [],
        "ranks": 4,
        "steps": 20,
        "model": "m",
        "version": "0",
    }
)
OF_ONES_OWN = ("custom", "own tolerance")  # the second in graphs that were saved earlier


def test_the_tolerance_counts_with_custom_alone(older, monkeypatch):
    """And says so where it is set."""
    step = older.NODE_CLASS_MAPPINGS["ParaStep"]
    words, _ = step.INPUT_TYPES()["required"]["quality"]
    assert words == [*NAMES, "custom"]
    _, options = step.INPUT_TYPES()["required"]["tolerance"]
    assert "quality: custom" in options["display_name"]
    assert options["tooltip"].startswith("Has no effect unless quality is custom")
    told = types.SimpleNamespace(patch=lambda model, devices, **options: options["tolerance"])
    monkeypatch.setattr(sys.modules["older_pack.step"], "host", lambda: told)
    given = {"model": None, "devices": "cpu", "tolerance": 0.007, "policy": "verified", "order": 1}
    for word in NAMES:
        assert step().run(quality=word, **given) == (word,)
    assert step().run(quality="custom", **given) == (0.007,)
    assert step().run(quality="own tolerance", **given) == (0.014,)  # what it meant then


def test_a_saved_graph_says_what_its_tolerance_means(older, monkeypatch):
    step = older.NODE_CLASS_MAPPINGS["ParaStep"]
    _, options = step.INPUT_TYPES()["optional"]["scale"]
    assert options["default"] == SCALE
    told = types.SimpleNamespace(patch=lambda model, devices, **options: options["tolerance"])
    monkeypatch.setattr(sys.modules["older_pack.step"], "host", lambda: told)
    given = {"model": None, "devices": "cpu", "tolerance": 0.02, "policy": "verified", "order": 1}
    for scale, found in ((1, 0.04), (SCALE, 0.02)):
        assert step().run(quality="custom", scale=scale, **given) == (found,)
    with pytest.raises(ValueError, match=r"of scale 3, which a newer parastep wrote: update"):
        step().run(quality="custom", scale=3, **given)
    assert step().run(quality="fast", scale=3, **given) == ("fast",)


@pytest.fixture
def inputs(monkeypatch, tmp_path):
    """ComfyUI's input folder."""
    folder = types.ModuleType("folder_paths")
    folder.get_input_directory = lambda: str(tmp_path / "input")
    monkeypatch.setitem(sys.modules, "folder_paths", folder)
    (tmp_path / "input" / "mine").mkdir(parents=True)
    return tmp_path / "input"


def test_a_calibration_from_a_file(older, inputs, monkeypatch):
    step = older.NODE_CLASS_MAPPINGS["ParaStep"]
    told = types.SimpleNamespace(patch=lambda model, devices, **options: options["tolerance"])
    monkeypatch.setattr(sys.modules["older_pack.step"], "host", lambda: told)
    given = {"model": None, "devices": "cpu", "tolerance": 0.02, "policy": "verified", "order": 1}
    cost = Cost(0.03, 50.0, 48.0, 9.0)
    Calibration(0.03, 45.0, True, [cost], 4, 20, "m", "1").save(inputs / "mine" / "c.json")
    for name in ("mine/c.json", " mine/c.json "):
        (found,) = step().run(quality="fast", calibration=name, **given)
        assert isinstance(found, Calibration) and float(found) == 0.03
    assert step().run(quality="fast", calibration="  ", **given) == ("fast",)
    before = step.IS_CHANGED(calibration="mine/c.json")
    assert before == step.IS_CHANGED(calibration="mine/c.json")
    (inputs / "mine" / "c.json").write_text("[1, 2]")
    assert before != step.IS_CHANGED(calibration="mine/c.json")
    (inputs / "bytes.json").write_bytes(b"\xff\x00")
    (inputs / "scale.json").write_text(OF_SCALE_1)
    (inputs.parent / "outside.json").write_text(OF_SCALE_1)
    (inputs / "link.json").symlink_to(inputs.parent / "outside.json")
    for name, words in (
        ("mine/c.json", "not a calibration of parastep"),
        ("bytes.json", "not a calibration of parastep"),
        ("scale.json", "whose tolerances mean something else"),
        ("nothing.json", f"there is no file 'nothing.json' in {inputs}"),
        ("mine", "there is no file 'mine'"),
        ("../outside.json", f"put the file into {inputs}, and write its name"),
        ("link.json", "is not in ComfyUI's input folder"),
        (str(inputs.parent / "outside.json"), "is not in ComfyUI's input folder"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            step().run(quality="fast", calibration=name, **given)


def test_graphs_of_before_are_valid(older):
    """The host does not hold an input against its list where this function names it."""
    step = older.NODE_CLASS_MAPPINGS["ParaStep"]
    seen = inspect.getfullargspec(step.VALIDATE_INPUTS)
    assert "quality" in seen.args and seen.varkw is None
    assert all(step.VALIDATE_INPUTS(quality=word) is True for word in (*NAMES, *OF_ONES_OWN))
    assert step.VALIDATE_INPUTS() is True  # over a link
    assert "'own' is none of exact, high" in step.VALIDATE_INPUTS(quality="own")
    assert not hasattr(older.NODE_CLASS_MAPPINGS["ParaStepReport"], "VALIDATE_INPUTS")


def test_the_server_takes_graphs_of_before(server):
    made = []
    for given in ({"quality": "exact"}, *({"quality": q, "tolerance": 0.0} for q in OF_ONES_OWN)):
        made.append(server.run(graphs.basic("eps", with_node=given)).outputs["end"]["digest"])
    assert made[0] == made[1] == made[2]
    with pytest.raises(PromptError, match="is none of exact"):
        server.run(graphs.basic("eps", with_node={"quality": "own"}))


def test_importing_it_imports_neither_torch_nor_parastep():
    names = "sorted(set(sys.modules) & {'torch', 'numpy', 'parastep', 'comfy'})"
    assert in_a_process(names) == []


def test_it_says_where_parastep_is_missing(tmp_path):
    shutil.copytree(NODES, tmp_path / "pack", ignore=shutil.ignore_patterns("__pycache__"))
    alone = ("-I", "-S")  # no site-packages
    note = in_a_process("pack.package.NOTE", tmp_path / "pack", alone)
    assert note.startswith("CANNOT RUN YET: parastep is not installed: run `")
    assert f"{sys.executable} -m pip install parastep`, then restart ComfyUI" in note


def test_it_says_where_the_extension_is_not_built(unbuilt):
    note = in_a_process("pack.package.NOTE", ahead=[unbuilt])
    assert note.startswith("CANNOT RUN YET: parastep's C extension is not built: run `")
    assert f"-m pip install {ROOT}`" in note
    for node in ("ParaStep", "ParaStepReport"):
        assert in_a_process(f"pack.{node}.description", ahead=[unbuilt]).startswith(note)
    assert in_a_process("pack.package.NOTE") == ""


def test_a_server_without_the_extension_says_what_to_do(tmp_path, unbuilt):
    """The host starts, its other nodes run, and the node that cannot says so in the graph."""
    if PATH is None:
        pytest.skip(NO_HOST)
    server = Server(tmp_path / "base", ahead=(unbuilt,))
    try:
        server.wait()
        told = server.get("/object_info/ParaStep")["ParaStep"]
        assert told["description"].startswith("CANNOT RUN YET: parastep's C extension")
        with pytest.raises(PromptError) as caught:
            server.run(graphs.basic("eps", with_node={}))
        error = dict(caught.value.told)["execution_error"]
        assert error["node_type"] == "ParaStep"
        assert f"-m pip install {ROOT}`, then restart" in error["exception_message"]
        assert server.run(graphs.basic("eps")).outputs["end"]["digest"]
    finally:
        server.stop()


def test_what_the_registry_reads():
    told = tomllib.loads((NODES / "pyproject.toml").read_text())
    project, comfy = told["project"], told["tool"]["comfy"]
    assert project["name"] == "parastep" and project["dependencies"] == ["parastep"]
    assert project["version"] == parastep.__version__
    assert "ComfyUI" not in project["name"] and project["license"]["text"] == "Apache-2.0"
    assert comfy["PublisherId"] and comfy["DisplayName"] == "ParaStep"
    assert sorted(path.name for path in (NODES / "example_workflows").glob("*.json")) == [
        "audio.json",
        "image.json",
        "video.json",
    ]
