"""One call of a parallel pipeline: what its leader and its followers tell each other beside the
core.

The core carries points and outputs. Here goes what is said once: encoder outputs, who has the run's
other end, who failed before there was a run. A follower that waits is always let go at the end.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

from . import _core


class Leave(BaseException):
    """Takes a follower out of its pipeline's loop: the run is over.

    Not an Exception, so that no pipeline's own handler catches it.
    """


class GoBack(BaseException):
    """Takes a follower out of its loop to enter the call again: its next step lies behind it."""


class Call:
    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._changed = threading.Condition()
        self._encoded: dict[tuple[str, str], list[Any]] = defaultdict(list)
        self._followers: dict[int, _core.Follower] = {}
        self._failed: dict[int, str] = {}
        self._over = False

    # Leader.

    def tell_encoded(self, key: tuple[str, str], output: Any) -> None:
        with self._changed:
            self._encoded[key].append(output)
            self._changed.notify_all()

    def open(self, leader: _core.Leader) -> None:
        """The run exists: followers may take their ends. Those that failed before are left out."""
        with self._changed:
            for rank in range(1, self.ranks):
                if rank in self._failed:
                    leader.leave_out(rank, self._failed[rank])
                else:
                    self._followers[rank] = leader.follower(rank)
            self._changed.notify_all()

    def end(self) -> None:
        """No more is to come: whoever waits leaves."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    # Followers.

    def encoded(self, key: tuple[str, str], ordinal: int) -> Any:
        """The leader's output of this call of an encoder, as soon as it is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._encoded[key]) > ordinal)
            if len(self._encoded[key]) <= ordinal:
                raise Leave
            return self._encoded[key][ordinal]

    def follower(self, rank: int) -> _core.Follower:
        """This rank's end of the run, as soon as there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or rank in self._followers)
            if rank not in self._followers:
                raise Leave
            return self._followers[rank]

    def fail(self, rank: int, why: str) -> None:
        """This rank cannot go on: told through the core, or kept until there is a run."""
        with self._changed:
            follower = self._followers.get(rank)
            if follower is None:
                self._failed[rank] = why
        if follower is not None:
            follower.fail(why)
