"""`parastep check`: what it says, what it hides, and that each of its tests can fail."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

import parastep
from parastep import check, cli


def test_as_a_user_runs_it(tmp_path):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "__init__.py").write_text("raise RuntimeError('slow to import')")
    (tmp_path / "comfyui_version.py").write_text("__version__ = '9.8.7'")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "USER": "somebody", "LOGNAME": "somebody", "HOME": "/home/some"}
    environment["PYTHONPATH"] = path
    command = [sys.executable, "-m", "parastep", "check"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["parastep"] == parastep.__version__
    assert "cpu found" in lines["backends"] and "threads" in lines["transports"]
    assert f"numpy {np.__version__}" in lines["libraries"]
    assert "ComfyUI 9.8.7" in lines["hosts"]
    assert lines["self-test"] == "passed"
    assert "somebody" not in done.stdout and "/" not in done.stdout.replace("\\", "/")


def test_all_tests_pass_or_say_what_they_lack():
    lines = []
    assert check.check(lines.append)
    for name in check.TESTS:
        (line,) = (line for line in lines if line.startswith(name))
        assert " ok, " in line or " skipped: " in line


def wrong_result(program, denoiser, x, **options):
    y, report = parastep.sample(program, denoiser, x, **options)
    return (y if options["ranks"] == 1 else y + 1), report


def wrong_report(program, denoiser, x, **options):
    y, report = parastep.sample(program, denoiser, x, **options)
    return y, dataclasses.replace(report, rounds=report.steps + 1, failures=[])


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        (wrong_result, ("exact", "tolerance", "lost rank", "tensors")),
        (wrong_report, ("exact", "rounds", "tolerance", "lost rank")),
    ],
)
def test_each_can_fail(monkeypatch, broken, names):
    monkeypatch.setattr(check, "sample", broken)
    if "tensors" in names:
        pytest.importorskip("torch")
    for name in names:
        with pytest.raises(AssertionError):
            check.TESTS[name]()


def test_the_pipeline_can_fail(monkeypatch):
    pytest.importorskip("diffusers")
    from parastep.diffusers.leader import asking

    monkeypatch.setattr(asking.Asking, "turn", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check.TESTS["diffusers"]()


def test_a_failure_is_the_exit_status_and_does_not_end_the_others(monkeypatch, capsys):
    def failing():
        raise parastep.Error("no room in /home/somebody/models/x.bin for somebody's model")

    tests = {"first": failing, "second": lambda: "ok"}
    monkeypatch.setattr(check, "TESTS", tests)
    monkeypatch.setattr(check.getpass, "getuser", lambda: "somebody")
    assert cli.main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    text = "first        FAILED: Error: no room in x.bin for user's model, "
    assert any(line.startswith(text) for line in lines)
    assert any(line.startswith("second       ok, ") for line in lines)
    assert lines[-1] == "self-test    FAILED"
    monkeypatch.setattr(check, "TESTS", {"second": lambda: "ok"})
    assert cli.main(["check"]) == 0


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = dict(check.found())
    assert found["torch"] == "not installed" and found["devices"] == "cpu"
    with pytest.raises(check.Skip, match="torch"):
        check.TESTS["tensors"]()
    monkeypatch.setattr(check, "version_of", lambda name: None)
    monkeypatch.setitem(sys.modules, "comfy", None)
    assert dict(check.found())["hosts"] == "none"
    with pytest.raises(check.Skip):
        check.TESTS["diffusers"]()


def test_command_line(capsys):
    for arguments, status in ((["--version"], 0), ([], 2), (["nothing"], 2)):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == status
    assert f"parastep {parastep.__version__}" in capsys.readouterr().out
