"""Denoisers that diffusers splits along the sequence over groups of two processes, steps across the
groups: Ulysses on CPUs over gloo. What is compared is the pipeline as its user has split it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import tiny  # noqa: E402
from launching import environment, free_port, in_networks, need_networks, run, told  # noqa: E402

import parastep  # noqa: E402

pytestmark = pytest.mark.timeout(280)  # every process imports torch and diffusers
more = functools.partial(pytest.param, marks=pytest.mark.sweep)  # by `make test-groups` alone

SCRIPT = str(Path(__file__).with_name("group_context_script.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
STEPS = 20
GROUPS = [[f"cpu (process {k})", f"cpu (process {k + 1})"] for k in (0, 2)]


def check_shared(line: Any, calls: int) -> None:
    """Both groups entered all forwards together."""
    assert line["raised"] is None and line["failures"] == [] and line["fallback"] is None, line
    assert [team["devices"] for team in line["teams"]] == GROUPS
    assert [team["split"] for team in line["teams"]] == ["context 2"] * 2
    shared = [team["shared"] for team in line["teams"]]
    assert shared == [calls * evaluated for evaluated in line["evaluations"]], line
    assert all(team["whole"] == 0 for team in line["teams"])


def check_rehearsed(line: Any, calls: int) -> None:
    check_shared(line, calls)
    assert line["equal"] and line["evaluations"] == [STEPS, STEPS - 1], line


def of_whole_ranks(name: str, count: int, stride: int | None) -> list[int]:
    """Evaluations of the same pipeline on as many ranks that are not split."""
    case = tiny.CASES[name]
    together = parastep.parallelize(
        case.build(), ["cpu"] * count, tolerance=0.02, max_stride=stride, mode="threads"
    )
    with together:
        tiny.run(together, case.kwargs(steps=STEPS))
    return together.report.evaluations


@pytest.mark.sweep
def test_two_groups_in_a_second_loop(tmp_path: Path) -> None:
    out = run([*TORCHRUN, "4", SCRIPT, str(tmp_path), "flux twice", "2", "rehearse"])
    for line in told(out, 4, ["rehearse"])["rehearse"]:
        check_shared(line, 1)
        assert line["equal"] and line["evaluations"] == [2 * STEPS, 2 * (STEPS - 1)], line


@pytest.mark.parametrize(
    ("name", "calls"), [("flux", 1), more("wan", 2), ("wan22", 2), more("qwenimage", 2)]
)
def test_two_groups_of_two(tmp_path: Path, name: str, calls: int) -> None:
    scenes = ["0", "rehearse", "0.02", "strided"]
    out = run([*TORCHRUN, "4", SCRIPT, str(tmp_path), name, "2", *scenes])
    found = told(out, 4, scenes)
    for line in found["0"]:
        assert line["equal"] and line["evaluations"] == [STEPS, 0] and line["fallback"] is None
        assert line["teams"][0]["split"] == "context 2" and line["failures"] == []
        assert line["teams"][0]["shared"] == calls * STEPS
    for line in found["rehearse"]:
        check_rehearsed(line, calls)
    for scene, stride in (("0.02", 1), ("strided", None)):
        evaluations = of_whole_ranks(name, 2, stride)
        for line in found[scene]:
            check_shared(line, calls)
            assert line["evaluations"] == evaluations and line["apart"] < 0.01, line


def test_one_group_is_one_rank(tmp_path: Path) -> None:
    scenes = ["0", "strided"]
    found = told(run([*TORCHRUN, "2", SCRIPT, str(tmp_path), "flux", "2", *scenes]), 2, scenes)
    assert all(line["equal"] and line["evaluations"] == [STEPS] for line in found["0"])
    for line in found["strided"]:
        assert line["evaluations"] == of_whole_ranks("flux", 1, None), line
        assert line["apart"] < 0.01
        assert line["teams"][0]["split"] == "context 2" and line["fallback"] is None


def by_themselves(scenes: Sequence[str], folder: Path) -> list[str]:
    """What each of four processes prints that no launcher looks after."""
    command = [sys.executable, SCRIPT, str(folder), "flux", "2", *scenes]
    where = {"RENDEZVOUS": str(folder / "rendezvous"), "SIZE": "4"}
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment(RANK=str(rank), **where)
        )
        for rank in range(4)
    ]
    try:
        return [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("fault", "follower", "leader"),
    [
        ("kill", 1, 5),
        more("kill", 6, 1),
        more("raise", 1, 5),
        ("raise", 6, 1),
        ("hang", 1, 5),
        more("hang", 6, 1),
    ],
)
def test_lost_members(tmp_path: Path, fault: str, follower: int, leader: int) -> None:
    """The follower's costs its group, the leader's ends the call with an error that says so."""
    scenes = ["rehearse", f"{fault}:3:{follower}", "0", f"{fault}:1:{leader}", "rehearse"]
    outs = by_themselves(scenes, tmp_path)
    others = [outs[0], outs[2]] if fault == "kill" else outs
    words = {"kill": "the other process has ended", "raise": "out of cheese"}
    text = words.get(fault, "no output within 4 s")
    lines = told("".join(others), len(others), scenes[1:4])
    for line in lines[scenes[1]]:
        assert line["equal"] and line["raised"] is None, line
        (lost,) = line["failures"]
        assert lost["rank"] == 1 and line["seconds"] < 60, line
        assert text in lost["text"] or lost["status"] == "DEADLINE", line
    for line in lines["0"]:
        assert line["equal"] and line["failures"] == [], line
    for line in lines[scenes[3]]:
        assert line["seconds"] < 60, line
        assert "its context group cannot go on: " in line["raised"], line
        assert "cpu (process 1)" in line["raised"] and text in line["raised"], line


@pytest.mark.parametrize(
    ("scene", "words"),
    [
        ("cache", "has other hooks of diffusers"),
        ("teams", "is split over processes already"),
        ("late", "call parallelize after that"),
        ("callback", "of which the other processes of its context group see nothing"),
    ],
)
def test_what_is_refused(tmp_path: Path, scene: str, words: str) -> None:
    """In every process, and none waits for another."""
    out = run([*TORCHRUN, "2", SCRIPT, str(tmp_path), "flux", "2", scene])
    assert out.count(words) == 2, out


def test_what_all_processes_raise_is_the_hosts_own(tmp_path: Path) -> None:
    """They are in step, so that the next call is fine."""
    out = run([*TORCHRUN, "2", SCRIPT, str(tmp_path), "flux", "2", "odd"])
    assert out.count("AssertionError: Tensor size along dimension to be sharded") == 2, out
    assert out.count("after it: context 2") == 2, out


# Two processes in each network: what is split stays within one, steps go over the wire.
TWO_OF_TWO = """
export MASTER_ADDR=10.77.0.1 MASTER_PORT={port} WORLD_SIZE=4
GLOO_SOCKET_IFNAME=far RANK=2 there "$@" & two=$!
GLOO_SOCKET_IFNAME=far RANK=3 there "$@" & three=$!
GLOO_SOCKET_IFNAME=near RANK=1 "$@" & one=$!
GLOO_SOCKET_IFNAME=near RANK=0 "$@"
wait $one
wait $two
wait $three
kill $other
"""


def test_groups_within_machines_and_steps_across(tmp_path: Path) -> None:
    need_networks()
    script = TWO_OF_TWO.format(port=free_port())
    command = [sys.executable, SCRIPT, str(tmp_path), "flux", "2", "rehearse"]
    for line in told(run([*in_networks(script), *command]), 4, ["rehearse"])["rehearse"]:
        check_rehearsed(line, 1)


def test_a_mesh_needs_processes() -> None:
    with pytest.raises(parastep.InvalidError, match="ring divide n"):
        parastep.node_mesh(4, ring=3)
    with pytest.raises(parastep.InvalidError, match="whole"):
        parastep.node_mesh(0)
    code = "import parastep\ntry: parastep.node_mesh(2)\nexcept parastep.StateError as e: print(e)"
    command = [sys.executable, "-c", code]
    assert "start the script with torchrun" in run(command)
