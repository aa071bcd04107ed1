"""Teams of a process group: both ends of the standing connection between a head and each process
that helps it.

The connection is for all calls to come. A call's forwards are a session of it: the head says SERVE,
and END when it asks for nothing more; the helper says LEFT when it is through with both. `helping`
has what goes over in between.
"""

from __future__ import annotations

import json
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ... import _core
from ...processes.frames import Frame, Kind, Stream
from ...processes.peer import Peer
from ...threads import start_thread
from .helping import RemoteHelper, answers

_MOMENT = 5.0  # seconds for a forward to end when its call has
CHANNEL = 1  # of a process pair's streams: beside what rank 0 and the other one say to each other


class Member:
    """The head's end, in the group's process that is a rank. `place`: the helper's process, `where`
    what reports call it.
    """

    def __init__(self, stream: Stream, place: int, where: str) -> None:
        self.place, self.where = place, where
        self._changed = threading.Condition()
        self._serves: int | None = None  # the call that it is in, or has not left
        self._model: int | None = None  # which one it had at the end of the last one
        self._session: _Session | None = None
        self.peer = Peer(stream, f"parastep-{place}-member", self._handle, self._gone)

    def helper(
        self, call: int, home: torch.device, known: bool = False, quiet: bool = False
    ) -> RemoteHelper:
        """For one call. `known`: it has shown that it computes what the head does, so that it may
        not do that with another model than it had then. `quiet`: it takes part in forwards, and its
        outputs are the head's own.
        """

        def connect(handle: Callable[[Frame], None], lose: Callable[[str], None]) -> _Session:
            return self._open(_Session(self, call, handle, lose), known)

        def left(patience: float) -> bool:
            return self._has_left(call, patience)

        return RemoteHelper(
            connect, home, home, self.place, left=left, where=self.where, quiet=quiet
        )

    def close(self, patience: float) -> None:
        self.peer.close(patience)

    def _open(self, session: _Session, known: bool) -> _Session:
        with self._changed:
            why = self.peer.lost
            if why is None and self._serves is not None:
                why = "it is still in an earlier call"
            if why is None:
                self._serves, self._session = session.call, session
        if why is not None:
            session.lose(why)
            return session
        told = json.dumps(self._model if known else None).encode()
        self.peer.send(Kind.SERVE, session.call, told)
        return session

    def _has_left(self, call: int, patience: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._serves != call, patience)

    def _handle(self, frame: Frame) -> None:
        with self._changed:
            session = self._session
            if frame.kind == Kind.LEFT and frame.call == self._serves:
                self._serves, self._session = None, None
                self._model = json.loads(frame.body)
                self._changed.notify_all()
                return
        if session is not None:
            session.handle(frame)

    def _gone(self, why: str) -> None:
        with self._changed:
            session, self._session, self._serves = self._session, None, None
            self._changed.notify_all()
        if session is not None:
            session.lose(why)


class _Session:
    """A `helping.Line`, of one call."""

    def __init__(
        self,
        member: Member,
        call: int,
        handle: Callable[[Frame], None],
        lose: Callable[[str], None],
    ) -> None:
        self.call, self.handle, self.lose = call, handle, lose
        self._member = member

    def send_now(self, kind: Kind, call: int, body: bytes) -> None:
        self._member.peer.send(kind, call, body)

    def close(self, patience: float = 1.0) -> None:
        self._member.peer.send(Kind.END, self.call)


class Jobs:
    """What comes for a process, from whomever, in the order in which it is to be done."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._first: deque[Any] = deque()  # put back: before the others
        self.put = self._queue.put

    def get(self) -> Any:
        return self._first.popleft() if self._first else self._queue.get()

    def put_back(self, jobs: Sequence[Any]) -> None:
        self._first.extendleft(reversed(jobs))


class Head:
    """The helper's end: what its head says is put among the `jobs` of this process."""

    def __init__(self, stream: Stream, jobs: Jobs) -> None:
        self._jobs = jobs
        self.peer = Peer(stream, "parastep-head", jobs.put, self._gone)

    def close(self, patience: float) -> None:
        self.peer.close(patience)

    def serve(
        self,
        asked: Frame,
        model: int,
        modules: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        """A session, until its head or the leader has no more for it. `model`: which one this
        process has now.
        """
        known = json.loads(asked.body)
        if known not in (None, model):
            modules = Refusing("its model has changed since it was compared with its head's")
        for answer in answers(self._forwards(), modules, device):
            self.peer.send(answer.kind, answer.call, bytes(answer.body))
        self.leave(asked, model)

    def take_part(self, asked: Frame, modules: Mapping[str, Any], device: torch.device) -> None:
        """A session of a context group, likewise. In a thread: where another process of the group
        is lost, nothing ends a forward but the collective's own time-out.
        """
        forwards: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def work() -> None:
            for answer in answers(iter(forwards.get, None), modules, device):
                self.peer.send(answer.kind, answer.call, bytes(answer.body))
            self.leave(asked, 0)

        part = start_thread(work, "parastep-member", device)
        for frame in self._forwards():
            forwards.put(frame)
        forwards.put(None)
        part.join(_MOMENT)  # no other session begins before it says that it has left this one

    def leave(self, asked: Frame, model: int) -> None:
        self.peer.send(Kind.LEFT, asked.call, json.dumps(model).encode())

    def _forwards(self) -> Iterator[Frame]:
        while isinstance(job := self._jobs.get(), Frame) and job.kind == Kind.FORWARD:
            yield job
        if not isinstance(job, Frame) or job.kind != Kind.END:
            self._jobs.put_back([job])  # the call's result, or the leader's end

    def _gone(self, why: str) -> None:
        self._jobs.put(Frame(Kind.END, 0, b""))


class Refusing(dict[str, Any]):
    """Denoisers that there are none of, and why."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self._why = why

    def __missing__(self, name: str) -> Any:
        raise _core.StateError(self._why)
