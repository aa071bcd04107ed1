"""Faults for followers in other processes, which import this module: a part of a model that fails.

`Faulty` computes what the part it wraps does until the leader's test leaves an order in a folder;
the first worker that makes its n-th call since then takes the order and carries it out, once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch


class Faulty(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module, folder: Path) -> None:
        super().__init__()
        self.inner, self.folder = inner, str(folder)
        self.seen, self.calls = "", 0  # the last order, and how often it was looked at

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        order = self._order()
        return output if order is None else carry_out(order, output)

    def _order(self) -> str | None:
        if not in_follower():
            return None
        path = Path(self.folder, "order")
        try:
            text = path.read_text()
            order = json.loads(text)
            if order["who"] not in (None, rank(), "helper" if is_helper() else "head"):
                return None
            self.calls = self.calls + 1 if text == self.seen else 1
            self.seen = text
            if order["call"] > self.calls:
                return None
            path.rename(path.with_name("taken"))  # one of the workers gets it
        except (FileNotFoundError, ValueError):
            return None
        return order["fault"]


def rank() -> int | None:
    """Of a group, this process's number."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), None)


def in_follower() -> bool:
    """Whether this is a worker, or a process of a group other than its leader."""
    if rank():
        return True
    return sys.argv[0] == "-c" and any(name.endswith(".worker") for name in sys.argv[2:3])


def is_helper() -> bool:
    """Whether this forward is made for another process."""
    return any(line.filename.endswith("helping.py") for line in traceback.extract_stack())


def order(folder: Path, fault: str, call: int, who: str | int | None = None) -> None:
    """`who`: of workers "head" or "helper" alone, of a group this process alone."""
    Path(folder, "taken").unlink(missing_ok=True)
    draft = Path(folder, "draft")
    draft.write_text(json.dumps({"fault": fault, "call": call, "who": who, "at": time.monotonic()}))
    draft.rename(Path(folder, "order"))


def taken(folder: Path) -> bool:
    return Path(folder, "taken").exists()


def carry_out(fault: str, output: torch.Tensor) -> torch.Tensor:
    if fault == "raise":
        raise RuntimeError("out of cheese\nsecond line")
    if fault == "exit":
        sys.exit("left")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "hang":
        time.sleep(600)
    if fault == "pause":
        time.sleep(6)
    if fault == "nan":
        return output * torch.nan
    if fault == "infinity":
        return output * torch.inf
    if fault == "memory":
        return torch.empty(1 << 60)
    if fault == "dtype":
        return output.double()
    if fault == "rubbish":
        os.write(int(sys.argv[1]), b"x" * 4096)  # onto the pipe, past everybody
        time.sleep(600)
    if fault == "babble":  # onto every other socket
        for entry in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):
                if os.readlink(entry).startswith("socket:") and entry.name != sys.argv[1]:
                    os.write(int(entry.name), b"x" * 4096)
        time.sleep(600)
    if fault == "silence":  # the pipe ends, the process does not
        socket.socket(fileno=int(sys.argv[1])).shutdown(socket.SHUT_RDWR)
        time.sleep(600)
    return output
