"""What the first iteration of a loop shows, before there is a run: which latents its steps are
handed, where the denoisers are shown them, how they are stepped, and whether that can be carried.
"""

from __future__ import annotations

from typing import Any

import torch

from ... import _core
from ...messages import describe
from ..arguments import loop_times
from ..latents import Latent, Latents, refusal

_GRADIENTS = "the pipeline takes gradients through the denoiser"


class Opening:
    """Of the loop at hand. `generator`: the one that the call was given, if any."""

    def __init__(self, pipe: Any, generator: Any) -> None:
        self.pipe, self._generator = pipe, generator
        self._gradients = False  # on in the denoisers' calls
        self.begin()

    def begin(self) -> None:
        """Nothing is known of the loop to come."""
        self.latents: list[Latent] = []  # of its first iteration's calls of step
        self.copies: list[Any] = []  # of the scheduler, that were set up for the loop
        self.scaled: torch.Tensor | None = None  # what scale_model_input was given
        self.began_ns = 0
        self._shown: list[torch.Tensor] = []  # inputs of the first denoiser call

    def shown(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Where an iteration's latents may be seen: `inputs` are the first denoiser call's."""
        return inputs if self.scaled is None else [self.scaled, *inputs]

    def iterate(self, shown: list[torch.Tensor]) -> None:
        """The first iteration begins."""
        self._shown, self.began_ns = shown, _core.now_ns()

    def why_gradients(self, step: int) -> str | None:
        """A denoiser is called with gradients on. With those on in its call and off in step,
        something is made of them: then why that cannot be carried.
        """
        self._gradients = self._gradients or step == 0
        return None if self._gradients else _GRADIENTS

    def look(self, scheduler: Any, arguments: dict[str, Any], called: bool) -> str | None:
        """Before a step: why the loop cannot be carried, or None. `called`: a denoiser was, since
        the step before.
        """
        reason = refusal(arguments) or self._why_not(called)
        if reason is not None:
            return reason
        try:
            timesteps = loop_times(self.pipe, scheduler, arguments["timestep"])
            given = (scheduler, arguments, timesteps, self._shown, self._generator)
            self.latents.append(Latent(*given, self.latents))
        except Exception as error:  # a class of the user's own may do anything on a trace
            return f"the scheduler cannot be traced: {describe(error)}"
        return None

    def _why_not(self, called: bool) -> str | None:
        if not called and not self.latents:
            return "the scheduler stepped before a denoiser was called"
        if self._gradients and not torch.is_grad_enabled():
            return _GRADIENTS
        return None

    def take_back(self) -> None:
        """The last step was for its prediction alone."""
        if self.latents:
            self.latents[-1].taken_back = True

    def stepped(self, result: Any) -> bool:
        """Whether that was a step of the loop's last iteration too."""
        if not self.latents:
            return False
        if self.latents[-1].result is None:
            self.latents[-1].result = result
        return len(self.latents[0].traced) == 1

    def end(self) -> Latents:
        """All of them as one point; raises Apart where they are none."""
        self._shown = []
        return Latents(self.latents, self.pipe, self.copies)
