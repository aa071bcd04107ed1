"""Scripts that run in several processes: launchers, what they print, and networks for them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(p for p in sys.path if p)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def run(command: Sequence[str]) -> str:
    """What the command prints; on failure and at the limit it is ended with all its children."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=240)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    assert process.returncode == 0, errors
    return out


def told(out: str, ranks: int, scenes: Sequence[str]) -> dict[str, list[Any]]:
    """{scene: [what rank 0 said, ...]}"""
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    lines.sort(key=lambda line: line["rank"])
    found = {scene: [line for line in lines if line["scene"] == scene] for scene in scenes}
    assert all(len(of_scene) == ranks for of_scene in found.values()), out
    return found


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# Two namespaces with a wire between them, in a user namespace, so that no privilege is needed.
# Nothing but the wire joins them: loopback of one is not that of the other.
NETWORKS = """
set -e
ip link set lo up
unshare --net sleep 250 &
other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep .05; done
ip link add near type veth peer name far netns $other
ip address add 10.77.0.1/24 dev near
ip link set near up
there() { nsenter --target $other --net "$@"; }
there ip link set lo up
there ip address add 10.77.0.2/24 dev far
there ip link set far up
"""


def in_networks(script: str) -> list[str]:
    """A script of two nodes, `there` what runs on the other one; more arguments are its own."""
    return ["unshare", "--user", "--map-root-user", "--net", "bash", "-c", NETWORKS + script, "-"]


def need_networks() -> None:
    """Skips the test, with the reason, where there can be none."""
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip", "bash")):
        pytest.skip("needs unshare, nsenter (util-linux) and ip (iproute2)")
    tried = subprocess.run(in_networks("kill $other"), capture_output=True, text=True, timeout=60)
    if tried.returncode != 0:
        words = tried.stderr.strip().splitlines() or ["no reason given"]
        pytest.skip(f"this machine allows no network namespaces: {words[-1]}")
