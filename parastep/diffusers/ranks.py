"""Where a pipeline's ranks are: threads with replicas here, workers of ours, or a process group.

Made once for a parallel pipeline from what the user wrote; before every call it brings the replicas
up to date, and gives the call its followers, or the reason why there are none.
"""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import torch

from .. import _core
from ..messages import FollowerWarning, describe
from ..options import Options
from .batching import Meeting
from .call import Call, Followers, Given
from .compiling import unfit_for_threads
from .local import LocalFollowers
from .memory import Peak, free_on, without_room
from .offload import take_turns
from .remote.groups import Group
from .remote.workers import Workers
from .replicas import denoisers_print, fingerprint, refresh, replicate, unfit
from .state import State, may_write_weights
from .teams.crew import Cuts
from .teams.helpers import Helper, LocalHelper
from .teams.team import Team
from .teams.together import ContextTeam

_log = logging.getLogger(__name__)
_PATIENCE = 10.0  # seconds for helpers that are about to leave
Guidance = tuple[Any, ...] | None  # the settings of a call's


Shares = list[tuple[int, ...]]  # of each rank, which of all devices it has, its head's first


class Ranks:
    """`places`: all devices, the leader's first. `shares`: those of each rank; None: two for each
    where the call is guided, else one, each call anew. `remote`: where the other ranks are, if not
    in threads; `batch`: they share one forward; `auto`: threads take the place of workers that
    cannot be.
    """

    def __init__(
        self,
        places: list[torch.device],
        remote: Workers | Group | None = None,
        batch: bool = False,
        auto: bool = False,
        shares: Shares | None = None,
    ) -> None:
        self.places, self._given = places, shares
        self.shares = shares_of(len(places), 2) if shares is None else shares  # in the last call
        self.group = remote if isinstance(remote, Group) else None
        self._remote, self._auto = remote, auto
        self._batch = batch and len(places) > 1
        self._replicas: dict[int, Any] = {}  # by place
        self._made_from: int | None = None
        self._cuts = Cuts()
        self._makes: dict[int, int] = {}  # which worker has shown its bits, by place
        self._full: dict[int, str] = {}  # places without room, and why
        self._housed: set[int] = {0}  # places with it, for a pipe with this fingerprint
        self._housed_for: int | None = None
        self._peak = Peak(places[0])  # of the leader's forwards
        self._unguided: set[Guidance] = set()  # settings with which there was nothing to share
        self.state = State()

    def __reduce__(self) -> Any:
        """A copy has what the user wrote, and nothing of what was made by it."""
        if self.group is not None:
            raise _core.UnsupportedError(
                "a pipeline of a process group cannot be copied or pickled, since its ranks would "
                "have to meet again: take `.pipe`, and have every rank call parallelize"
            )
        workers = isinstance(self._remote, Workers)
        return ranks_at, (self.places, workers, self._batch, self._auto, self._given)

    @property
    def devices(self) -> list[torch.device]:
        """One for each rank, the leader's first."""
        return [self.places[share[0]] for share in self.shares]

    def close(self) -> None:
        """Lets the replicas go, and ends the workers; twice is fine."""
        self._replicas.clear()
        self._cuts = Cuts()
        if self._remote is not None:
            self._remote.close()

    def leader_alone(self, options: Options) -> bool:
        """Whether nobody would evaluate anything for it in any call."""
        if any(len(share) > 1 for share in self._given or shares_of(len(self.places), 2)):
            return False
        return options.untouched or (len(self.places) == 1 and not options.strides)

    def call(
        self,
        pipe: Any,
        given: Given,
        options: Options,
        guidance: Guidance = None,
        reason: str | None = None,
    ) -> tuple[Call, list[Followers], str | None]:
        """A call and its followers; or one of the leader alone, and the reason why, which may be
        known before. `guidance`: the settings of the call's, None where it is off.
        """
        found = self._call(pipe, given, options, guidance, reason)
        if self._split and found[0].team is None:  # alone, or not: its forwards are its group's
            self._enter_together(found[0], pipe, options)
        return found

    def _call(
        self, pipe: Any, given: Given, options: Options, guidance: Guidance, reason: str | None
    ) -> tuple[Call, list[Followers], str | None]:
        if not options.untouched or self._given is None or len(self._given[0]) > 1:
            self._look_for_room(pipe)
        self._share_out(guidance)
        helped = any(len(share) > 1 for share in self.shares)
        if self.leader_alone(options) or (options.untouched and not helped):
            return Call(1), [], None
        reason = reason or unfit(pipe, self._split)
        lane = options.strides and not take_turns(pipe)
        if reason is None and len(self.places) == 1 and not lane:
            reason = "its denoisers take turns on the one device, by CPU offload"
        if reason is None:
            reason = self.state.known(pipe)
            if reason is not None:
                self._replicas.clear()  # nobody will need them, and they hold memory
        if reason is not None:
            return Call(1), [], reason
        in_threads = unfit_for_threads(pipe)
        lane = lane and in_threads is None
        try:
            self._refresh_remote(pipe, options)
            if self._remote is None and in_threads is not None:
                return Call(1), [], in_threads
            self._refresh(pipe, options, lane)
        except Exception as error:  # a component that cannot be copied
            reason = f"replicas of the pipeline cannot be made: {describe(error)}"
            if isinstance(self._remote, Workers) and "mode='threads'" not in reason:
                reason += "; mode='threads' needs no other processes"
            return Call(1), [], reason
        ranks = 1 if options.untouched else len(self.shares)
        call = Call(ranks, self.devices[:ranks], lane=lane)
        call.made_from = denoisers_print(pipe) if helped else None
        if call.home not in call.devices[1:]:  # nobody else evaluates step 0 there
            call.peak = self._peak
        if self._batch:
            call.meeting = Meeting(call.ranks, leads=not options.exact)
        if self._split:
            self._enter_together(call, pipe, options)
        else:
            self._make_teams(call, options)
        try:
            return call, self._followers(call, pipe, given, options), None
        except Exception as error:
            reason = f"the arguments cannot be sent to other processes: {describe(error)}"
        self.gather(call)
        if self._goes_on_in_threads(reason):
            return self._call(pipe, given, options, guidance, None)
        return Call(1), [], reason

    def _followers(self, call: Call, pipe: Any, given: Given, options: Options) -> list[Followers]:
        found: list[Followers] = []
        if self._remote is not None and call.ranks > 1:
            shares = self.shares[: call.ranks]
            found.append(self._remote.followers(call, pipe, given, shares, options))
        heads = {rank: share[0] for rank, share in enumerate(self.shares[: call.ranks])}
        here = {r: self._replicas[p] for r, p in heads.items() if p in self._replicas}
        if here:
            found.append(LocalFollowers(call, here, given, lambda rank: self._drop(heads[rank])))
        return found

    def _drop(self, place: int) -> None:
        """A replica that may not be used again."""
        self._replicas.pop(place, None)
        self._cuts.drop(place)
        self._housed -= {place} - {0}
        if place > 0 and isinstance(self._remote, Workers):
            self._remote.release(place)

    def gather(self, call: Call) -> None:
        """The call is over: its helpers leave."""
        for helper in call.helpers:
            if not helper.close(_PATIENCE):
                self._drop(helper.place)

    def _refresh_remote(self, pipe: Any, options: Options) -> None:
        """The replicas in other processes."""
        try:
            if self._remote is not None:
                self._remote.refresh(pipe, sorted(self._places(options) - {0}))
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

    def _refresh(self, pipe: Any, options: Options, lane: bool) -> None:
        """Replicas of the pipe as it is now, on all places that the call works on but for the
        leader's own: made again where its weights or modules changed.
        """
        now = fingerprint(pipe)
        if now != self._made_from:
            self._replicas.clear()
            self._made_from, self._cuts = now, Cuts()
        for place in self._places_here(options, lane) - self._replicas.keys():
            own_weights, home = may_write_weights(pipe), self.places[place]
            make = replicate if self.group is None else self.group.replica
            lane = place == 0
            self._replicas[place] = make(pipe, home, own_weights=own_weights, lane=lane)
        for replica in self._replicas.values():
            refresh(replica, pipe)

    def _places(self, options: Options) -> set[int]:
        """Those that the call works on."""
        shares = self.shares[: 1 if options.untouched else None]
        return {place for share in shares for place in share}

    def _places_here(self, options: Options, lane: bool) -> set[int]:
        """And has a replica on in this process: on the leader's own for a lane."""
        found = self._places(options) - {0} if self._remote is None else set()
        return found | {0} if lane else found

    def _look_for_room(self, pipe: Any) -> None:
        """Devices that a replica does not fit on are left out, until it does."""
        elsewhere = set(self.places) - {self.places[0]}
        if self.group is not None or all(free_on(device) is None for device in elsewhere):
            return
        now = fingerprint(pipe)
        if now != self._housed_for:
            self._housed, self._housed_for, self._peak = {0}, now, Peak(self.places[0])
        others = {p: d for p, d in enumerate(self.places) if p not in self._housed}
        full = without_room(pipe, others, self.places[0], self._peak.bytes)
        for place in full.keys() - self._full.keys():
            warnings.warn(f"left out: {full[place]}", FollowerWarning, stacklevel=6)
        self._full = full
        self._housed |= others.keys() - full.keys()

    # ---- teams -----------------------------------------------------------------------------------

    def _share_out(self, guidance: Guidance) -> None:
        """Two devices for each rank where guidance gives them something to share."""
        places = [place for place in range(len(self.places)) if place not in self._full]
        if self._given is None:
            guided = guidance is not None and guidance not in self._unguided
            shares = shares_of(len(places), 2 if guided else 1)
            self.shares = [tuple(places[k] for k in share) for share in shares]
        else:
            shares = [tuple(p for p in share if p not in self._full) for share in self._given]
            self.shares = [share for share in shares if share]

    def learn(self, guidance: Guidance, shared: bool) -> None:
        """Whether a rank of two devices had something to share in a call with this guidance."""
        if guidance is not None and not shared:
            self._unguided.add(guidance)

    def _make_teams(self, call: Call, options: Options) -> None:
        """The leader and its lane take turns on the same helpers. Ranks in other processes make
        teams of their own.
        """
        for rank, share in enumerate(self.shares[: call.ranks]):
            if len(share) == 1 or (rank > 0 and self._remote is not None):
                continue
            helpers = [self._helper(place, self.places[share[0]]) for place in share[1:]]
            call.helpers += helpers
            devices = [self.places[place] for place in share]
            team = functools.partial(
                Team,
                devices,
                helpers,
                self._cuts,
                options.exact,
                options.deadline,
                where=self.where(share[0]),
            )
            if rank == 0:
                call.team = team(raises=options.on_failure == "raise")
            if rank > 0 or call.lane:
                leaves = functools.partial(call.has_others, rank) if rank > 0 else _never
                call.teams[rank] = team(over=lambda: call.over, leaves=leaves)

    def where(self, place: int) -> str:
        """What reports call it."""
        return str(self.places[place]) if self.group is None else self.group.where(place)

    @property
    def _split(self) -> tuple[str, ...]:
        """Denoisers whose forwards the processes of a rank enter together."""
        context = self.group.context if self.group is not None else None
        return context.names if context is not None else ()

    def _enter_together(self, call: Call, pipe: Any, options: Options) -> None:
        """The leader and its lane take turns, whoever else evaluates ahead."""
        assert self.group is not None
        together, where = self.group.enter_together(pipe, options.deadline)
        call.helpers += [*together.others, together.own]
        call.made_from = denoisers_print(pipe)
        call.team = ContextTeam(together, where)
        if call.lane:
            call.teams[0] = ContextTeam(together, where, watches=True)

    def _helper(self, place: int, home: torch.device) -> Helper:
        if self.group is not None:
            return self.group.helper(place, self._cuts)
        if not isinstance(self._remote, Workers):
            return LocalHelper(self._replicas[place], self.places[place], home, place)
        made = self._remote.made(place)
        if self._makes.get(place) != made:
            self._cuts.drop(place)
        self._makes[place] = made
        return self._remote.helper(place)


def _never() -> bool:
    return False


def shares_of(count: int, size: int) -> Shares:
    """Devices in order, `size` for each rank; those left over are idle."""
    size = min(size, count)
    return [tuple(range(k, k + size)) for k in range(0, count - size + 1, size)]


def ranks_at(
    places: list[torch.device],
    workers: bool,
    batch: bool,
    auto: bool,
    shares: Shares | None,
) -> Ranks:
    return Ranks(places, Workers(places) if workers else None, batch, auto, shares)
