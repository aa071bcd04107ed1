"""What carries frames: a Unix socket, torch.distributed, or MPI; each is a `frames.Stream`.

torch.distributed and mpi4py wait as long as it takes, in threads of ours: no deadline is handed to
them, since gloo closes every connection of a group when one of them times out.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

_TAG = 7421  # and the ones after it: streams of two processes beside each other
_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_POLL = 0.0005  # seconds between two looks for a message of MPI, whose own waiting takes a core


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

    def put_now(self, *pieces: Any) -> memoryview:
        """As much as goes without waiting; returns the rest."""
        whole = sum(map(len, pieces))
        try:
            sent = self._socket.sendmsg(pieces, [], socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        return memoryview(b"".join(pieces) if sent < whole else b"")[sent:]

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


class TorchStream:
    """torch.distributed's send and receive with one rank of a group; `channel` is the same at both
    ends, another one for each stream.
    """

    def __init__(self, group: Any, peer: int, channel: int = 0) -> None:
        self._group, self._peer, self._tag = group, peer, _TAG + channel

    def put(self, data: Any, descriptor: int | None = None) -> None:
        message = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with _ending():
            self._group.send([message], self._peer, self._tag).wait()

    def get(self, count: int) -> bytearray:
        message = torch.empty(count, dtype=torch.uint8, device="cpu")
        with _ending():
            self._group.recv([message], self._peer, self._tag).wait()
        return bytearray(message.numpy())

    def close(self) -> None:
        pass  # the group's connections are the host's


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """gloo says in many words, and as a RuntimeError, that there is nobody at the other end."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in _ENDED):
            raise EOFError("the other process has ended") from error
        raise


class MpiStream:
    """mpi4py's send and receive with one rank of a communicator; `channel` as above."""

    def __init__(self, comm: Any, peer: int, channel: int = 0) -> None:
        self._comm, self._peer, self._tag = comm, peer, _TAG + channel
        self._closed = False

    def put(self, data: Any, descriptor: int | None = None) -> None:
        from mpi4py import MPI

        self._comm.Send([bytearray(data), MPI.BYTE], self._peer, self._tag)

    def get(self, count: int) -> bytearray:
        from mpi4py import MPI

        while not self._comm.Iprobe(self._peer, self._tag):
            if self._closed:
                raise EOFError("closed")
            time.sleep(_POLL)
        data = bytearray(count)
        self._comm.Recv([data, MPI.BYTE], self._peer, self._tag)
        return data

    def close(self) -> None:
        self._closed = True
