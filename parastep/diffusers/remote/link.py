"""Followers in other processes, as the leader's process sees them.

A `Link` is the connection to one, for all calls to come: here its death is noticed. The leader's
`Call` talks to a `RemoteRank` for each, which sends frames; `serving` is the other end.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ... import _core
from ...processes import pairs
from ...processes.frames import Frame, Kind, Stream
from ...processes.peer import Peer
from ...report import TeamRecord
from ...threads import HostContext
from ...tracing.draws import cloned_global_generator
from ..call import Call, Loop, Remote
from ..parts import is_scheduler
from ..teams.crew import Lost
from .packing import pack

_log = logging.getLogger(__name__)
_PATIENCE = 10.0  # seconds for followers to leave a call that is over


class RemoteTeam:
    """Of a rank in another process, by what that tells when it leaves the call."""

    def __init__(self, devices: Sequence[torch.device | str]) -> None:
        words = "its process has not told what it shared"
        self._record = TeamRecord([str(device) for device in devices], None, words, 0, 0, 0)
        self.losses: list[Lost] = []

    def record(self, others: Sequence[Any] = ()) -> TeamRecord:
        return self._record

    def dissolve(self, reason: str) -> None:
        """It finds out itself, and ends with the run."""

    def told(self, record: dict[str, Any], losses: list[tuple[str, int, str]]) -> None:
        self._record = TeamRecord.from_dict(record)
        self.losses = [Lost(*loss) for loss in losses]


class Serving:
    """A worker that serves another one with forwards, during one call."""

    def __init__(self, number: int, kill: Callable[[], None]) -> None:
        self.number, self._kill = number, kill

    def handle(self, frame: Frame) -> None:
        """It has nothing to say but that it has left."""

    def fail(self, why: str) -> None:
        """Nobody hears from it any more: the one it serves is to know at once, by its socket."""
        self._kill()


class Helping(Protocol):
    """Who serves a rank in another process with forwards; `made` changes with its model."""

    @property
    def device(self) -> torch.device | None: ...
    @property
    def made(self) -> int: ...
    def serve(self, number: int) -> int | None:
        """In this call; the descriptor of a socket to it, where they have none yet."""


class RemoteRank(Remote):
    """A rank in another process, during one call. `helpers`: those that serve it, by place."""

    def __init__(
        self,
        link: Link,
        rank: int,
        number: int,
        call: Call,
        helpers: Mapping[int, Helping] | None = None,
    ) -> None:
        self.link, self.rank, self.number, self.call = link, rank, number, call
        self.helpers = helpers or {}
        self.lost_helpers: set[int] = set()  # places
        self.evaluated: int | None = None  # as soon as it has left the call
        self._pair = link.pair
        self._carries = False  # there is a leader whose messages go this way
        self._told: _core.Inbox | _core.Pair | None = None  # where this rank is lost

    @property
    def transport(self) -> str:
        return "host" if self._pair is None else "nccl"

    def carrier(self) -> tuple[Callable[[bytes], None] | _core.Pair, bool]:
        self._carries = True
        return self._pair or self.link.peer.carry, self.link.same_clock

    def begin(self, arguments: bytes) -> None:
        """The call begins; from here on what this process says of it is heard."""
        with self.link.changed:
            self.link.current = self
        for place, helper in self.helpers.items():
            told = json.dumps([place, str(helper.device), helper.made]).encode()
            self.link.peer.send(Kind.HELPER, self.number, told, helper.serve(self.number))
        self._send(Kind.CALL, arguments)
        if self.link.peer.lost is not None:
            self.fail(self.link.peer.lost)

    def encoded(self, key: tuple[str, str], output: Any) -> None:
        self._send(Kind.ENCODED, pack((key, output)))

    def begun(self, returned: Any) -> None:
        self._send(Kind.BEGUN, pack(returned))

    def open(self, told: _core.Inbox | _core.Pair, x: torch.Tensor) -> None:
        self._told = told
        self._send(Kind.OPEN, pack((tuple(x.shape), x.dtype, self._pair is not None)))
        if self.link.peer.lost is not None:
            told.lost(self.link.peer.lost)

    def next_loop(self, loop: Loop) -> None:
        self._told, self._carries = None, False
        self._send(Kind.NEXT, pack((loop.steps, loop.returned, loop.states, loop.calls)))

    def over(self) -> None:
        """Whoever waits over there for a message that will not come is told so."""
        why = ""
        if self._pair is not None:
            if self._carries and self._told is None:
                self._pair.lost("the rank was left out before the run")
            if not self._pair.alive:
                why = "the leader went on without this rank"
        self._send(Kind.END, why.encode())

    def has_left(self) -> bool:
        return self.link.current is not self

    def fail(self, why: str, said: bool = False) -> None:
        """`said`: it says so itself, beside the run, in which it was not yet, or which could not
        carry it.
        """
        self.call.fail(self.rank, why)
        if self._told is not None:
            (self._told.failed if said else self._told.lost)(why)

    def handle(self, frame: Frame) -> None:
        if frame.kind == Kind.RUN:
            if isinstance(self._told, _core.Inbox):
                try:
                    self._told.deliver(frame.body)
                except _core.ProtocolError:
                    pass  # the inbox is lost by that, and the core says why
        elif frame.kind == Kind.ARRIVED:
            self.call.arrive(self.rank)
        elif frame.kind == Kind.FAILED:
            self.fail(frame.words, said=True)
        elif frame.kind == Kind.LEFT:
            self.evaluated, fine, worked = json.loads(frame.body)
            team = self.call.teams.get(self.rank)
            if worked is not None and isinstance(team, RemoteTeam):
                record, losses, lost = worked
                self.lost_helpers = set(lost)
                team.told(record, losses)
            if self._pair is not None and not (fine and self._pair.alive):
                self._pair.lost("the follower has left the run")
                self._pair.close()  # the next call makes another one
                self.link.pair = None

    def _send(self, kind: Kind, body: bytes = b"") -> None:
        self.link.peer.send(kind, self.number, body)


class Link:
    """The connection to a follower's process, for all calls to come. `device`: its own, `ending`
    tells how it has ended, `kill` ends it, where it is a process of ours.
    """

    def __init__(
        self,
        stream: Stream,
        name: str,
        same_clock: bool,
        ending: Callable[[], str] | None = None,
        device: torch.device | None = None,
        kill: Callable[[], None] = lambda: None,
    ) -> None:
        self.same_clock, self.device, self._kill = same_clock, device, kill
        self._ending = ending
        self.changed = threading.Condition()
        self.current: RemoteRank | Serving | None = None  # the call that it is in, or has not left
        self.loaded: str | None = None  # what it said of the last model: "" where all went well
        self.made = 0  # changes with the model that it has; no other link's is ever the same
        self.pair: _core.Pair | None = None  # what carries the latents, in place of frames
        self.unpaired: str | None = None  # why there is none in this call
        self._tries = len(pairs.PATIENCE)  # that are left, since a slow start is none for ever
        self._patience = 0.0  # seconds that the one at hand may take
        self._home: torch.device | None = None  # the leader's, where a pair was offered
        self._joining: pairs.Joining | None = None  # our end of it
        self.peer = Peer(stream, name, self._handle, self._gone)

    @property
    def alive(self) -> bool:
        return self.peer.lost is None

    def serve(self, number: int) -> int:
        """It evaluates for whoever has the socket whose descriptor is returned, in this call; one
        that is in an earlier call yet, or gone, closes it.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            if self.alive and self.current is None:
                self.current = Serving(number, self._kill)
                self.peer.send(Kind.SERVE, number, descriptor=theirs.detach())
        return ours.detach()

    def offer_pair(self, home: torch.device) -> float:
        """Where the leader is on a device and there is no pair yet; `wait_for_pair` follows. The
        seconds that it may take.
        """
        if self.pair is not None and not self.pair.alive:
            self.pair.close()
            self.pair = None
        if home.type == "cuda" and self.pair is None and self._tries > 0:
            self._home, self.unpaired = home, None
            self._patience = pairs.PATIENCE[-self._tries]
            self._tries -= 1
            try:
                self.peer.send(Kind.PAIR, 0, pairs.offer(home, self._patience))
            except _core.Error as error:
                self._pair_up(None, str(error), for_ever=True)
            return self._patience
        return 0.0

    def wait_for_pair(self, rank: int, until: float) -> None:
        if self._home is None:
            return
        settled = self.wait(lambda: (self.pair or self.unpaired) is not None, until)
        if not settled or not self.alive:
            self._give_up_pair(self.peer.lost or "the rank did not answer in time")
        if self.pair is None and self.alive:
            _log.warning("rank %d: latents go through the host: %s", rank, self.unpaired)
        self._home = None

    def _pair_up(self, pair: _core.Pair | None, why: str | None, for_ever: bool = False) -> None:
        with self.changed:
            self.pair, self.unpaired = pair, why
            if pair is not None:  # another one, where this is lost some day, has all tries again
                self._tries = len(pairs.PATIENCE)
            elif for_ever:
                self._tries = 0
            self.changed.notify_all()

    def _give_up_pair(self, why: str, for_ever: bool = False) -> None:
        joining, self._joining = self._joining, None
        if joining is not None:
            joining.give_up()
        self._pair_up(None, why, for_ever)

    def _handle(self, frame: Frame) -> None:
        current = self.current
        if frame.kind == Kind.LOADED:
            with self.changed:
                self.loaded = frame.words
                self.changed.notify_all()
        elif frame.kind == Kind.PAIRED:
            self._meet(frame.body)
        elif current is not None and frame.call == current.number:
            current.handle(frame)
            if frame.kind == Kind.LEFT:
                with self.changed:
                    self.current = None
                    self.changed.notify_all()

    def _meet(self, answer: bytes | bytearray) -> None:
        home, refused = self._home, pairs.refusal(answer)
        if refused is not None and self.pair is not None:  # it failed when ours was through
            self.pair.lost(refused[0])
        elif home is None:  # nobody waits for it any more
            return
        elif refused is not None:
            self._give_up_pair(refused[0], for_ever=not refused[1])
        else:
            self._joining = pairs.meet(answer, home, self._patience, self._joined)

    def _joined(self, joining: pairs.Joining) -> None:
        self._pair_up(joining.pair, joining.why, for_ever=not joining.late)

    def _gone(self, why: str) -> None:
        if self._ending is not None:
            why = f"{why} ({self._ending()})"
        with self.changed:
            current, pair = self.current, self.pair
            self.changed.notify_all()
        if current is not None:
            current.fail(why)
        if pair is not None:
            pair.lost(why)

    def close(self, patience: float = 1.0) -> None:
        """No more calls will come. Not left to the last reference: a communicator holds memory of
        the device, and threads.
        """
        with self.changed:
            pair, self.pair = self.pair, None
        if pair is not None:
            pair.close()
        self.peer.close(patience)

    def wait(self, condition: Callable[[], bool], until: float) -> bool:
        """Until the condition holds or the process is gone; False at the deadline."""
        with self.changed:
            patience = max(until - time.monotonic(), 0.0)
            return self.changed.wait_for(lambda: condition() or not self.alive, patience)


