"""When the leader's followers and helpers come into a call, what they come in with, and that they
leave it.

Followers start when the loop begins, before its first denoiser call, or after its first evaluation
where that is to show whether the denoisers keep something (`state`); the lane after the first step,
where steps ahead of the loop will be evaluated. Those that are late are `Call.open`'s to leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...speculation import give_room
from ..call import Call, Followers
from ..listening import Listening
from ..parts import denoisers_of
from ..replicas import denoisers_print
from ..state import State
from ..teams.team import ALTERED


class Entry:
    """Of one call's followers, and of the leader's helpers."""

    def __init__(self, pipe: Any, call: Call, followers: Sequence[Followers], state: State) -> None:
        self._pipe, self._call, self._followers, self._state = pipe, call, followers, state
        self._listening = Listening()
        self._started = self._lane_started = self._team_open = False

    def record(self, key: tuple[str, str], original: Any, args: Any, kwargs: Any) -> Any:
        """What an encoder's method returns, told to followers, whose encoders do not run."""
        with self._listening.recorded(getattr(self._pipe, key[0])) as heard:
            output = original(*args, **kwargs)
        self._call.tell_encoded(key, (output, heard))
        return output

    def begin(self, followers: bool) -> None:
        """A loop begins. `followers`: they may start too, if nothing is to be seen before that."""
        call, pipe = self._call, self._pipe
        if call.team is not None and call.made_from != denoisers_print(pipe):
            call.dissolve(ALTERED)
        settled = self._state.begin(pipe)
        if self._state.doubtful:
            call.doubt()
        if settled:
            self._open_team()
        if settled and followers:
            self.start()

    def start(self) -> None:
        for some in () if self._started else self._followers:
            some.start()
        self._started = True

    def start_lane(self) -> None:
        for some in () if self._lane_started else self._followers:
            some.start_lane()
        self._lane_started = True

    def _open_team(self) -> None:
        """What hangs in the denoisers keeps nothing: helpers may be asked."""
        if self._call.team is not None and not self._team_open:
            self._call.team.open(denoisers_of(self._pipe), self._state.is_still)
        self._team_open = True

    def look_at_state(self) -> str | None:
        """After an evaluation: why nobody may evaluate ahead, or None, and helpers may be asked.
        Denoisers that keep something from call to call are no function of their inputs.
        """
        reason = self._state.kept()
        if reason is None:
            self._open_team()
        return reason

    def send_off(self) -> None:
        """All leave at once, and give back the memory that they hold."""
        self._call.end()
        for some in self._followers:  # those at work are through then
            some.gather(set())
        give_room()

    def close(self) -> None:
        """The call is over, one way or another."""
        self._state.close()
