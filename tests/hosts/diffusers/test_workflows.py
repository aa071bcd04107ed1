"""The scripts of workflows/diffusers, run dry: they generate, write, and equal the host's bits."""

from __future__ import annotations

import pathlib
import re
import runpy
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

SCRIPTS = pathlib.Path(__file__).parents[3] / "workflows" / "diffusers"
STEPS = 7


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(name, monkeypatch, capsys, *arguments):
    """What the script prints."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.syspath_prepend(str(SCRIPTS))
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_every_script_is_tried():
    found = {path.stem for path in SCRIPTS.glob("[!_]*.py")}
    assert found == {"svd", "cogvideox", "audioldm2", "server"}  # the last one in test_server.py


@pytest.mark.parametrize(
    ("name", "magic", "warmup"),
    [("svd", b"GIF89a", 5), ("cogvideox", b"GIF89a", 13), ("audioldm2", b"RIFF", 5)],
)
def test_dry_run(name, magic, warmup, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deeper" / ("sound.wav" if magic == b"RIFF" else "video.gif")
    dry = ("--tiny", "--steps", str(STEPS), "--compare", "--out", str(out))
    exact = run(name, monkeypatch, capsys, *dry, "--tolerance", "rehearse")
    assert f"{STEPS} steps in {STEPS} rounds on 4 ranks" in exact
    assert re.search(r"sequential .* s, parallel .* s, distance 0\n", exact)
    assert out.read_bytes().startswith(magic) and out.stat().st_size > 200
    rule = ("--steps", "17", "--paper", "--devices", "cpu,cpu")
    paper = run(name, monkeypatch, capsys, *dry, *rule)
    assert f"17 steps in {warmup + (17 - warmup) // 2} rounds on 2 ranks" in paper
    assert "distance 0\n" not in paper


@pytest.mark.parametrize(
    ("name", "missing"), [("svd", "--image"), ("cogvideox", "--prompt"), ("audioldm2", "--prompt")]
)
def test_what_is_missing_is_said_before_a_model_is_loaded(name, missing, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=missing):
        run(name, monkeypatch, capsys)
