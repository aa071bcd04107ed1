"""A follower's side of a pipeline call: a replica's own loop, led from step to step by the core.

The replica enters the pipeline's own `__call__`. It evaluates step 0 on its own first latent, which
the leader verifies; after that its `step` hook hands the loop the point it is to evaluate and skips
the iterations before it. Nothing is stepped, encoded or decoded here.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from . import _core
from .api import describe
from .call import Call, GoBack, Leave
from .leading import ENCODER_CALLS
from .noise import Draws, cloned_generator
from .replicas import denoisers_of, encoders_of
from .seam import Hooks, Outputs, main_input, map_tensors, same_bits


class Stepped(tuple):
    """What a replica's step returns: the next point, as a tuple or as an output object."""

    @property
    def prev_sample(self) -> Any:
        return self[0]

    @property
    def pred_original_sample(self) -> Any:
        return self[1]


class Following:
    """Hooks on one replica for one call, and the thread's body."""

    def __init__(self, replica: Any, rank: int, call: Call, device: torch.device) -> None:
        self.replica, self.rank, self.call, self.device = replica, rank, call, device
        self._outputs = Outputs()
        self._target = 0  # the step to evaluate next
        self._point: torch.Tensor | None = None  # where; None at step 0, which has its own latent
        self._end: _core.Follower | None = None
        self._restart()

    def run(self, arguments: dict[str, Any], random: torch.Generator) -> None:
        """Follows until the run is over; whatever goes wrong is told to the leader.

        `random` draws in place of torch's global generator, which is the leader's alone.
        """
        try:
            while self._enter(arguments, random):
                self._restart()
        except Leave:
            pass
        except _core.AbandonedError:
            pass
        except BaseException as error:
            self.call.fail(self.rank, describe(error))

    def _restart(self) -> None:
        self._step = 0
        self._ordinals: dict[int, int] = defaultdict(int)
        self._encoded: dict[tuple[str, str], int] = defaultdict(int)
        self._began_ns = 0

    def _enter(self, arguments: dict[str, Any], random: torch.Generator) -> bool:
        """Runs the pipeline's call; True where it is to be entered again."""
        hooks = Hooks()
        own = dict(arguments)
        if "generator" in own:
            own["generator"] = cloned_generator(own["generator"])
        self._private = Draws(lambda device: random, lambda drawn: drawn)
        try:
            self._place(hooks)
            with self._private:
                self.replica(**own)
        except GoBack:
            return True
        finally:
            hooks.restore()
        raise RuntimeError("the replica's loop ended before the leader's")

    def _place(self, hooks: Hooks) -> None:
        for module in denoisers_of(self.replica).values():
            hooks.wrap(module, "forward", self._forward_of(module))
        for name, module in encoders_of(self.replica).items():
            for method in ENCODER_CALLS:
                if hasattr(module, method):
                    hooks.wrap(module, method, self._replay_of((name, method)))
        hooks.wrap_method(self.replica.scheduler, "step", self._step_hook)

    def _replay_of(self, key: tuple[str, str]) -> Any:
        def hook(original: Any, *args: Any, **kwargs: Any) -> Any:
            ordinal = self._encoded[key]
            self._encoded[key] += 1
            output = self.call.encoded(key, ordinal)
            return map_tensors(lambda tensor: tensor.to(self.device), output)

        return hook

    @contextlib.contextmanager
    def _public(self) -> Iterator[None]:
        """The denoiser itself runs without the watch over random draws, which costs time a call."""
        self._private.__exit__(None, None, None)
        try:
            yield
        finally:
            self._private.__enter__()

    def _forward_of(self, module: torch.nn.Module) -> Any:
        def hook(original: Any, *args: Any, **kwargs: Any) -> Any:
            ordinal, given = self._ordinals[id(module)], main_input(args, kwargs)
            self._ordinals[id(module)] += 1
            if self._step != self._target:
                fake = self._outputs.fake(module, ordinal, given)
                if fake is not None:
                    return fake
            elif self._began_ns == 0:
                self._began_ns = _core.now_ns()
            with self._public():
                output = original(*args, **kwargs)
            if self._step == 0:
                self._outputs.keep(module, ordinal, given, output)
            return output

        return hook

    def _step_hook(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(("model_output", "timestep", "sample"), args)) | kwargs
        if "old_pred_original_sample" in original.__func__.__code__.co_varnames[:4]:
            names = (
                "model_output",
                "old_pred_original_sample",
                "timestep",
                "timestep_back",
                "sample",
            )
            named = dict(zip(names, args)) | kwargs
        if self._step == self._target:
            self._submit(named["model_output"], named["sample"])
            self._take_work()
        self._step += 1
        self._ordinals.clear()
        self._count_step(scheduler, named["timestep"])
        if self._target < self._step:
            raise GoBack
        assert self._point is not None
        return Stepped((self._point, self._point))

    def _submit(self, m: torch.Tensor, sample: torch.Tensor) -> None:
        if self._end is None:
            # The leader's message of step 0 tells its own first latent; ours was evaluated
            # meanwhile.
            self._end = self.call.follower(self.rank)
            self._take_work()
        assert self._point is not None
        moved = None
        if not same_bits(sample, self._point):
            moved = [sample.to(self._point.dtype).contiguous()]
        self._end.submit([m.detach()], moved, self._began_ns)

    def _take_work(self) -> None:
        assert self._end is not None
        work = self._end.next()
        if work is None:
            raise Leave
        self._target, point = work[0]
        self._point = point.to(self.device)
        self._began_ns = 0

    @staticmethod
    def _count_step(scheduler: Any, timestep: Any) -> None:
        """Moves the scheduler's own counter on, which scale_model_input and sigmas are read by."""
        if not hasattr(scheduler, "_step_index"):
            return
        if scheduler._step_index is None:
            scheduler._init_step_index(timestep)
        scheduler._step_index += 1
