"""The leader's side of a pipeline call: the pipeline's own loop, its model calls answered by the core.

The pipeline runs unchanged. At its first denoiser call of an iteration the core is asked with the
latent that the loop is about to use; where it answers, the denoisers are skipped and the scheduler's
own `step` gets the answer on the pipeline's own sample. Whatever cannot be carried so runs as it would
without us, and the reason is kept for the report.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch

from . import _core
from .call import Call
from .noise import NoiseAhead
from .replicas import denoisers_of, encoders_of
from .seam import Hooks, Outputs, latent_in, main_input, map_tensors, same_bits
from .tracing import trace_rows

ENCODER_CALLS = ("forward", "encode", "get_text_features", "get_image_features")


class Watch:
    """Notices when an input that was the same in every iteration is another one in this.

    Followers evaluate with the inputs that they began with: a callback that puts new embeddings in, or
    edits them in place, makes another function of the denoiser (DESIGN 2.1).
    """

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[Any, int]] = {}

    def changed(self, key: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
        """The name of a changed input, or None."""
        found = None
        for name, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, torch.Tensor):
                mark: Any = (id(value), 0 if value.is_inference() else value._version)
            elif isinstance(value, (int, float, bool)):
                mark = value
            else:
                continue
            last, times = self._seen.get((key, name), (mark, 0))
            if mark != last and times > 2:
                found = str(name)
            self._seen[key, name] = (mark, times + 1 if mark == last else 0)
        return found


class Leading:
    """Hooks on the user's pipeline for one call."""

    def __init__(self, pipe: Any, call: Call, generator: Any, options: dict[str, Any]) -> None:
        self.pipe, self.call, self.options = pipe, call, options
        self.generator = generator
        self.leader: _core.Leader | None = None
        self.reason: str | None = None  # why the core is not asked any more
        self.steps = 0  # calls of the scheduler's step so far
        self.opened = 0.0  # seconds from the call's beginning to the run's
        self._began = time.perf_counter()
        self._outputs, self._watch = Outputs(), Watch()
        self._fresh = True  # no denoiser call yet since the last step
        self._ordinals: dict[int, int] = {}
        self._scaled: torch.Tensor | None = None
        self._previous: torch.Tensor | None = None
        self._previous_is_next: bool | None = None
        self._asked: torch.Tensor | None = None
        self._answer: torch.Tensor | None = None
        self._unseen = 0
        self._forward_ns = 0
        self._like: torch.Tensor | None = None  # a model output, for its dtype and device
        self._noise: NoiseAhead | None = None
        self._noise_given = 0
        self._dtype = torch.float32

    def place(self, hooks: Hooks) -> None:
        for name, module in denoisers_of(self.pipe).items():
            hooks.wrap(module, "forward", self._forward_of(module))
        for name, module in encoders_of(self.pipe).items():
            for method in ENCODER_CALLS:
                if hasattr(module, method):
                    hooks.wrap(module, method, self._recording((name, method)))
        scheduler = self.pipe.scheduler
        hooks.wrap_method(scheduler, "step", self._step)
        if hasattr(scheduler, "scale_model_input"):
            hooks.wrap_method(scheduler, "scale_model_input", self._scale)

    def give_up(self, reason: str) -> None:
        """From here on the pipeline runs as it would without us."""
        if self.reason is None:
            self.reason = reason
            if self.leader is not None:
                self.leader.stop(reason)

    # ---- encoders --------------------------------------------------------------------------------

    def _recording(self, key: tuple[str, str]) -> Any:
        def hook(original: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if self.steps == 0:
                self.call.tell_encoded(key, output)
            return output

        return hook

    # ---- denoisers -------------------------------------------------------------------------------

    def _forward_of(self, module: torch.nn.Module) -> Any:
        def hook(original: Any, *args: Any, **kwargs: Any) -> Any:
            given = main_input(args, kwargs)
            if self._fresh:
                self._begin_iteration(module, given, args, kwargs)
            ordinal = self._ordinals.get(id(module), 0)
            self._ordinals[id(module)] = ordinal + 1
            if self.reason is None and self.steps > 0 and ordinal > 0:
                self._check_inputs(module, ordinal, args, kwargs)
            if self._answer is not None:
                fake = self._outputs.fake(module, ordinal, given)
                if fake is not None:
                    return fake
            output = original(*args, **kwargs)
            if self.steps == 0 and self.reason is None:
                self._outputs.keep(module, ordinal, given, output)
            return output

        return hook

    def _check_inputs(self, module: Any, ordinal: int, args: Any, kwargs: dict[str, Any]) -> None:
        name = self._watch.changed((id(module), ordinal), args, kwargs)
        if name is not None:
            self.give_up(f"input {name!r} of the denoiser was changed in mid-run (a callback?)")

    def _begin_iteration(
        self, module: Any, given: torch.Tensor | None, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """The first denoiser call since the last step: the moment to ask."""
        self._fresh, self._answer, self._asked = False, None, None
        self._ordinals.clear()
        self._forward_ns = _core.now_ns()
        if self.reason is None and self.steps > 0:
            self._check_inputs(module, 0, args, kwargs)
        if self.reason is not None or self.leader is None:
            return
        x = self._coming_latent(given)
        if x is None:
            self._unseen += 1
            if self._unseen > 2:
                self.give_up("the latents cannot be seen in the denoiser's input")
            return
        self._unseen = 0
        self._give_noise()
        answer = torch.empty_like(self._like)
        self._asked = x
        if self.leader.ask(self.steps, x, answer):
            self._answer = answer

    def _coming_latent(self, given: torch.Tensor | None) -> torch.Tensor | None:
        """The sample that the next step will be handed, as far as can be told now.

        What the last step returned, if the input agrees; the input itself where the host edited or
        cast it. The step hook sees the sample itself and corrects what was wrong here.
        """
        previous = self._previous
        found = latent_in(self._scaled if self._scaled is not None else given, self._shape)
        if found is None or previous is None:
            return None
        same = previous.shape == found.shape and torch.equal(previous.to(found.dtype), found)
        if self._previous_is_next is None:
            self._previous_is_next = previous.dtype == self._dtype
        chosen = previous if same and self._previous_is_next else found
        return chosen.to(self._dtype).contiguous()

    def _give_noise(self) -> None:
        """Noise of the steps that the next guesses may pass, drawn ahead by a clone."""
        if self._noise is None or self.leader is None:
            return
        self._noise.release(self.steps)
        for step in range(max(self._noise_given, self.steps), self.leader.horizon):
            drawn = self._noise.noise(step)
            if drawn is not None:
                self.leader.noise(step, drawn.to(self._dtype))
        self._noise_given = max(self._noise_given, self.leader.horizon)

    # ---- scheduler -------------------------------------------------------------------------------

    def _scale(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler is self.pipe.scheduler and self._scaled is None:
            self._scaled = args[0] if args else kwargs.get("sample")
        return original(*args, **kwargs)

    def _step(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self.reason is None:
            try:
                bound = inspect.signature(original).bind(*args, **kwargs)
            except TypeError:
                return original(*args, **kwargs)  # raises what it would without us
            if self.steps == 0:
                self._open(scheduler, bound.arguments)
            else:
                self._turn(scheduler, bound.arguments)
            args, kwargs = bound.args, bound.kwargs
        result = original(*args, **kwargs)
        self.steps += 1
        self._fresh, self._scaled = True, None
        previous = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        self._previous = previous if isinstance(previous, torch.Tensor) else None
        return result

    def _refusal(self, scheduler: Any, arguments: dict[str, Any]) -> str | None:
        """Why the first step shows that this loop cannot be carried, or None."""
        m, x = arguments.get("model_output"), arguments.get("sample")
        if not isinstance(m, torch.Tensor) or not isinstance(x, torch.Tensor):
            return "the scheduler's step is not handed tensors as model_output and sample"
        if m.shape != x.shape:
            return f"the model output {tuple(m.shape)} has another shape than the latents {tuple(x.shape)}"
        if scheduler is not self.pipe.scheduler:
            return "the pipeline steps a copy of its scheduler"
        if self._fresh:
            return "the scheduler stepped before a denoiser was called"
        known = ("model_output", "sample", "timestep", "old_pred_original_sample", "timestep_back")
        for name, value in arguments.items():
            if name not in known and isinstance(value, torch.Tensor) and value.numel() > 1:
                return f"step is handed a tensor as {name!r}"
        return None

    def _open(self, scheduler: Any, arguments: dict[str, Any]) -> None:
        """The first step: shapes and dtypes are known, the leader's output is there. Begins the run."""
        reason = self._refusal(scheduler, arguments)
        if reason is not None:
            self.give_up(reason)
            return
        m, x = arguments["model_output"], arguments["sample"]
        timesteps = self._timesteps(scheduler, arguments["timestep"])
        step_kwargs = {
            k: v for k, v in arguments.items() if k not in ("model_output", "sample", "timestep")
        }
        traced = trace_rows(scheduler, timesteps, step_kwargs=step_kwargs)
        if traced.stochastic:
            self._noise = NoiseAhead(
                scheduler,
                timesteps,
                x.shape,
                x.dtype,
                x.device,
                arguments.get("generator", self.generator),
                step_kwargs,
                model_dtype=m.dtype,
            )
        self._like, self._shape, self._dtype = m, tuple(x.shape), x.dtype
        try:
            program = traced.program(noise_ahead=True)
            self.leader = _core.Leader(program, x, ranks=self.call.ranks, **self.options)
        except _core.Error as error:
            self.give_up(str(error))
            return
        self.opened = time.perf_counter() - self._began
        self.call.open(self.leader)
        self.leader.ask(0, x)
        self.leader.submit(m, self._forward_ns)

    def _timesteps(self, scheduler: Any, first: Any) -> Any:
        """What the loop will hand to step, by the scheduler's list from the first one on."""
        timesteps = scheduler.timesteps
        begin = getattr(scheduler, "_begin_index", None)
        if begin is None:
            matches = (timesteps == torch.as_tensor(first, device=timesteps.device)).nonzero()
            begin = int(matches[0]) if len(matches) else 0
        count = getattr(self.pipe, "_num_timesteps", None)
        left = timesteps[begin:]
        return left[:count] if isinstance(count, int) and 0 < count < len(left) else left

    def _turn(self, scheduler: Any, arguments: dict[str, Any]) -> None:
        """A later step: hands in the leader's output, or puts the answer in its place."""
        leader, m, x = self.leader, arguments["model_output"], arguments["sample"]
        assert leader is not None
        if scheduler is not self.pipe.scheduler or self._fresh:
            self.give_up("two steps of a scheduler in one iteration")
            return
        if tuple(x.shape) != self._shape or x.dtype != self._dtype:
            if self._answer is None and self._shape == tuple(x.shape):
                x = x.to(self._dtype)  # a host that changes its dtype after the first step
            else:
                self.give_up(f"the latents became {tuple(x.shape)} of {x.dtype} in mid-run")
        if self._answer is not None:
            self._check_answer(x)
            arguments["model_output"] = self._answer
        elif self.reason is None:
            self._hand_in(x, m)

    def _check_answer(self, x: torch.Tensor) -> None:
        """Measures and rebases on the sample that the step is really handed."""
        assert self.leader is not None and self._asked is not None
        if same_bits(x, self._asked) or tuple(x.shape) != self._shape:
            return
        self._learn(x)
        drift = self.leader.amend(x.contiguous(), self._answer)
        if not drift < self.options["tolerance"] and self.options["policy"] == "verified":
            self.give_up("the host edited the latents after the denoiser's call, beyond tolerance")

    def _hand_in(self, x: torch.Tensor, m: torch.Tensor) -> None:
        assert self.leader is not None
        x = x.contiguous()
        if self._asked is None:
            self.leader.ask(self.steps, x)
        elif not same_bits(x, self._asked):
            self._learn(x)
            self.leader.amend(x)
        try:
            self.leader.submit(m, self._forward_ns)
        except (_core.ShapeError, _core.DtypeError) as error:
            self.give_up(str(error))

    def _learn(self, x: torch.Tensor) -> None:
        """Whether the sample is what the last step returned, or what the denoiser was shown."""
        if self._previous is not None:
            self._previous_is_next = same_bits(x, self._previous.to(x.dtype))


def cloned_generator(generator: Any) -> Any:
    """Generators that will draw what these would draw next; None and others stay as they are."""
    if isinstance(generator, (list, tuple)):
        return [cloned_generator(one) for one in generator]
    if isinstance(generator, torch.Generator):
        clone = torch.Generator(generator.device)
        clone.set_state(generator.get_state())
        return clone
    return generator


def on_device(value: Any, device: torch.device) -> Any:
    return map_tensors(lambda tensor: tensor.to(device), value)
