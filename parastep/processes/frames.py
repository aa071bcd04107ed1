"""Frames between two processes, over a socket, torch.distributed or MPI.

A frame is a kind, the number of the call that it belongs to, and a body. `Peer` is the other end of
such a connection: what is sent goes out in a thread of its own, what arrives is handed on in
another, so that nobody who sends waits for the other process. Used by `far`, `workers`, `groups`.
"""

from __future__ import annotations

import array
import contextlib
import enum
import os
import queue
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from .. import _core
from ..api import describe

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
    LEFT = 12  # up: so it is here; how many steps were evaluated, and whether the pair is fine
    RESULT = 13  # down: what the leader's call returned or raised
    BYE = 14  # both: nothing more will come
    PAIR = 15  # down: NCCL could carry the latents; what the leader has of it
    PAIRED = 16  # up: the id to meet under, or why not


class Frame(NamedTuple):
    kind: Kind
    call: int
    body: bytes | bytearray


class Stream(Protocol):
    """Bytes in order; both block, and raise OSError or EOFError where the other end is gone."""

    def put(self, data: Any, descriptor: int | None = None) -> None: ...
    def get(self, count: int) -> bytearray: ...
    def close(self) -> None: ...


def write_frame(stream: Stream, frame: Frame, descriptor: int | None = None) -> None:
    head = _HEAD.pack(_MAGIC, frame.kind, 0, frame.call, len(frame.body))
    stream.put(head, descriptor)
    body = memoryview(frame.body)
    for begin in range(0, len(body), _PIECE):
        stream.put(body[begin : begin + _PIECE])


def read_frame(stream: Stream) -> Frame:
    """The next frame. ProtocolError: what came is none, and nothing after it can be read."""
    magic, kind, reserved, call, count = _HEAD.unpack(stream.get(_HEAD.size))
    if magic != _MAGIC or reserved != 0 or count > _LONGEST or kind not in _KINDS:
        raise _core.ProtocolError("what arrived is not a frame of parastep, or of another version")
    body = bytearray()
    while len(body) < count:
        body += stream.get(min(count - len(body), _PIECE))
    return Frame(Kind(kind), call, body)


_KINDS = frozenset(Kind)


class SocketStream:
    """A Unix socket, to a process of the same machine; file descriptors can come along."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self.descriptors: deque[int] = deque()  # that came and were not taken yet; the taker closes

    def put(self, data: Any, descriptor: int | None = None) -> None:
        if descriptor is None:
            self._socket.sendall(data)
        else:
            rights = array.array("i", [descriptor])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            sent = self._socket.sendmsg([data], ancillary)
            self._socket.sendall(memoryview(data)[sent:])

    def get(self, count: int) -> bytearray:
        data = bytearray(count)
        view, got = memoryview(data), 0
        while got < count:
            arrived = self._receive(view[got:])
            if arrived == 0:
                raise EOFError("the other process has ended")
            got += arrived
        return data

    def _receive(self, into: memoryview) -> int:
        space = socket.CMSG_SPACE(array.array("i").itemsize)
        count, ancillary, _, _ = self._socket.recvmsg_into([into], space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
                self.descriptors.extend(numbers)
        return count

    def close(self) -> None:
        """Both threads of a peer wake up; a second time does nothing."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        while self.descriptors:
            os.close(self.descriptors.popleft())


class Peer:
    """The other end of a stream.

    Args:
        stream: carries the frames, in both directions.
        name: of the threads.
        handle: called with every frame that arrives, in the receiving thread. What it raises ends
            the connection.
        gone: called once, in one of the threads, when nothing more can come: with the reason.
    """

    def __init__(
        self,
        stream: Stream,
        name: str,
        handle: Callable[[Frame], None],
        gone: Callable[[str], None],
    ) -> None:
        self._stream, self._handle, self._gone = stream, handle, gone
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._call = 0  # that messages of the run belong to
        self.lost: str | None = None  # why nothing more can be sent
        self._threads = [
            threading.Thread(target=body, name=f"{name}-{what}", daemon=True)
            for body, what in ((self._receive, "in"), (self._send, "out"))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def carry(self) -> Callable[[bytes], None]:
        """Takes a message of the run; a function of C, so that no signal's handler runs within."""
        return self._out.put

    def send(self, kind: Kind, call: int, body: bytes = b"", descriptor: int | None = None) -> None:
        """Never waits. A descriptor is closed once it is on its way."""
        self._out.put((Frame(kind, call, body), descriptor))

    def close(self, patience: float = 1.0) -> None:
        """Says goodbye, and waits until the other end has said it too or is gone."""
        self._out.put(None)
        for thread in reversed(self._threads):
            if thread is not threading.current_thread():
                thread.join(patience)
        self._stream.close()

    def _lose(self, why: str) -> None:
        with self._lock:
            first, self.lost = self.lost is None, self.lost or why
        if first:
            self._gone(why)

    def _send(self) -> None:
        while (item := self._out.get()) is not None:
            frame, descriptor = (Frame(Kind.RUN, self._call, item), None)
            if isinstance(item, tuple):
                frame, descriptor = item
                self._call = frame.call
            try:
                if self.lost is None:
                    write_frame(self._stream, frame, descriptor)
            except Exception as error:  # a host's own errors are of any kind
                self._lose(describe(error))
            finally:
                if descriptor is not None:
                    os.close(descriptor)
        with contextlib.suppress(Exception):
            write_frame(self._stream, Frame(Kind.BYE, 0, b""))

    def _receive(self) -> None:
        try:
            while (frame := read_frame(self._stream)).kind != Kind.BYE:
                self._handle(frame)
            self._lose("the other process has left")
        except (EOFError, ConnectionError):
            self._lose("the other process has ended")
        except Exception as error:
            self._lose(describe(error))
