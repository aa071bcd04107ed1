"""A follower's process in a call: what it hears from the leader, and the loop it runs for it.

`Server` plays the leader's part towards a `Call` of its own, so that a `Follower` is the same in a
thread and in a process. Workers that we spawned and the ranks of a process group differ in how
they come to be, which is in `workers` and `groups`.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ... import _core
from ...messages import describe
from ...processes import pairs
from ...processes.frames import Frame, Kind, Stream
from ...processes.peer import Peer
from ...quiet import thread_name
from ...speculation import with_room
from ...threads import finish_work
from ..call import Call, Loop
from ..follower import Follower
from ..replicas import refresh
from ..teams.crew import Cuts
from ..teams.helpers import Helper
from ..teams.team import Team
from ..tensors import own_copy
from .packing import unpack

_MOMENT = 10.0  # seconds


# A rank's team, given what of the options it goes by, and whether the run has ended and whether
# other followers are left.
TeamOf = Callable[[bool, float | None, Callable[[], bool], Callable[[], bool]], Any]


def team_of(
    device: torch.device, helpers: Sequence[Helper], cuts: Cuts, where: str | None = None
) -> TeamOf | None:
    """Of a head on that device; None where it has no helpers."""
    devices = [device, *(helper.device for helper in helpers)]
    made = functools.partial(Team, devices, helpers, cuts, where=where)
    return made if helpers else None


class RemoteCall(Call):
    """A call whose leader is in another process, as this follower sees it."""

    def __init__(
        self,
        rank: int,
        number: int,
        arguments: bytes | bytearray,
        peer: Peer,
        joining: pairs.Joining | None,
    ) -> None:
        super().__init__(rank + 1)
        self.rank, self.number, self.arguments, self._peer = rank, number, arguments, peer
        self._joining = joining
        self._told: _core.Inbox | _core.Pair | None = None  # where the leader is lost

    @property
    def _pair(self) -> _core.Pair | None:
        return None if self._joining is None else self._joining.pair

    def arrive(self, rank: int) -> None:
        self._peer.send(Kind.ARRIVED, self.number)

    def fail(self, rank: int, why: str) -> None:
        """Through the run where there is one and it can still carry that, else beside it."""
        with self._changed:
            follower = self._followers.get(rank)
        if follower is None:
            self._peer.send(Kind.FAILED, self.number, why.encode())
            return
        try:
            follower.fail(why)
            follower.next()  # the leader's last word: nothing is on its way after that
        except _core.Error:
            self._peer.send(Kind.FAILED, self.number, why.encode())

    def handle(self, frame: Frame, device: torch.device) -> None:
        """What the leader's process says, in the receiving thread."""
        if frame.kind == Kind.ENCODED:
            key, output = unpack(frame.body, device)
            self.tell_encoded(key, output)
        elif frame.kind == Kind.BEGUN:
            self.begin(unpack(frame.body, device))
        elif frame.kind == Kind.OPEN:
            self._join(device, *unpack(frame.body))
        elif frame.kind == Kind.NEXT:
            self._told = None
            self.begin_next_loop(Loop(*unpack(frame.body, device)), {})
        elif frame.kind == Kind.RUN and isinstance(self._told, _core.Inbox):
            try:
                self._told.deliver(frame.body)
            except _core.ProtocolError:
                pass  # the run is lost to this follower, which learns of it there
        elif frame.kind == Kind.END:
            if self._pair is not None and frame.body:
                self._pair.lost(frame.words)
            self.end()

    def _join(
        self, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, paired: bool
    ) -> None:
        try:
            # The leader's end is there, and so ours will be in a moment.
            if paired and (self._joining is None or self._joining.wait(_MOMENT) is None):
                raise _core.LostError("the connection that the leader uses is not there")
            way = self._pair if self._pair is not None and paired else self._peer.carry
            x = _latent(shape, dtype, device)
            join = functools.partial(_core.join, x, self.rank, 1, (way, True))
            follower, self._told = with_room(join)
        except Exception as error:  # no memory, a device that has failed, ...
            self._peer.send(Kind.FAILED, self.number, describe(error).encode())
            return
        with self._changed:
            self.admit(self.rank, follower)
            if self.over:
                follower.close()

    def gone(self, why: str) -> None:
        """The leader's process is."""
        if self._told is not None:
            self._told.lost(why)
        self.end()

    def leave(self) -> bool:
        """Lets go of the run; whether the pair is fine."""
        with self._changed:
            self.end()  # a run that opens now is none of ours
            for follower in self._followers.values():
                follower.close()
        return self._pair is not None and self._pair.alive


