"""Helpers that are processes: both ends of the line between a helper and the head it serves.

A head is the leader's process or a follower's. The line is of one call of the pipeline: forwards go
down it, outputs come up, and what went over before stays there. To a worker it is a socket, to a
process of a group a session of theirs (`members`).
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import torch

from ... import _core
from ...messages import Told, describe
from ...processes.frames import Frame, Kind, read_frame, write_frame
from ...processes.peer import Peer
from ...processes.streams import SocketStream
from ...threads import HostContext
from ..forwards import Inputs, tensors_in
from ..parts import denoisers_of
from ..teams.helpers import CannotBeSent, Served, evaluated
from .bundles import Receiver, Sender

_SOON = 0.05  # seconds for the end of a helper that is lost


class Forward(NamedTuple):
    """A call of a denoiser, as it goes over; `context`: the head's modes, in its first one;
    `quiet`: the head needs no more of its output than that it is there.
    """

    name: str
    watched: bool
    context: HostContext | None
    quiet: bool
    args: Any
    kwargs: Any


class Line(Protocol):
    """To a helper, as a `Peer` is one: what is sent never waits."""

    def send_now(self, kind: Kind, call: int, body: bytes) -> None: ...
    def close(self, patience: float = 1.0) -> None: ...


# Opens a line, given who handles the frames that come and who is told, once, why none can any more.
Connect = Callable[[Callable[[Frame], None], Callable[[str], None]], Line]


def by_socket(descriptor: int, place: int) -> Connect:
    """Over the socket of this descriptor, whose other end is in a worker's hands."""

    def connect(handle: Callable[[Frame], None], lose: Callable[[str], None]) -> Peer:
        stream = SocketStream(socket.socket(fileno=descriptor))
        return Peer(stream, f"parastep-{place}-helper", handle, lose)

    return connect


class RemoteHelper:
    """The head's end: a `helpers.Helper`.

    Args:
        connect: opens the line to it.
        device: the helper's.
        home: the head's.
        place: which of the pipeline's devices it is on.
        ending: how its process has ended, where this one knows.
        left: waits so many seconds until the helper has left the call, where this process is who
            is told; whether it has.
        where: what reports call it.
        quiet: its outputs are not asked for.
    """

    def __init__(
        self,
        connect: Connect,
        device: torch.device,
        home: torch.device,
        place: int,
        ending: Callable[[], str] | None = None,
        left: Callable[[float], bool] | None = None,
        where: str | None = None,
        quiet: bool = False,
    ) -> None:
        self.device, self.place, self.where = device, place, where or str(device)
        self.lost: str | None = None
        self._ending, self._left, self._quiet = ending, left, quiet
        self._lock = threading.RLock()  # sending may find out that the helper is gone
        self._answers: dict[int, Future[Served]] = {}
        self._count = 0
        self._gone: str | None = None
        self._begun = self._closing = False
        self._sender, self._receiver = Sender(), Receiver(home)
        self._line = connect(self._handle, self._lose)

    def start(self, name: str, inputs: Inputs, watched: bool = False) -> Future[Served]:
        answer: Future[Served] = Future()
        with self._lock:
            try:
                if self._gone is not None:
                    raise _core.LostError(self._gone)
                context = None if self._begun else HostContext()
                told = Forward(name, watched, context, self._quiet, inputs.args, inputs.kwargs)
                body = self._sender.pack(tuple(told))
            except _core.Error as error:
                answer.set_exception(error)
                return answer
            except Exception as error:  # an argument that pickle refuses, or its own code
                words = f"its arguments cannot be sent to another process: {describe(error)}"
                answer.set_exception(CannotBeSent(words))
                return answer
            self._begun = True
            self._count += 1
            self._answers[self._count] = answer
            self._line.send_now(Kind.FORWARD, self._count, body)
        return answer

    @property
    def gone(self) -> str | None:
        """Why nothing can be sent there any more."""
        return self._gone

    def close(self, patience: float) -> bool:
        self._closing = True
        self._line.close(_SOON if self.lost else min(patience, 1.0))
        left = self._left is None or self._left(_SOON if self.lost else patience)
        return left and self.lost is None

    def _handle(self, frame: Frame) -> None:
        with self._lock:
            answer = self._answers.pop(frame.call, None)
        if frame.kind != Kind.OUTPUT or answer is None:
            raise _core.ProtocolError("it sent what it was not asked for")
        try:
            why, output, flaw, kept = self._receiver.unpack(frame.body)
        except Exception as error:
            words = f"its output cannot be read: {describe(error)}"
            answer.set_exception(_core.ProtocolError(words))
            return
        if why is not None:
            answer.set_exception(Told(why))
            return
        if kept:
            with self._lock:
                self._sender.learn(tensors_in(output), frame.call)
        answer.set_result(Served(output, flaw, output if kept else None))

    def _lose(self, why: str) -> None:
        if self._ending is not None and not self._closing:  # it takes a moment to tell
            why = f"{why} ({self._ending()})"
        with self._lock:
            self._gone, left = why, list(self._answers.values())
            self._answers.clear()
        for answer in left:
            answer.set_exception(_core.LostError(why))


def serve(stream: SocketStream, replica: Any, device: torch.device) -> None:
    """The helper's end of a socket: evaluates for whoever is at the other one, until that says
    goodbye or is gone.
    """
    try:
        for answer in answers(_forwards(stream), denoisers_of(replica), device):
            write_frame(stream, answer)
        write_frame(stream, Frame(Kind.BYE, 0, b""))
    except (OSError, EOFError, _core.ProtocolError):  # the head is gone: there is nobody to tell
        pass
    finally:
        replica.as_made.restore()


def _forwards(stream: SocketStream) -> Iterator[Frame]:
    while (frame := read_frame(stream)).kind == Kind.FORWARD:
        yield frame


def answers(
    forwards: Iterator[Frame], modules: Mapping[str, Any], device: torch.device
) -> Iterator[Frame]:
    """The helper's end: what the denoisers give for each forward of one call, as it comes, in the
    head's modes. A denoiser that is not among `modules` is an error that the head is told.
    """
    receiver, sender, random = Receiver(device), Sender(remembers=False), torch.Generator(device)
    entered = False
    with contextlib.ExitStack() as modes:
        for frame in forwards:
            answer: Any
            try:
                forward = Forward(*receiver.unpack(frame.body))
                context = forward.context
                if context is not None and not entered:
                    modes.enter_context(context.entered("parastep-helper", context.threads, device))
                    modes.enter_context(torch.no_grad())
                    entered = True
                module, inputs = modules[forward.name], (forward.args, forward.kwargs)
                served = evaluated(module, *inputs, forward.watched, random)
                if forward.quiet:
                    served = served._replace(output=None)
                kept = receiver.learn(tensors_in(served.output), frame.call)
                answer = None, served.output, served.flaw, kept
            except BaseException as error:
                answer = describe(error), None, None, False
            yield Frame(Kind.OUTPUT, frame.call, _packed(sender, answer))


def _packed(sender: Sender, answer: Any) -> bytes:
    try:
        return sender.pack(answer)
    except Exception as error:
        return sender.pack((f"its output cannot be sent: {describe(error)}", None, None, False))
