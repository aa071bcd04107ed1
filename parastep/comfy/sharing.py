"""ComfyUI: the teams of a run: made for its ranks, ended with it, told of in its report."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..options import Options
from ..report import HELPER_LOST, Failure, Report, TeamRecord
from .places import Team as Devices
from .teams import Team

EXACT = "at tolerance 0 only what the graph itself splits is split: a share rounds differently"


def no_split() -> str | None:
    """Why this version of the host cannot split a call, or None."""
    from comfy.patcher_extension import WrappersMP

    if importlib.util.find_spec("comfy.multigpu") and hasattr(WrappersMP, "CALC_COND_BATCH"):
        return None
    return "this ComfyUI has no MultiGPU CFG Split, which came with 0.23"


class Sharing:
    """Makes a run's teams.

    Args:
        guider: of the run.
        patcher_of: the loaded patcher of a device; raises where there is none.
        interrupt: what the host raises in a call that the user cancels.
    """

    def __init__(
        self,
        guider: Any,
        patcher_of: Callable[[torch.device], Any],
        options: Options,
        interrupt: type[BaseException],
    ) -> None:
        self._guider, self._patcher_of = guider, patcher_of
        self._options, self._interrupt = options, interrupt
        self.leader: Team | None = None
        self.lost: str | None = None  # why the leader has no team
        self._teams: dict[int, Team] = {}  # of all ranks that have one

    def lead(self, devices: Devices, held: bool, altered: Callable[[], str | None]) -> Team | None:
        """The leader's team. None for one device, or where others cannot help it.

        `held`: it shares nothing until its model has been looked at; `altered`: why that is no
        function any more, or None.
        """
        try:
            unsplit = EXACT if self._options.exact else None
            self.leader = self._team(devices, unsplit=unsplit, altered=altered)
        except Exception as error:
            self.lost = str(error)
        if self.leader is not None:
            self.leader.held = held
            self._teams[0] = self.leader
        return self.leader

    def follow(self, devices: Devices) -> Team | None:
        """A follower's; raises where one of the devices cannot help."""
        return self._team(devices, leaves=self._leader_shares)

    def number(self, teams: Sequence[Team | None]) -> None:
        """The followers' teams, of ranks 1 and on."""
        self._teams |= {rank: team for rank, team in enumerate(teams, 1) if team is not None}

    def _leader_shares(self) -> bool:
        return self.leader is not None and bool(self.leader.serving)

    def _team(self, devices: Devices, **given: Any) -> Team | None:
        if len(devices) == 1:
            return None
        patchers = {device: self._patcher_of(device) for device in devices}
        for device in devices[1:]:
            self._check(device)
        shapes = getattr(self._guider.inner_model, "latent_shapes", None)
        for patcher in patchers.values() if shapes is not None else ():
            patcher.model.latent_shapes = shapes
        return Team(
            patchers,
            f"parastep-{devices[0]}",
            deadline=self._options.deadline,
            raises=self._options.on_failure == "raise",
            interrupt=self._interrupt,
            **given,
        )

    def _check(self, device: torch.device) -> None:
        """Raises RuntimeError where a condition has what the host has in one place alone."""
        for cond in (cond for conds in self._guider.conds.values() for cond in conds):
            if "gligen" in cond:
                raise RuntimeError("GLIGEN runs on one device only")
            control = cond.get("control")
            while control is not None:
                if device not in getattr(control, "multigpu_clones", {}):
                    raise RuntimeError(f"its ControlNet has no copy on {device}")
                control = control.previous_controlnet

    # ---- in the run ------------------------------------------------------------------------------

    def at(self, rank: int, step: int) -> None:
        """A rank evaluates this step next."""
        if rank in self._teams:
            self._teams[rank].step = step

    def leave(self) -> None:
        """Followers wait for helpers no more."""
        for rank, team in self._teams.items():
            if rank > 0:
                team.end()

    def end(self) -> None:
        for team in self._teams.values():
            team.end()

    @property
    def busy(self) -> bool:
        return any(team.busy for team in self._teams.values())

    # ---- after it --------------------------------------------------------------------------------

    def tell(self, report: Report, ranks: Sequence[Devices], why: str | None, began: float) -> None:
        """What the devices of each rank did together; `why` those without a team did not."""
        for rank, devices in enumerate(ranks[: report.ranks]):
            team = self._teams.get(rank)
            if team is None:
                reason = (self.lost if rank == 0 else None) or why or "one device"
                named = [str(device) for device in devices]
                report.teams.append(TeamRecord(named, None, reason, 0, 0, 0))
                continue
            report.teams.append(team.record().since(began))
            for lost in team.losses:
                text = f"its helper on {lost.device} was lost: {lost.why}"
                report.failures.append(Failure(rank, lost.step, HELPER_LOST, text))
