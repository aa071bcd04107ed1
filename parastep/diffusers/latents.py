"""A loop's latents, as the leader sees them: what the first iteration shows of each, and after that
what the next step will be handed.

The leader asks the core before the loop calls a denoiser, and the sample is seen only in step, so
it is told here from what the last step returned and from what the denoiser is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..tracing.noise import NoiseAhead
from ..tracing.program import Traced, trace_rows
from . import tokens
from .arguments import iterations_of, latent_in, sample_in
from .iteration import Iteration, widest
from .tensors import is_rounded

_STEP_TENSORS = ("model_output", "sample", "timestep", "old_pred_original_sample", "timestep_back")

_UNSEEN = 2  # iterations of a loop whose latents may be unknown


class Apart(Exception):
    """Latents that are not one point; the text says why."""


def refusal(arguments: dict[str, Any]) -> str | None:
    """Why a step that is called like this cannot be carried, or None."""
    m, x = arguments.get("model_output"), arguments.get("sample")
    if not isinstance(m, torch.Tensor) or not isinstance(x, torch.Tensor):
        return "the scheduler's step is not handed tensors as model_output and sample"
    if m.shape != x.shape:
        shapes = f"{tuple(m.shape)} where the latents are {tuple(x.shape)}"
        if m.ndim > 1 and (m.shape[0], m.shape[1] // 2, *m.shape[2:]) == tuple(x.shape):
            return (
                f"the denoiser predicts the variance of the noise too, {shapes}: with a scheduler "
                "of variance_type='fixed_small' it runs in parallel"
            )
        return f"the model output has another shape, {shapes}"
    for name, value in arguments.items():
        known = name in _STEP_TENSORS or name == tokens.NAME or value is m
        if not known and isinstance(value, torch.Tensor) and value.numel() > 1:
            return f"step is handed a tensor as {name!r}"
    return None


class Latent:
    """Of one call of step in the first iteration, to be made before that runs; by then it is known
    what the denoiser was shown, in `shown`, and how the scheduler's generator will draw.
    """

    def __init__(
        self,
        scheduler: Any,
        arguments: dict[str, Any],
        timesteps: Any,
        shown: Sequence[torch.Tensor],
        generator: Any,
        before: Sequence[Latent],
    ) -> None:
        x, m = arguments["sample"], arguments["model_output"]
        self.scheduler, self.shape = scheduler, tuple(x.shape)
        self.device, self.m_dtype = x.device, m.dtype
        self.begins = x.detach().clone(), m.detach().clone()
        self.by_token = tokens.are_given(arguments)
        if self.by_token:
            shares = tokens.shares(scheduler, arguments)
            self.begins = self.begins[0], tokens.in_rows_measure(self.begins[1], shares)
        self.taken_back = False
        self.result: Any = None  # what that step returned
        self._previous: torch.Tensor | None = None  # the sample that the last one did
        self._previous_is_next: bool | None = None  # and the next step was handed, so far
        kwargs = {k: v for k, v in arguments.items() if k not in (*_STEP_TENSORS[:3], tokens.NAME)}
        outputs = tuple(name for name, value in kwargs.items() if value is m)
        kwargs = {k: v for k, v in kwargs.items() if k not in outputs}
        self.traced: Traced = trace_rows(
            scheduler, timesteps, step_kwargs=kwargs, also_outputs=outputs
        )
        self.noise: NoiseAhead | None = None
        if self.traced.stochastic:
            self.noise = NoiseAhead(
                scheduler,
                timesteps,
                x.shape,
                x.dtype,
                x.device,
                arguments.get("generator", generator),
                kwargs,
                model_dtype=m.dtype,
                beside=next((one.noise for one in before if one.noise is not None), None),
            )
        seen = [(k, latent_in(given, self.shape)) for k, given in enumerate(shown)]
        found = [(k, one) for k, one in seen if one is not None and is_rounded(x, one)]
        self._shown_at = found[0][0] if found else None  # None: in none of them
        self._dtype = self._finest = x.dtype
        if found and found[0][1].dtype.itemsize < x.dtype.itemsize:
            if torch.equal(found[0][1].to(x.dtype), x):
                self._finest = found[0][1].dtype

    @property
    def dtype(self) -> torch.dtype:
        """How finely the host keeps it, in which guesses travel and drift is measured.

        Some begin in float32 and go on in the model's dtype, others hand step a wider copy of what
        the denoiser is shown.
        """
        stepped = sample_in(self.result)
        if stepped is not None and stepped.dtype.itemsize < self._dtype.itemsize:
            return stepped.dtype
        return self._finest

    @property
    def keeps(self) -> bool:
        """Whether its scheduler draws noise, or remembers samples or outputs."""
        traced = self.traced
        return traced.stochastic or bool(traced.a[:, 1:].any() or traced.b[:, 1:].any())

    def stepped(self, result: Any) -> None:
        self._previous = sample_in(result)

    def coming(self, shown: Sequence[torch.Tensor], edited: bool) -> torch.Tensor | None:
        """The sample that the next step will be handed, as far as can be told now.

        What the last step returned, if the input agrees; the input itself where the host edited or
        cast it. Where the input shows no latent, what the last step returned, as long as that has
        always been the next sample. The step hook sees the sample itself and corrects what was
        wrong here.
        """
        previous, found = self._previous, self._shown_in(shown)
        if found is None:
            trusted = self._previous_is_next is not False and not edited
            seen = previous is not None and tuple(previous.shape) == self.shape
            return previous if trusted and seen else None
        if previous is None or self._previous_is_next is False or not is_rounded(previous, found):
            return found
        return previous

    def _shown_in(self, shown: Sequence[torch.Tensor]) -> torch.Tensor | None:
        if self._shown_at is None:
            return None
        first = shown[self._shown_at : self._shown_at + 1]
        found = (latent_in(given, self.shape) for given in (*first, *shown))
        return next((latent for latent in found if latent is not None), None)

    def was_handed(self, x: torch.Tensor) -> None:
        """A step got this sample, which is not what `coming` gave, and no callback's edit."""
        if self._previous is not None:
            self._previous_is_next = is_rounded(self._previous, x)

    def is_finite(self) -> bool:
        """NaN equals nothing, itself included."""
        return self._previous is None or bool(torch.isfinite(self._previous).all())


