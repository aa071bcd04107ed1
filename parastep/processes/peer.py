"""The other end of a stream of frames: what is sent goes out in a thread, what arrives comes in
another, so that nobody who sends waits for the other process, and its death is noticed at once.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from ..messages import describe
from .frames import Frame, Kind, Stream, head_of, read_frame, write_frame


class _Rest:
    """Of what is on its way already."""

    def __init__(self, data: Any) -> None:
        self.data = data


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
        self._sending = threading.Lock()
        self._behind = 0  # what did not go at once, and has to go first
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

    def send_now(self, kind: Kind, call: int, body: bytes) -> None:
        """In this thread, as far as the stream takes it without waiting, which is sooner: a socket
        only, and all that it is sent but the goodbye.
        """
        frame = Frame(kind, call, body)
        with self._sending:
            rest: Any = head_of(frame) + body if self._behind else None
            try:
                if rest is None and self.lost is None:
                    rest = self._stream.put_now(head_of(frame), body)  # type: ignore[attr-defined]
            except OSError as error:
                self._lose(describe(error))
            if rest:
                self._behind += 1
                self._out.put(_Rest(rest))

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
            if isinstance(item, _Rest):
                self._catch_up(item)
                continue
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

    def _catch_up(self, rest: _Rest) -> None:
        try:
            if self.lost is None:
                self._stream.put(rest.data)
        except Exception as error:
            self._lose(describe(error))
        with self._sending:
            self._behind -= 1

    def _receive(self) -> None:
        try:
            while (frame := read_frame(self._stream)).kind != Kind.BYE:
                self._handle(frame)
            self._lose("the other process has left")
        except (EOFError, ConnectionError):
            self._lose("the other process has ended")
        except Exception as error:
            self._lose(describe(error))
