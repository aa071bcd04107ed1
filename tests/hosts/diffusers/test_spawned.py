"""Whom workers belong to, what they import, and what they say when they die while they load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import tiny  # noqa: E402
from hosting import caught, host, own, parallel  # noqa: E402

pytestmark = pytest.mark.timeout(280)  # a worker imports torch and diffusers, which takes seconds

BEGINNING = """
import json, os, sys
import torch
torch.set_num_threads(1)
import tiny, parastep

case = tiny.CASES["sd"]
alone = tiny.run(case.build(), case.kwargs(steps=6))
options = {"tolerance": "rehearse", "mode": "processes", "max_stride": 1}
fast = parastep.parallelize(case.build(), ["cpu"] * 3, **options)

def call(who):
    equal = torch.equal(tiny.run(fast, case.kwargs(steps=6)), alone)
    told = [who, equal, fast.report.evaluations, [line.text for line in fast.report.failures]]
    print(json.dumps(told), flush=True)
"""


def run_script(body: str, folder: Path, way: str = "file") -> list[Any]:
    """What the script prints, as JSON a line; `folder` is the current one while it runs. It is a
    file, or read from stdin ("-").
    """
    path = os.pathsep.join(p for p in sys.path if p)
    script, text = folder / "script.py", BEGINNING + textwrap.dedent(body)
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script) if way == "file" else way],
        input=text,
        env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_forked_child_starts_workers_of_its_own(tmp_path: Path) -> None:
    """Those of its parent go on: the child neither ends them nor cuts their sockets."""
    body = """
        call("before")
        child = os.fork()
        if child == 0:
            call("child")
            fast.close()
            os._exit(0)
        call("meanwhile")
        assert os.waitpid(child, 0)[1] == 0
        call("after")
        fast.close()
    """
    told = run_script(body, tmp_path)
    assert sorted(who for who, *_ in told) == ["after", "before", "child", "meanwhile"]
    for who, equal, evaluations, failures in told:
        assert equal and failures == [], who
        assert evaluations == [6, 5, 4], who


@pytest.mark.parametrize("name", ["queue", "signal", "json"])
def test_modules_in_the_current_folder_are_no_part_of_a_worker(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("raise SystemExit('this is the user\\'s own file')\n")
    [[_, equal, evaluations, failures]] = run_script("call('once'); fast.close()", tmp_path)
    assert equal and evaluations == [6, 5, 4] and failures == []


@pytest.mark.parametrize("way", ["file", "-"])
def test_a_script_without_a_main_guard(way: str, tmp_path: Path) -> None:
    """Workers do not run it; a class that is defined in it is named, with what to do."""
    body = """
        call("once")
        fast.close()

        class Own(torch.nn.Identity):
            pass

        pipe = case.build()
        pipe.unet.conv_out = torch.nn.Sequential(pipe.unet.conv_out, Own())
        fast = parastep.parallelize(pipe, ["cpu"] * 3, **options)
        call("own class")
        print(json.dumps([fast.report.fallback]))
        fast.close()
    """
    once, own_class, [reason] = run_script(body, tmp_path, way)
    assert once == ["once", True, [6, 5, 4], []]
    assert own_class == ["own class", True, [6, 0, 0], []]
    assert "Own is defined in the script itself" in reason
    assert "move it to a module of its own, or use mode='threads'" in reason


class Deadly:
    """A part of a pipeline that ends the process which loads it."""

    def __deepcopy__(self, memo: Any) -> Deadly:
        return self

    def __reduce__(self) -> Any:
        code = "import os, sys; sys.stderr.write('a line\\nno cheese left\\n'); os._exit(3)"
        return exec, (code,)


def test_the_last_words_of_a_worker_are_part_of_the_reason() -> None:
    pipe = host("sd")
    pipe.extra = Deadly()
    try:
        with caught() as texts, parallel(pipe, 2, mode="processes") as together:
            assert torch.equal(tiny.run(together, tiny.CASES["sd"].kwargs()), own("sd").result)
        assert "exit status 3: no cheese left" in together.report.fallback
        assert any("no cheese left" in text for text in texts)
    finally:
        del pipe.extra
