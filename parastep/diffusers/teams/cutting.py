"""A batch, cut: the head evaluates the first share of a forward, helpers the others.

Guidance evaluates its branches as items of one forward. Equal to rounding, so never at tolerance 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from ...messages import describe
from ..forwards import Inputs, form_of, joined, tensors_in
from .crew import Crew, Key, Unserved
from .helpers import Helper, Served

Pairs = list[tuple[Helper, Future[Served]]]


class _Made(NamedTuple):
    """An output that was joined, and its shares where they were made, the head's first."""

    whole: torch.Tensor
    version: int
    shares: Sequence[torch.Tensor]


class Cutting:
    """Of one team; `shared` counts the forwards that were evaluated in shares."""

    def __init__(self, crew: Crew) -> None:
        self.shared = 0
        self._crew, self._cuts = crew, crew.cuts
        self._made: dict[int, _Made] = {}  # in this iteration, by the whole's id

    def begin(self) -> None:
        """Another iteration: what was made in the last one is not given back as it was."""
        self._made.clear()

    def in_shares(
        self,
        key: Key,
        inputs: Inputs,
        cut: Any,
        run: Callable[..., Any],
        whole: Callable[[], Any],
    ) -> Any:
        """What `whole()` would give, by the rule that passed the trial `cut`; `run` is the head's
        denoiser. Where a helper gives no share the head evaluates the whole: all work on copies,
        for the case that it comes to that.
        """
        helpers = self._crew.sharing(inputs)
        first, *others = self._cut(inputs, 1 + len(helpers), str(self._cuts.rules[cut]))
        pairs = [(h, self._crew.start(h, key[0], share)) for h, share in zip(helpers, others)]
        with torch.inference_mode(False):
            first = first.own_copy()
        state = first.state
        began = time.perf_counter()
        try:
            own = run(*first.args, **first.kwargs)
        except Exception as error:  # the whole says whether it is the share's fault
            self._cuts.rules[cut] = None
            self._cuts.reasons[cut] = f"{key[0]} raises {describe(error)} for a share"
            return whole()
        if first.state != state:
            self._crew.dissolve(f"{key[0]} writes to its own inputs")
            return whole()
        try:
            served = self._crew.all_served(pairs, began)
            output = self._joined(own, pairs, served, inputs.of_lists)
            if form_of(output) != self._cuts.forms[cut]:
                self._crew.lose(helpers[0], f"its output does not fit: {form_of(output)}")
                raise Unserved
        except Unserved:
            return whole()
        broken = [helper for (helper, _), share in zip(pairs, served) if share.flaw is not None]
        if not broken:
            self.shared += 1
            return output
        instead = whole()
        self._crew.blame(broken[0], instead)
        return instead

    def _cut(self, inputs: Inputs, count: int, rule: str) -> list[Inputs]:
        """What was made in shares in this iteration, a ControlNet's residuals, stays with those."""
        shares = inputs.cut(count, rule)
        for k, share in enumerate(shares if self._made else ()):
            if share.values.keys() == inputs.values.keys():
                pairs = zip(inputs.values.values(), share.values.values())
                shares[k] = share.with_values([self._made_by(k, *pair) for pair in pairs])
        return shares

    def _made_by(self, k: int, whole: Any, share: Any) -> Any:
        made = self._made.get(id(whole))
        return share if made is None or whole._version != made.version else made.shares[k]

    def _joined(self, own: Any, pairs: Pairs, served: list[Served], lists: bool) -> Any:
        output = own
        for (helper, _), share in zip(pairs, served):
            try:
                output = joined([output, share.output], lists)
            except Exception as error:  # of another kind, or another form
                self._crew.lose(helper, f"its output does not fit: {describe(error)}")
                raise Unserved from error
        if not lists:
            self._remember(output, own, [share.kept for share in served])
        return output

    def _remember(self, output: Any, own: Any, kept: Sequence[Any]) -> None:
        if any(made is None for made in kept):
            return
        columns = zip(tensors_in(own), *map(tensors_in, kept))
        for whole, shares in zip(tensors_in(output), columns):
            if not whole.is_inference():  # nothing would tell that the host wrote to it
                self._made[id(whole)] = _Made(whole, whole._version, shares)
