"""Draws a stochastic scheduler's coming noise ahead of it, without touching its generator.

Guesses of a sampler that adds noise in `step` need the very noise that the host will draw. A copy
of the scheduler is stepped on zeros with a clone of the host's generator: what it returns is c z.
Used by the diffusers adapter, for guesses alone: wrong noise costs speed, never the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .draws import Draws, cloned_generator, cloned_global_generator
from .program import Traced, trace_rows
from .schedulers import Stepper, fresh_copy, loop_timesteps


class NoiseAhead:
    """The noise that a host's scheduler is going to add, step by step.

    To be made when the loop's first `step` is about to be called: from then on the host draws from
    its generator in `step` alone, or the noise told here is not the host's. Draws are made in the
    host's order and as late as they are asked for; the host's generator is only read, once.

    Args:
        scheduler: as for `trace_rows`; it is copied, history left out.
        timesteps: (N,), what the loop hands to `step`.
        shape, dtype, device: of the sample handed to `step`.
        generator: the host's generator, or list of them; None: torch's global ones.
        step_kwargs: further arguments of `step` (`eta`, ...).
        model_dtype: of the model output handed to `step`, where it is not `dtype`: many schedulers
            draw in it, and other dtypes give other numbers.
        beside: that of another sample which is stepped before this one in each iteration, and
            draws from the same generators; both are to be asked in the loop's order.
    """

    def __init__(
        self,
        scheduler: Any,
        timesteps: torch.Tensor | Sequence[Any],
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        generator: torch.Generator | list[torch.Generator] | None = None,
        step_kwargs: Mapping[str, Any] | None = None,
        *,
        model_dtype: torch.dtype | None = None,
        beside: NoiseAhead | None = None,
    ) -> None:
        self.traced: Traced = trace_rows(scheduler, timesteps, step_kwargs=step_kwargs)
        self.reason: str | None = self.traced.reason  # why there is no noise, or no more
        self._shape = tuple(shape)
        self._dtypes = (model_dtype or dtype, dtype)
        self._device = torch.device(device)
        self._held: dict[int, torch.Tensor] = {}
        self._drawn: list[torch.Tensor] = []
        self._next = 0
        if not self.traced.stochastic or self.reason is not None:
            return
        own = fresh_copy(scheduler)
        loop = loop_timesteps(own, timesteps).to(own.timesteps.device)
        if beside is None:
            self._clones = [(generator, cloned_generator(generator))]
            self._global = {"cpu": cloned_global_generator(torch.device("cpu"))}
            self._global[str(self._device)] = cloned_global_generator(self._device)
        else:
            self._clones, self._global = beside._clones, beside._global
        found = [clone for host, clone in self._clones if host is generator]
        if not found:
            found = [cloned_generator(generator)]
            self._clones.append((generator, found[0]))
        self._stepper = Stepper(own, loop, step_kwargs, found[0])

    def noise(self, j: int) -> torch.Tensor | None:
        """c_j z_j as step j of the host will add it, of the sample's shape; owned by this object.

        None where the step adds none, where it has been released, or where it cannot be told
        (`reason` says why).
        """
        while self._next <= j < len(self.traced) and self.traced.stochastic and not self.reason:
            self._advance()
        return self._held.get(j)

    def release(self, j: int) -> None:
        """Forgets the noise of the steps before j."""
        for step in [k for k in self._held if k < j]:
            del self._held[step]

    def _advance(self) -> None:
        j, self._next = self._next, self._next + 1
        self._drawn.clear()
        output, sample = (
            torch.zeros(self._shape, dtype=d, device=self._device) for d in self._dtypes
        )
        try:
            with torch.inference_mode(False), torch.no_grad(), Draws(self._replacement, self._keep):
                added = self._stepper(output, sample)
                if self.traced.carries_noise:
                    added = self._weighted(j, sample)
        except Exception as error:
            self.reason = f"noise cannot be drawn ahead: {error}"
            return
        if self.traced.c[j] != 0:
            self._held[j] = added

    def _weighted(self, j: int, sample: torch.Tensor) -> torch.Tensor:
        """The draws by the trace's weights, where the step's result shows earlier noise as well."""
        draws = torch.cat(self._drawn).reshape(-1, *self._shape)  # generator lists draw by items
        weights = torch.tensor(self.traced.noise_weights[j], dtype=torch.float64)
        total = torch.zeros_like(sample, dtype=torch.promote_types(sample.dtype, torch.float32))
        for weight, draw in zip(weights.tolist(), draws):
            total += weight * draw
        return total.to(sample.dtype)

    def _keep(self, value: torch.Tensor) -> torch.Tensor:
        self._drawn.append(value)
        return value

    def _replacement(self, device: torch.device) -> torch.Generator:
        return self._global[device.type if device.type == "cpu" else str(self._device)]
