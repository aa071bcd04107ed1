"""Teams whose devices are processes of a group: pairs under torchrun and MPI. Every process's call
returns the picture, whatever a helper does.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from launching import environment, run, told  # noqa: E402

from parastep import __version__  # noqa: E402
from parastep.diffusers.remote.bundles import Receiver, Sender  # noqa: E402
from parastep.diffusers.remote.groups import Group  # noqa: E402
from parastep.diffusers.remote.helping import Forward  # noqa: E402
from parastep.diffusers.remote.packing import pack  # noqa: E402
from parastep.processes.frames import Frame, Kind, read_frame, write_frame  # noqa: E402
from parastep.processes.streams import SocketStream  # noqa: E402
from parastep.threads import HostContext  # noqa: E402

pytestmark = pytest.mark.timeout(280)  # every process imports torch and diffusers

SCRIPT = str(Path(__file__).with_name("group_teams_script.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
STEPS = 6
CALLS, BATCH = "calls (bit for bit)", "batch (to rounding)"
PAIRS = [[f"cpu (process {k})", f"cpu (process {k + 1})"] for k in (0, 2)]


def check_pairs(line: Any, split: str) -> None:
    """Two pairs, both of which share what they can."""
    assert line["raised"] is None and line["failures"] == [] and line["fallback"] is None, line
    assert line["evaluations"] == [STEPS, STEPS - 1]
    assert [team["devices"] for team in line["teams"]] == PAIRS
    assert [team["split"] for team in line["teams"]] == [split] * 2, line
    assert all(team["shared"] >= STEPS - 3 and team["missed"] == 0 for team in line["teams"]), line


def check_lost(line: Any, process: int, *words: str) -> None:
    """The host's bits, and one who failed."""
    assert line["equal"] and line["evaluations"] == [STEPS, STEPS - 1], line
    (lost,) = line["failures"]
    assert (lost["rank"], lost["status"]) == (process // 2, "HELPER_LOST"), line
    assert f"its helper on cpu (process {process}) was lost: " in lost["text"]
    assert any(word in lost["text"] for word in words), line


def test_pairs_whose_calls_are_foretold(tmp_path: Path) -> None:
    """Wan, rehearsed, so that the host's bits are told from all others."""
    faults = ["raise:3:3", "raise:1:4", "other_weights"]
    scenes = ["call", "again", faults[0], "after", faults[1], "later", faults[2], "pause:3:2"]
    out = run([*TORCHRUN, "4", SCRIPT, str(tmp_path), "wan", "2", "rehearse", *scenes])
    found = told(out, 4, scenes)
    for scene in ("call", "again", "after", "later"):
        for line in found[scene]:
            check_pairs(line, CALLS)
            assert line["equal"], line
    for scene in faults[:2]:
        for line in found[scene]:
            check_lost(line, int(scene.split(":")[1]), "out of cheese")
    for line in found["other_weights"]:  # of process 1 alone
        assert line["equal"] and line["teams"][0]["split"] is None, line
        assert "its model has changed" in line["teams"][0]["unsplit"]
    for line in found["pause:3:2"]:  # late: given up, and it still returns what the leader returns
        check_lost(line, 3, "no output within 2 s")


@pytest.mark.parametrize(
    ("follower", "leader"), [(1, 4), pytest.param(4, 2, marks=pytest.mark.sweep)]
)
def test_killed_helpers(tmp_path: Path, follower: int, leader: int) -> None:
    """Of processes that no launcher looks after: first the follower's, then the leader's."""
    kills = [f"kill:3:{follower}", f"kill:1:{leader}"]
    scenes = ["call", kills[0], "three", kills[1], "two"]
    command = [sys.executable, SCRIPT, str(tmp_path), "wan", "2", "rehearse", *scenes]
    where = {"RENDEZVOUS": str(tmp_path / "rendezvous"), "SIZE": "4"}
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment(RANK=str(rank), **where)
        )
        for rank in range(4)
    ]
    try:
        outs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode == 0 for process in processes] == [True, False, True, False]
    found = told(outs[0] + outs[2], 2, scenes)
    for line in found["call"]:
        check_pairs(line, CALLS)
    for line in found[kills[0]] + found["three"]:
        check_lost(line, 3, "ended", "closed", "reset")
    for line in found[kills[1]] + found["two"]:
        assert line["equal"] and line["evaluations"] == [STEPS, STEPS - 1], line
        assert [lost["rank"] for lost in line["failures"]] == [0, 1], line


