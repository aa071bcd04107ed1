"""Pairs: communicators of NCCL between the leader's process and a follower's, agreed on in frames.

The leader offers one, with the version of its NCCL and its device; the follower answers with the id
under which both meet, or why they cannot. Both ends then connect in the threads that receive their
frames. A pair is kept for the calls to come; where there is none, the frames carry the latents too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch

from .. import _core
from ..messages import describe

PATIENCE = 30.0  # seconds to connect: NCCL looks for networks when a process first uses it


def offer(device: torch.device) -> bytes:
    """What the other end has to know of this one. UnsupportedError: there is no NCCL here."""
    return json.dumps({"nccl": _core.nccl_version(), "device": identity(device)}).encode()


def identity(device: torch.device) -> str:
    """The same for two ranks of one device, in whatever process."""
    if device.type != "cuda":
        raise _core.UnsupportedError(f"this rank is on {device}")
    found = torch.cuda.get_device_properties(device)
    return str(getattr(found, "uuid", os.getpid()))  # NCCL refuses one device for two ranks itself


def accept(
    offered: bytes | bytearray, device: torch.device, answer: Callable[[bytes], None]
) -> _core.Pair | None:
    """The follower's end; the answer is the leader's to read with `meet`."""
    try:
        theirs, own = json.loads(offered), json.loads(offer(device))
        if own["nccl"] != theirs["nccl"]:
            versions = f"{_version(own['nccl'])} here and {_version(theirs['nccl'])} there"
            raise _core.UnsupportedError(f"the versions of NCCL differ, {versions}")
        if own["device"] == theirs["device"]:
            raise _core.UnsupportedError("it is on the leader's own device")
        name = _core.nccl_id()
    except Exception as error:
        answer(json.dumps({"why": describe(error)}).encode())
        return None
    answer(json.dumps({"id": name.hex()}).encode())
    try:
        return _core.Pair(name, False, device.index, PATIENCE)
    except _core.Error:  # the leader has not come, or knows as well
        return None


def meet(answered: bytes | bytearray, device: torch.device) -> _core.Pair:
    """The leader's end. UnsupportedError, LostError, DeadlineError: why there is none."""
    told: dict[str, Any] = json.loads(answered)
    if "id" not in told:
        raise _core.UnsupportedError(told.get("why", "no reason was given"))
    return _core.Pair(bytes.fromhex(told["id"]), True, device.index, PATIENCE)


def _version(number: int) -> str:
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
