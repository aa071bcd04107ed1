"""Where a pipeline's ranks are: threads with replicas here, workers of ours, or a process group.

Made once for a parallel pipeline from what the user wrote; before every call it brings the replicas
up to date, and gives the call its followers, or the reason why there are none.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from .. import _core
from ..messages import describe
from ..options import Options
from .batching import Meeting
from .call import Call, Followers, Given
from .compiling import unfit_for_threads
from .local import LocalFollowers
from .remote.groups import Group
from .remote.workers import Workers
from .replicas import fingerprint, refresh, replicate, unfit
from .state import State, may_write_weights

_log = logging.getLogger(__name__)


class Ranks:
    """`devices`: one a rank, the leader's first. `remote`: where the others are, if not in threads;
    `batch`: they share one forward; `auto`: threads take the place of workers that cannot be.
    """

    def __init__(
        self,
        devices: list[torch.device],
        remote: Workers | Group | None = None,
        batch: bool = False,
        auto: bool = False,
    ) -> None:
        self.devices = devices
        self.group = remote if isinstance(remote, Group) else None
        self._remote, self._auto = remote, auto
        self._batch = batch and len(devices) > 1
        self._replicas: dict[int, Any] = {}
        self._made_from: int | None = None
        self.state = State()

    def __reduce__(self) -> Any:
        """A copy has what the user wrote, and nothing of what was made by it."""
        if self.group is not None:
            raise _core.UnsupportedError(
                "a pipeline of a process group cannot be copied or pickled, since its ranks would "
                "have to meet again: take `.pipe`, and have every rank call parallelize"
            )
        workers = isinstance(self._remote, Workers)
        return ranks_at, (self.devices, workers, self._batch, self._auto)

    def close(self) -> None:
        """Lets the replicas go, and ends the workers; twice is fine."""
        self._replicas.clear()
        if self._remote is not None:
            self._remote.close()

    def leader_alone(self, options: Options) -> bool:
        """Whether nobody would evaluate ahead in any call."""
        return options.untouched or (len(self.devices) == 1 and not options.strides)

    def call(
        self, pipe: Any, given: Given, options: Options, reason: str | None = None
    ) -> tuple[Call, list[Followers], str | None]:
        """A call and its followers; or one of the leader alone, and the reason why, which may be
        known before.
        """
        if self.leader_alone(options):
            return Call(1), [], None
        reason = reason or unfit(pipe)
        if reason is None:
            reason = self.state.known(pipe)
            if reason is not None:
                self._replicas.clear()  # nobody will need them, and they hold memory
        if reason is not None:
            return Call(1), [], reason
        in_threads = unfit_for_threads(pipe)
        lane = options.strides and in_threads is None
        try:
            self._refresh_remote(pipe)
            if self._remote is None and in_threads is not None:
                return Call(1), [], in_threads
            self._refresh(pipe, lane)
        except Exception as error:  # a component that cannot be copied
            reason = f"replicas of the pipeline cannot be made: {describe(error)}"
            if isinstance(self._remote, Workers) and "mode='threads'" not in reason:
                reason += "; mode='threads' needs no other processes"
            return Call(1), [], reason
        call = Call(len(self.devices), self.devices, lane=lane)
        if self._batch:
            call.meeting = Meeting(call.ranks, leads=not options.exact)
        try:
            return call, self._followers(call, pipe, given), None
        except Exception as error:
            reason = f"the arguments cannot be sent to other processes: {describe(error)}"
        if self._goes_on_in_threads(reason):
            return self.call(pipe, given, options)
        return Call(1), [], reason

    def _followers(self, call: Call, pipe: Any, given: Given) -> list[Followers]:
        found: list[Followers] = []
        if self._remote is not None and call.ranks > 1:
            found.append(self._remote.followers(call, pipe, given))
        if self._replicas:
            found.append(LocalFollowers(call, self._replicas, given))
        return found

    def _refresh_remote(self, pipe: Any) -> None:
        """The replicas in other processes."""
        try:
            if self._remote is not None:
                self._remote.refresh(pipe)
        except Exception as error:
            if not self._goes_on_in_threads(describe(error)):
                raise

    def _goes_on_in_threads(self, why: str) -> bool:
        """Whether ranks may be threads in place of workers; from here on they are."""
        if self._auto and self._remote is not None:
            _log.warning("ranks are threads, not processes: %s", why)
            self._remote.close()
            self._remote = None
            return True
        return False

    def _refresh(self, pipe: Any, lane: bool) -> None:
        """Replicas of the pipe as it is now: made again where its weights or modules changed."""
        now = fingerprint(pipe)
        if now != self._made_from:
            self._replicas.clear()
            self._made_from = now
        for rank, device in enumerate(self.devices):
            here = lane if rank == 0 else self._remote is None
            if here and rank not in self._replicas:
                own_weights = may_write_weights(pipe)
                self._replicas[rank] = replicate(pipe, device, own_weights)
        for replica in self._replicas.values():
            refresh(replica, pipe)


def ranks_at(places: list[torch.device], workers: bool, batch: bool, auto: bool) -> Ranks:
    return Ranks(places, Workers(places) if workers else None, batch, auto)
