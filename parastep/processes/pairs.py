"""Pairs: communicators of NCCL between the leader's process and a follower's, agreed on in frames.

The leader offers one, with the version of its NCCL and its device; the follower answers with the id
under which both meet, or why they cannot. Both ends then connect, each in a thread of its own. A
pair is kept for the calls to come; where there is none, the frames carry the latents too.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from .. import _core
from ..messages import describe

# Seconds to connect, at the first try and at the next one: NCCL looks for networks and loads its
# code when a process first uses it, which on a node of many ranks takes a while.
PATIENCE = (120.0, 30.0)


def offer(device: torch.device, patience: float) -> bytes:
    """What the other end has to know of this one. UnsupportedError: there is no NCCL here."""
    return json.dumps({**_about(device), "patience": patience}).encode()


def _about(device: torch.device) -> dict[str, Any]:
    return {"nccl": _core.nccl_version(), "device": identity(device)}


def identity(device: torch.device) -> str:
    """The same for two ranks of one device, in whatever process."""
    if device.type != "cuda":
        raise _core.UnsupportedError(f"this rank is on {device}")
    found = torch.cuda.get_device_properties(device)
    return str(getattr(found, "uuid", os.getpid()))  # NCCL refuses one device for two ranks itself


class Joining:
    """An end that is being connected, in a thread of its own: whoever reads the frames goes on, and
    hears it if the other end has failed.

    Args:
        connect: makes the pair, or raises why there is none; its argument is called meanwhile, and
            raises where nobody waits any more.
        done: called in that thread once `pair` or `why` is there; not where it was given up.
    """

    def __init__(
        self, connect: Callable[[Callable[[], None]], _core.Pair], done: Callable[[Joining], None]
    ) -> None:
        self.pair: _core.Pair | None = None
        self.why: str | None = None
        self.late = False  # the other end did not come, which it may another time
        self._connect, self._done = connect, done
        self._changed = threading.Condition()
        self._given_up = False
        threading.Thread(target=self._work, name="parastep-pair", daemon=True).start()

    def _work(self) -> None:
        pair, why = None, None
        try:
            pair = self._connect(self._check)
        except Exception as error:
            why = describe(error)
            self.late = isinstance(error, (_core.DeadlineError, _core.LostError))
        with self._changed:
            given_up = self._given_up
            if not given_up:
                self.pair, self.why = pair, why
            self._changed.notify_all()
        if not given_up:
            self._done(self)
        elif pair is not None:
            pair.close()

    def _check(self) -> None:
        if self._given_up:
            raise _core.LostError("the other end has failed")

    def wait(self, seconds: float) -> _core.Pair | None:
        """The pair, if it is there by then."""
        with self._changed:
            self._changed.wait_for(lambda: self.pair is not None or self.why is not None, seconds)
            return self.pair

    def give_up(self) -> None:
        """Nobody wants it any more; twice is fine."""
        with self._changed:
            self._given_up = True
            pair, self.pair = self.pair, None
        if pair is not None:
            pair.close()


def accept(
    offered: bytes | bytearray, device: torch.device, answer: Callable[[bytes], None]
) -> Joining | None:
    """The follower's end; the answer is the leader's to read with `meet`, and so is another one,
    where the end fails after that.
    """

    def refuse(why: str, late: bool = False) -> None:
        answer(json.dumps({"why": why, "late": late}).encode())

    try:
        theirs, own = json.loads(offered), _about(device)
        if own["nccl"] != theirs["nccl"]:
            versions = f"{_version(own['nccl'])} here and {_version(theirs['nccl'])} there"
            raise _core.UnsupportedError(f"the versions of NCCL differ, {versions}")
        if own["device"] == theirs["device"]:
            raise _core.UnsupportedError("it is on the leader's own device")
        name = _core.nccl_id()
    except Exception as error:
        refuse(describe(error))
        return None

    def connect(check: Callable[[], None]) -> _core.Pair:
        return _core.Pair(name, False, device.index, float(theirs["patience"]), check)

    def done(joining: Joining) -> None:
        if joining.why is not None:
            refuse(joining.why, joining.late)

    answer(json.dumps({"id": name.hex()}).encode())
    return Joining(connect, done)


def refusal(answered: bytes | bytearray) -> tuple[str, bool] | None:
    """Why the follower has no end, and whether it may have one another time; None: it has one."""
    told: dict[str, Any] = json.loads(answered)
    if "id" in told:
        return None
    return told.get("why", "no reason was given"), bool(told.get("late"))


def meet(
    answered: bytes | bytearray,
    device: torch.device,
    patience: float,
    done: Callable[[Joining], None],
) -> Joining:
    """The leader's end, where the answer is no refusal."""
    name = bytes.fromhex(json.loads(answered)["id"])
    return Joining(lambda check: _core.Pair(name, True, device.index, patience, check), done)


def _version(number: int) -> str:
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
