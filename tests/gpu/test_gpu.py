"""What `make gpu` runs, dry: its parts on the CPU, its programs on the stand-in libraries."""

from __future__ import annotations

import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = ("exact", "hosts", "rounds", "one_gpu", "half", "denoisers")


@pytest.fixture(scope="session")
def programs() -> pathlib.Path:
    """Where the programs in C and the stand-ins for them were built."""
    if shutil.which("make") is None or shutil.which("gcc") is None:
        pytest.skip("no make and gcc to build the programs with")
    targets = ["gpu/kernels", "gpu/plain", "gpu/nccl"]
    targets += ["fake/libcuda.so.1", "fake/libcublas.so.13", "fake/libnccl.so.2"]
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", *(f"build/c/{target}" for target in targets)]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    return ROOT / "build/c/gpu"


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_on_the_cpu(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["parts.py", part, "1", "--dry"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        runpy.run_path(str(ROOT / "tests/gpu/parts.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    rows = rows_of(capsys.readouterr().out)
    assert rows
    assert all(row.get("same", True) and not row.get("lost") for row in rows)


def test_parts_in_processes_of_their_own(programs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """One that fails leaves the rest, and what is left over of the time is what others get."""
    command = [sys.executable, "tests/gpu/run.py", "--dry", "--out", str(tmp_path)]
    command += ["--parts", "kernels", "sanitizer", "nccl"]
    done = subprocess.run(
        [*command, "--programs", str(programs)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [part["ok"] for part in found if "sanitizer" not in part["name"]] == [True] * 3
    rows = [row for part in found for row in part["rows"]]
    lost = {row["run"]: row["lost"] for row in rows if "run" in row}
    assert lost == {"exact": 0, "loose": 0, "timed": 0, "killed": 1}
    assert [row["wrong"] for row in rows if row.get("part") == "check"] == [0, 0]

    there = tmp_path / "gpu"  # one of the programs is missing
    there.mkdir()
    shutil.copy(programs / "nccl", there)
    shutil.copytree(programs.parent / "fake", tmp_path / "fake")
    done = subprocess.run(
        [*command, "--programs", str(there)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {part["name"].split()[0]: part["ok"] for part in found} == {
        "kernels": False, "plain,": False, "compute-sanitizer": None, "nccl,": True,
    }  # fmt: skip
    done = subprocess.run(
        [*command, "--programs", str(programs), "--budget", "0"], cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert "no time left" in (tmp_path / "gpu.txt").read_text()