class Latents:
    """Those of an iteration, as one point. Raises Apart where they are none.

    `first`: one for each call of step in the first iteration of the pipe's loop; `copies`: of its
    scheduler, which were set up for the loop.
    """

    def __init__(self, first: Sequence[Latent], pipe: Any, copies: Sequence[Any]) -> None:
        self.calls = list(first)
        self.all = [latent for latent in first if not latent.taken_back]
        _check(self.calls, self.all)
        if _take_turns(self.calls, pipe, copies):
            raise Apart("its schedulers step in turn, not all of them in every iteration")
        self.form = Iteration(
            [latent.result for latent in first],
            [not latent.taken_back for latent in first],
            [latent.by_token for latent in self.all],
            [latent.shape for latent in self.all],
        )
        self.traced = self.all[0].traced
        self._drawn = self._given = 0  # steps whose noise is known, and those it was given for
        self._unseen = 0  # iterations whose latents could not be told
        self._dtype = widest(latent.dtype for latent in self.all)
        self.m_dtype = widest(latent.m_dtype for latent in self.all)
        for latent in self.all:
            latent.stepped(latent.result)

    def __len__(self) -> int:
        """Steps of the loop."""
        return len(self.traced)

    def point(self, xs: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.form.joined(xs, self._dtype)

    def output(self, ms: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.form.joined(ms, widest(m.dtype for m in ms))

    def first(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The point and the output of the first iteration, which are let go with that."""
        xs, ms = zip(*(latent.begins for latent in self.all))
        for latent in self.calls:
            del latent.begins
        return self.point(xs), self.output(ms)

    def coming(self, shown: Sequence[torch.Tensor], edited: bool) -> list[torch.Tensor] | None:
        """The samples that the next steps will be handed; None where one cannot be told."""
        found = [latent.coming(shown, edited) for latent in self.all]
        known = [x for x in found if x is not None]
        self._unseen += len(known) < len(found)
        return known if len(known) == len(found) else None

    def why_unseen(self) -> str | None:
        """Why the coming ones cannot be told, where that has been so too often."""
        if self._unseen <= _UNSEEN:
            return None
        if not all(one.is_finite() for one in self.all):
            return "the pipeline's own latents hold NaN or Inf"
        return "the latents cannot be seen in the denoiser's input"

    def noise_ahead(self, step: int, horizon: int) -> Iterator[tuple[int, torch.Tensor]]:
        """What steps before `horizon` will add, of this one or later and not given before: drawn
        ahead by clones of the generators, in the host's order.
        """
        if not self._draws:
            return
        for latent in self.all:
            if latent.noise is not None:
                latent.noise.release(step)
        for coming in range(max(self._given, step), horizon):
            drawn = self._noise(coming)
            if drawn is not None:
                yield coming, drawn
        self._given = max(self._given, horizon)

    def _noise(self, step: int) -> torch.Tensor | None:
        some: list[torch.Tensor] = []
        for each in range(min(self._drawn, step), step + 1):
            drawn = [latent.noise.noise(each) for latent in self.all if latent.noise is not None]
            some = [noise for noise in drawn if noise is not None]
        self._drawn = max(self._drawn, step + 1)
        return self.point(some) if some and len(some) == len(self.all) else None

    @property
    def _draws(self) -> bool:
        return any(latent.noise is not None for latent in self.all)

    def why_unlike(self, call: int, scheduler: Any, taken_back: bool, x: Any) -> str | None:
        """What makes a call of step unlike that of the first iteration, or None. `taken_back`:
        the one before it was.
        """
        if call >= len(self.calls) or scheduler is not self.calls[call].scheduler:
            return "two steps of a scheduler in one iteration, and not in each"
        if call > 0 and taken_back != self.calls[call - 1].taken_back:
            return "a step is taken back in some iterations, and not in each"
        latent = self.calls[call]
        if not latent.taken_back and tuple(x.shape) != latent.shape:
            return f"the latents became {tuple(x.shape)} where they were {latent.shape}"
        return None


def _take_turns(calls: Sequence[Latent], pipe: Any, copies: Sequence[Any]) -> bool:
    """Whether copies of the scheduler may step later that have not in the first iteration, as
    where a video's frames follow one another: none do where the pipeline has as many iterations as
    one of them has steps.
    """
    stepping = [id(latent.scheduler) for latent in calls]
    if id(pipe.scheduler) in stepping or all(id(copy) in stepping for copy in copies):
        return False
    return iterations_of(pipe) != len(calls[0].traced)


def _check(calls: Sequence[Latent], kept: Sequence[Latent]) -> None:
    if len({id(latent.scheduler) for latent in kept}) < len(kept):
        raise Apart("two steps of a scheduler in one iteration")
    if len({latent.device for latent in kept}) > 1:
        raise Apart("the latents of an iteration are on several devices")
    if any(latent.keeps for latent in calls) and len(calls) > len(kept):
        raise Apart("a step is taken back, of a scheduler that draws noise or keeps outputs")
    if any(latent.keeps and latent.by_token for latent in kept):
        raise Apart("tokens have timesteps of their own, and the scheduler draws or keeps outputs")
    if not all(latent.traced.is_same(kept[0].traced) for latent in kept):
        raise Apart("two schedulers step in one iteration, from different noise levels")
