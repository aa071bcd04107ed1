"""What `make gpu` runs, dry: its parts on the CPU, its programs on the stand-in libraries."""

from __future__ import annotations

import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import time
from typing import Any

import pytest

torch = pytest.importorskip("torch")

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = (
    "exact", "hosts", "rounds", "one_gpu", "half", "denoisers", "memory", "end_to_end",
)  # fmt: skip


@pytest.fixture(scope="session")
def programs() -> pathlib.Path:
    """Where the programs in C and the stand-ins for them were built."""
    if shutil.which("make") is None or shutil.which("gcc") is None:
        pytest.skip("no make and gcc to build the programs with")
    targets = ["gpu/kernels", "gpu/cases", "gpu/plain", "gpu/nccl"]
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


def dry_run(programs: pathlib.Path, out: pathlib.Path, *more: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "tests/gpu/run.py", "--dry", "--out", str(out)]
    command += ["--parts", "kernels", "nccl", "sanitizer", "--programs", str(programs), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    parts = json.loads((out / "gpu.json").read_text())["parts"]
    return done.returncode, {part["name"]: part for part in parts}


def test_parts_in_processes_of_their_own(programs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """One that fails leaves the rest, and what is left over of the time is what others get."""
    code, found = dry_run(programs, tmp_path)
    assert code == 0, found
    assert [part["ok"] for name, part in found.items() if "sanitizer" not in name] == [True] * 4
    rows = [row for part in found.values() for row in part["rows"]]
    lost = {row["run"]: row["lost"] for row in rows if "run" in row}
    assert lost == {"exact": 0, "loose": 0, "timed": 0, "killed": 1}
    assert [row["wrong"] for row in rows if row.get("part") in ("check", "cases")] == [0, 0, 0]

    there = tmp_path / "gpu"  # all but one of the programs are missing
    there.mkdir()
    shutil.copy(programs / "nccl", there)
    shutil.copytree(programs.parent / "fake", tmp_path / "fake")
    code, found = dry_run(there, tmp_path)
    assert code == 1
    assert {name.split()[0]: part["ok"] for name, part in found.items()} == {
        "kernels": False, "random": False, "plain,": False, "compute-sanitizer": None,
        "nccl,": True,
    }  # fmt: skip
    for late in (["--budget", "0"], ["--began", str(time.time() - 600)]):  # the build's time counts
        code, found = dry_run(programs, tmp_path, *late)
        assert code == 0 and {part["ok"] for part in found.values()} == {None}
        assert "no time left" in (tmp_path / "gpu.txt").read_text()


HANGS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
print('{"child": %d}' % child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tests/gpu"))
    import run

    return run


def test_results_are_there_at_once_and_nothing_goes_on(runner: Any, tmp_path: pathlib.Path) -> None:
    """Of one that hangs, with a process of its own in another session, as torchrun's ranks are."""
    results, seen = runner.Results(tmp_path, 1, dry=False), []

    def told(result: Any) -> None:
        results.write(result)
        seen.append(json.loads((tmp_path / "gpu.json").read_text())["parts"][-1]["rows"])

    command = runner.Command("hangs", [sys.executable, "-c", HANGS], 60)
    results.add(runner.ran(command, 6.0, dict(os.environ), tmp_path, told))
    [result] = results.done
    assert result["ok"] is False and result["error"] == "not done in 6 s"
    assert seen == [result["rows"]] and len(result["rows"]) == 1
    for _ in range(100):
        stat = pathlib.Path(f"/proc/{result['rows'][0]['child']}/stat")
        if not stat.exists() or ") Z " in stat.read_text():
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the child goes on")


def test_figures_beside_their_targets(runner: Any, tmp_path: pathlib.Path) -> None:
    lincomb = {"part": "lincomb", "inputs": 20, "us": 41.0, "of_copy_of_as_many_bytes": 0.9}
    rows = [lincomb, {"part": "ask", "KB": 64, "us": 9.0}, {"wall_over_rounds": 1.03}]
    rows += [{"reserved_GiB": [1, 2, 4], "growth": 2.0}, {"model": "m", "seconds": 3.0}]
    results = runner.Results(tmp_path, 1, dry=False)
    results.add({"name": "a part", "ok": True, "seconds": 1.0, "rows": rows})
    text = (tmp_path / "gpu.txt").read_text()
    assert text.count(": met") == 2 and text.count(": MISSED") == 3
    assert "target for us at most 40: MISSED" in text
    assert "target for of_copy_of_as_many_bytes at least 0.85: met" in text


def test_what_is_wanted_of_a_programs_words(runner: Any, tmp_path: pathlib.Path) -> None:
    """A part by cuBLAS that had none proves something else."""
    for wanted, ok in (("cuBLAS 1", True), ("cuBLAS 2", False)):
        words = [sys.executable, "-c", """print('{"found": "cuBLAS 13"}')"""]
        command = runner.Command("plain", words, 60, wanted=wanted)
        result = runner.ran(command, 60.0, dict(os.environ), tmp_path, lambda row: None)
        assert result["ok"] is ok


def test_a_program_that_has_nothing_to_show_is_skipped(runner: Any, tmp_path: pathlib.Path) -> None:
    says = "import sys; print('no kernels', file=sys.stderr); sys.exit({})".format
    refuses = "import sys; print('==== Device not supported'); sys.exit(9)"
    for code, ok in ((says(77), None), (says(1), False), (refuses, None)):
        command = runner.Command("kernels", [sys.executable, "-c", code], 60)
        result = runner.ran(command, 60.0, dict(os.environ), tmp_path, lambda row: None)
        assert result["ok"] is ok and result["error"]


def test_programs_without_kernels_say_so(programs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Those of a build without nvcc: by cuBLAS there are other bits, which would be no faults."""
    (tmp_path / "none.c").write_text("const unsigned char *ps__kernel_image(void) { return 0; }\n")
    built = ROOT / "build/c"
    objects = [built / f"obj/tests/gpu/{name}.o" for name in ("cases", "device")]
    command = ["gcc", "-pthread", tmp_path / "none.c", *objects, built / "libparastep.a"]
    subprocess.run([*command, "-ldl", "-lm", "-o", tmp_path / "cases"], check=True)
    env = {**os.environ, "LD_PRELOAD": str(built / "fake/libcuda.so.1")}
    words = [tmp_path / "cases", "0", "3"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 77 and "built without nvcc" in done.stderr


def test_schedulers_are_made_on_the_cpu(runner: Any) -> None:
    """They compute with NumPy, which takes no tensor of a device; here of one without memory."""
    import models

    for name, make in models.SYSTEMS.items():
        pipe = make("meta", torch.float16, True).pipe
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        assert "meta" in {weight.device.type for weight in denoiser.parameters()}, name
        pipe.scheduler.set_timesteps(20)
        assert pipe.scheduler.alphas_cumprod.device.type == "cpu"


def test_libraries_in_wheels_are_found(
    runner: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nccl", "cu13"):
        (tmp_path / "nvidia" / name / "lib").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/first")
    found = runner.environment(tmp_path / "c/gpu", dry=False, in_c=True)["LD_LIBRARY_PATH"]
    assert found.split(":")[0] == "/first"
    assert {str(tmp_path / f"nvidia/{name}/lib") for name in ("nccl", "cu13")} <= {
        *found.split(":")
    }
    env = runner.environment(tmp_path / "c/gpu", dry=False, in_c=False)
    assert env["LD_LIBRARY_PATH"] == "/first"


def test_make_keeps_what_pythonpath_names(programs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """diffusers may be a wheel that only PYTHONPATH knows of."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH $*" >> {tmp_path}/log\n')
    python.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    for named in ("/some/wheel.whl", ""):
        command = ["make", "gpu", f"GPU_PYTHON={python}", "GPU_ARGS=--out /somewhere"]
        env["PYTHONPATH"] = named
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
        line = (tmp_path / "log").read_text().splitlines()[-1]
        own = f"{ROOT}/build/gpu/lib"
        assert line.startswith(f"{own}:{named} " if named else f"{own} ")
        assert "--began" in line and line.endswith("--out /somewhere")


def test_what_a_machine_lacks_is_said_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    needs = runpy.run_path(str(ROOT / "tests/gpu/needs.py"))["missing"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [text.split()[0] for text in needs()] == [
        "gcc", "Python's", "numpy", "setuptools", "torch",
    ]  # fmt: skip