class Server:
    """A process's part as a follower: takes calls from the leader's frames and serves them.

    Args:
        calls: takes its `RemoteCall`s.
        other: handles the frames that are not of a call; `gone` is told when the leader is.
    """

    def __init__(
        self,
        stream: Stream,
        rank: int,
        device: torch.device,
        calls: Callable[[RemoteCall], None],
        other: Callable[[Frame], None],
        gone: Callable[[str], None],
    ) -> None:
        self.rank, self.device = rank, device
        self._calls, self._other, self._on_gone = calls, other, gone
        self._current: RemoteCall | None = None
        self._joining: pairs.Joining | None = None  # the end of a pair, kept from call to call
        self.peer = Peer(stream, thread_name(rank), self._handle, self._gone)

    def close(self, patience: float) -> None:
        """No more calls will come."""
        self._let_go()
        self.peer.close(patience)

    def _let_go(self) -> None:
        joining, self._joining = self._joining, None
        if joining is not None:
            joining.give_up()

    def _handle(self, frame: Frame) -> None:
        if frame.kind == Kind.CALL:
            self._current = RemoteCall(self.rank, frame.call, frame.body, self.peer, self._joining)
            self._calls(self._current)
        elif frame.kind == Kind.PAIR:
            self._let_go()  # the leader has let go of it
            answer = functools.partial(self.peer.send, Kind.PAIRED, 0)
            self._joining = pairs.accept(frame.body, self.device, answer)
        elif self._current is not None and frame.call == self._current.number:
            self._current.handle(frame, self.device)
            if frame.kind == Kind.END:
                self._current = None
        else:
            self._other(frame)

    def _gone(self, why: str) -> None:
        if self._current is not None:
            self._current.gone(why)
        self._on_gone(why)

    def serve(
        self,
        call: RemoteCall,
        replica: Any,
        helpers: Sequence[Helper] = (),
        team_of: TeamOf | None = None,
    ) -> None:
        """Follows the leader through one call; whatever goes wrong is told to it. `team_of` makes
        the team with these helpers, if there are any.
        """
        loop = Follower(replica, self.rank, call, self.device)
        team: Any = None
        try:
            told = unpack(call.arguments, self.device)
            arguments, settings, context, (kind, state), (exact, deadline, others) = told
            if team_of is not None:
                team = team_of(exact, deadline, lambda: call.over, lambda: others)
                call.teams[self.rank] = team
            refresh(replica, types.SimpleNamespace(**settings))
            random = torch.Generator(self.device)
            if self.device.type == kind:
                random.set_state(state)
            intraop = 1 if self.device.type == "cpu" else None
            finish_work(self.device)  # replica and arguments, for a stream of its own
            with context.entered(thread_name(self.rank), intraop, self.device):
                loop.run(lambda: own_copy(arguments), random)
        except BaseException as error:  # it could not begin, or could not even say why it failed
            call.fail(self.rank, describe(error))
        finally:
            for helper in helpers:
                helper.close(1.0)
            left = loop.evaluated, call.leave(), _worked(team)
            self.peer.send(Kind.LEFT, call.number, json.dumps(left).encode())


def _worked(team: Any) -> Any:
    """What a team did, as its leader's report has it, and the places of helpers that it lost."""
    if team is None:
        return None
    return team.record().to_dict(), team.losses, team.lost_places


def _latent(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    return torch.zeros(shape, dtype=dtype, device=device)
