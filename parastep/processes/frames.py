"""Frames between two processes, over a socket, torch.distributed or MPI.

A frame is a kind, the number of the call that it belongs to, and a body; `streams` has what carries
it, `peer` who is at the other end.
"""

from __future__ import annotations

import enum
import struct
from typing import Any, NamedTuple, Protocol

from .. import _core

_HEAD = struct.Struct("<4sHHQQ")
_MAGIC = b"PSF1"
_PIECE = 1 << 26  # bytes of a body that are moved at a time: what is received grows as it arrives
_LONGEST = 1 << 40


class Kind(enum.IntEnum):
    """What a frame says; up: from a follower to the leader, down: the other way."""

    HELLO = 1  # both, first of all: who is there
    MODEL = 2  # down: the pipeline, in a file whose descriptor comes along
    LOADED = 3  # up: it could be loaded, or why not
    CALL = 4  # down: a call of the pipeline begins; its arguments
    ENCODED = 5  # down: an encoder's output
    ARRIVED = 6  # up: the loop is reached
    BEGUN = 7  # down: what the leader's first step returned; no more encoder outputs
    OPEN = 8  # down: the run exists
    RUN = 9  # both: a message of the run, the core's business
    FAILED = 10  # up: this rank cannot go on
    END = 11  # down: the call is over; why the pair that it used is, if it is
    LEFT = (
        12  # up: so it is here; the steps evaluated, whether the pair is fine, and its team's work
    )
    RESULT = 13  # down: what the leader's call returned or raised
    BYE = 14  # both: nothing more will come
    PAIR = 15  # down: NCCL could carry the latents; what the leader has of it
    PAIRED = 16  # up: the id to meet under, or why not
    SERVE = 17  # who is at the other end of the socket that comes along has forwards for it; in a
    # group the one who has them says it itself
    HELPER = 18  # down: and here: who is there serves this rank with forwards in this call
    FORWARD = 19  # to a helper, from the one it serves: a denoiser's inputs
    OUTPUT = 20  # from it: what the denoiser gave
    NEXT = 21  # down: the run is over, and another loop of the call begins


class Frame(NamedTuple):
    kind: Kind
    call: int
    body: bytes | bytearray

    @property
    def words(self) -> str:
        """What it says, for messages: C ends a text at a zero."""
        return bytes(self.body).decode(errors="replace").replace("\0", "?")


class Stream(Protocol):
    """Bytes in order; both block, and raise OSError or EOFError where the other end is gone."""

    def put(self, data: Any, descriptor: int | None = None) -> None: ...
    def get(self, count: int) -> bytearray: ...
    def close(self) -> None: ...


def head_of(frame: Frame) -> bytes:
    """What comes before its body."""
    return _HEAD.pack(_MAGIC, frame.kind, 0, frame.call, len(frame.body))


def write_frame(stream: Stream, frame: Frame, descriptor: int | None = None) -> None:
    stream.put(head_of(frame), descriptor)
    body = memoryview(frame.body)
    for begin in range(0, len(body), _PIECE):
        stream.put(body[begin : begin + _PIECE])


def read_frame(stream: Stream) -> Frame:
    """The next frame. ProtocolError: what came is none, and nothing after it can be read."""
    magic, kind, reserved, call, count = _HEAD.unpack(stream.get(_HEAD.size))
    if magic != _MAGIC or reserved != 0 or count > _LONGEST or kind not in _KINDS:
        raise _core.ProtocolError("what arrived is not a frame of parastep, or of another version")
    body = stream.get(min(count, _PIECE)) if count else bytearray()
    while len(body) < count:
        body += stream.get(min(count - len(body), _PIECE))
    return Frame(Kind(kind), call, body)


_KINDS = frozenset(Kind)
