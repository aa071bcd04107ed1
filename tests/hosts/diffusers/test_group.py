"""The same script on every rank of a group: torchrun, MPI, and two networks joined by a wire."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from launching import environment, free_port, in_networks, need_networks, run, told  # noqa: E402

pytestmark = pytest.mark.timeout(280)  # every rank imports torch and diffusers

SCRIPT = str(Path(__file__).with_name("group_script.py"))


def check_good(lines: list[Any]) -> None:
    """The host's bits on every rank, and the leader's report."""
    for line in lines:
        assert line["equal"] and line["raised"] is None, line
        assert line["failures"] == [] and line["fallback"] is None
        assert line["evaluations"] == [6 - rank for rank in range(len(lines))]


def test_torchrun(tmp_path: Path) -> None:
    scenes = ["first", "others", "error", "split", "raise", "after", "pause", "again"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    out = run([*torchrun, "--standalone", SCRIPT, str(tmp_path), *scenes])
    found = told(out, 3, scenes)
    for scene in ("first", "others", "after"):
        check_good(found[scene])
    for line in found["error"]:
        assert "divisible by 8" in line["raised"]
    for line in found["split"]:
        assert "enable_parallelism" in line["raised"]
    for line in found["raise"]:
        assert line["equal"] and [f["status"] for f in line["failures"]] == ["FAILED"]
        assert "out of cheese" in line["failures"][0]["text"]
    for line in found["pause"]:  # late: given up, and it still returns what the leader returns
        assert line["equal"] and "DEADLINE" in {f["status"] for f in line["failures"]}
    for line in found["again"]:
        assert line["equal"] and line["fallback"] is None


def test_mpi(tmp_path: Path) -> None:
    """With mpi4py and a launcher that fits it; there may be none on this machine."""
    pytest.importorskip("mpi4py")
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpirun is None:
        pytest.skip("mpi4py is here, mpirun is not")
    scenes = ["first", "raise", "after"]
    out = run([mpirun, "-n", "3", sys.executable, SCRIPT, str(tmp_path), *scenes])
    found = told(out, 3, scenes)
    check_good(found["first"])
    check_good(found["after"])
    assert all(line["equal"] and len(line["failures"]) == 1 for line in found["raise"])


def test_a_group_of_the_script_s_own(tmp_path: Path) -> None:
    """Joined through a file that both see, as under Slurm without a launcher of torch's."""
    command, pipe = [sys.executable, SCRIPT, str(tmp_path), "first"], subprocess.PIPE
    where = {"RENDEZVOUS": str(tmp_path / "rendezvous")}
    ranks = [
        subprocess.Popen(command, stdout=pipe, text=True, env=environment(RANK=rank, **where))
        for rank in ("0", "1")
    ]
    try:
        out = "".join(process.communicate(timeout=120)[0] for process in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    check_good(told(out, 2, ["first"])["first"])


TWO_NODES = """
export MASTER_ADDR=10.77.0.1 MASTER_PORT=29511 WORLD_SIZE=2
GLOO_SOCKET_IFNAME=far RANK=1 there "$@" &
follower=$!
GLOO_SOCKET_IFNAME=near RANK=0 "$@"
wait $follower
kill $other
"""


def test_two_nodes(tmp_path: Path) -> None:
    need_networks()
    scenes = ["first", "raise", "after"]
    command = [sys.executable, SCRIPT, str(tmp_path), *scenes]
    found = told(run([*in_networks(TWO_NODES), *command]), 2, scenes)
    check_good(found["first"])
    check_good(found["after"])
    assert all(line["equal"] and len(line["failures"]) == 1 for line in found["raise"])


# Rank 0 of a group whose other rank is late: with a process that does nothing yet, or with none.
WAITS = """
import os, signal, sys, threading, torch
from parastep.diffusers.remote import meeting

meeting._LATE = 0.2
torch.distributed.init_process_group("gloo") if sys.argv[1] == "idle" else None
if os.environ["RANK"] == "1":
    sys.stdin.read()
    sys.exit()
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    meeting.group_of(None, torch.device("cpu"))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("other", ["idle", "missing"])
def test_ctrl_c_while_a_rank_is_late(other: str) -> None:
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command, pipe = [sys.executable, "-c", WAITS, other], subprocess.PIPE
    idle = None
    if other == "idle":
        idle = subprocess.Popen(command, stdin=pipe, env=environment(RANK="1", **where))
    try:
        waits = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment(RANK="0", **where)
        )
    finally:
        if idle is not None:
            idle.communicate(b"", timeout=60)
    assert waits.returncode == 0 and waits.stdout == "interrupted\n", waits.stderr
    assert "each rank of the group has to call parallelize" in waits.stderr


def test_a_group_of_one_is_none() -> None:
    """torchrun with one process: nothing to join."""
    from parastep.diffusers.remote.meeting import group_of

    before = dict(os.environ)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ.update(RANK="0", WORLD_SIZE="1", **where)
    try:
        assert group_of(None, torch.device("cpu")) is None
        assert not torch.distributed.is_initialized()
    finally:
        os.environ.clear()
        os.environ.update(before)