class RemoteFollowers:
    """The followers of one call in other processes, which are told of its beginning and its end.

    To be made before the pipeline runs: arguments and the states of generators are taken here.
    `given` are the call's (args, kwargs); `drop` is told who was lost, and who did not leave.
    `helpers`: those that serve a rank, by place, `team`: what of the options a rank
    with helpers goes by.
    """

    def __init__(
        self,
        links: Mapping[int, Link],
        number: int,
        call: Call,
        pipe: Any,
        given: tuple[tuple[Any, ...], dict[str, Any]],
        drop: Callable[[set[int], set[int]], None],
        helpers: Mapping[int, Mapping[int, Helping]] | None = None,
        team: tuple[bool, float | None] = (False, None),
    ) -> None:
        _pair_all(links, call.home)
        self.ranks = {
            rank: RemoteRank(link, rank, number, call, (helpers or {}).get(rank))
            for rank, link in links.items()
        }
        self._call, self._drop = call, drop
        random = call.home.type, cloned_global_generator(call.home).get_state()
        call.remote = {r: there for r, there in self.ranks.items() if there.link.current is None}
        others = len(call.remote) > 1
        self._arguments = pack((given, _settings(pipe), HostContext(), random, (*team, others)))
        for rank in self.ranks.keys() - call.remote.keys():
            call.fail(rank, "it is still in an earlier call")

    @property
    def evaluated(self) -> dict[int, int]:
        """Evaluations of the ranks that have left the call."""
        found = ((rank, there.evaluated) for rank, there in self.ranks.items())
        return {rank: count for rank, count in found if count is not None}

    def start(self) -> None:
        self._call.begin_remote(self._arguments)

    def start_lane(self) -> None:
        """It is a thread of this process."""

    def gather(self, lost: set[int]) -> None:
        """Waits for those that are about to leave."""
        until = time.monotonic() + _PATIENCE
        stuck = set()
        for rank, there in self.ranks.items():
            if rank not in self._call.remote:  # it was never in this call
                continue
            end = time.monotonic() + 0.05 if rank in lost else until
            if not there.link.wait(there.has_left, end):
                stuck.add(rank)
        self._drop(lost, stuck)


def _pair_all(links: Mapping[int, Link], home: torch.device) -> None:
    """All at once: each takes as long as NCCL needs to find the other end."""
    free = {rank: link for rank, link in links.items() if link.current is None}
    patience = max((link.offer_pair(home) for link in free.values()), default=0.0)
    until = time.monotonic() + patience
    for rank, link in free.items():
        link.wait_for_pair(rank, until)


def _settings(pipe: Any) -> dict[str, Any]:
    """What of a pipeline may change from call to call, as `refresh` takes it."""
    plain = (int, float, str, type(None))
    return {
        name: value
        for name, value in vars(pipe).items()
        if is_scheduler(value) or name == "_internal_dict" or isinstance(value, plain)
    }