def test_a_batch_and_what_is_not_guided(tmp_path: Path) -> None:
    """Pairs where there is something to share, by "auto", else every process a rank."""
    scenes = ["call", "unguided", "again"]
    out = run([*TORCHRUN, "4", SCRIPT, str(tmp_path), "sd", "auto", "0.02", *scenes])
    found = told(out, 4, scenes)
    for line in found["call"] + found["again"]:
        check_pairs(line, BATCH)
        assert line["apart"] < 0.01
    for line in found["unguided"]:
        assert line["teams"] == [] and line["failures"] == [] and line["fallback"] is None
        assert len(line["evaluations"]) == 4 and line["evaluations"][3] > 0, line


@pytest.mark.parametrize(
    ("split", "words"),
    [("3", "4 processes are no whole number of teams of 3"), ("2,none", "do not agree on split")],
)
def test_a_split_that_cannot_be(tmp_path: Path, split: str, words: str) -> None:
    """All processes say so, and none waits."""
    out = run([*TORCHRUN, "4", SCRIPT, str(tmp_path), "wan", split, "exact", "call"])
    assert out.count(words) == 4, out


class Twice(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return 2 * x


class Pipe:
    def __init__(self) -> None:
        self.transformer = Twice()


def test_a_head_that_is_in_the_next_call_already() -> None:
    """Its words come on another way than the result of the call before, which may take longer."""
    ours, theirs = zip(*(socket.socketpair() for _ in range(2)))
    leader, head = map(SocketStream, ours)
    group = Group(1, 2, lambda peer, channel: SocketStream(theirs[channel]))
    every = [{"device": "cpu", "team": [0, 1]}] * 2
    hello = {"version": __version__, "every": every, "refusal": None}
    write_frame(leader, Frame(Kind.HELLO, 0, json.dumps(hello).encode()))
    group.open(torch.device("cpu"), 2)
    x = torch.arange(4.0)
    asked = Forward("transformer", False, HostContext(), False, (x,), {})
    write_frame(head, Frame(Kind.SERVE, 2, b"null"))
    write_frame(head, Frame(Kind.FORWARD, 1, Sender().pack(tuple(asked))))
    time.sleep(0.2)  # by now it has them
    write_frame(leader, Frame(Kind.RESULT, 1, pack((True, "first", None))))
    assert group.follow(Pipe())[0] == "first"
    write_frame(head, Frame(Kind.END, 2, b""))
    write_frame(leader, Frame(Kind.RESULT, 2, pack((True, "second", None))))
    assert group.follow(Pipe())[0] == "second"
    output = read_frame(head)
    assert output.kind == Kind.OUTPUT
    assert torch.equal(Receiver(torch.device("cpu")).unpack(output.body)[1], 2 * x)
    assert read_frame(head).kind == Kind.LEFT
    for stream in (leader, head):
        write_frame(stream, Frame(Kind.BYE, 0, b""))
    group.close()


def test_mpi(tmp_path: Path) -> None:
    """With mpi4py and a launcher that fits it; there may be none on this machine."""
    pytest.importorskip("mpi4py")
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{environment()['PATH']}")
    if mpirun is None:
        pytest.skip("mpi4py is here, mpirun is not")
    scenes: Sequence[str] = ["call", "raise:3:3", "raise:1:2", "again"]
    command = [mpirun, "-n", "4", sys.executable, SCRIPT, str(tmp_path)]
    found = told(run([*command, "wan", "2", "rehearse", *scenes]), 4, scenes)
    for line in found["call"] + found["again"]:
        check_pairs(line, CALLS)
    for scene in scenes[1:3]:
        for line in found[scene]:
            check_lost(line, int(scene.split(":")[1]), "out of cheese")
