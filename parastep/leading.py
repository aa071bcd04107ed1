"""The leader's side of a pipeline call: the pipeline's own loop, its model calls answered by the
core.

The pipeline runs unchanged. At its first denoiser call of an iteration the core is asked with the
latent that the loop is about to use; where it answers, the denoisers are skipped and the
scheduler's own `step` gets the answer on the pipeline's own sample. Whatever cannot be carried so
runs as it would without us, and the reason is kept for the report.
"""

from __future__ import annotations

import inspect
import time
import weakref
from typing import Any

import torch

from . import _core
from .api import describe
from .call import Call
from .noise import NoiseAhead
from .replicas import denoisers_of, encoders_of
from .seam import Hooks, Outputs, latent_in, main_input, same_bits
from .tracing import trace_rows

ENCODER_CALLS = ("forward", "encode", "get_text_features", "get_image_features")


class Watch:
    """Notices when an input that was the same in every iteration is another one in this.

    Followers evaluate with the inputs that they began with: a callback that puts new embeddings in,
    or edits them in place, makes another function of the denoiser (DESIGN 2.1).
    """

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[Any, Any, int]] = {}

    def changed(self, key: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
        """The name of a changed input, or None: tensors by identity and version, else by value."""
        found = None
        for name, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, torch.Tensor):
                mark: Any = 0 if value.is_inference() else value._version
            elif isinstance(value, (int, float, bool)):
                mark = value
            else:
                continue
            kept, last, times = self._seen.get((key, name), (None, None, 0))
            # A reference keeps no temporary alive, and tells a new tensor at an old one's address.
            is_tensor = isinstance(value, torch.Tensor)
            same = mark == last and (not is_tensor or (kept is not None and kept() is value))
            if not same and times > 1:
                found = str(name)
            self._seen[key, name] = (
                weakref.ref(value) if is_tensor else None,
                mark,
                times + 1 if same else 0,
            )
        return found


class Leading:
    """Hooks on the user's pipeline for one call."""

    def __init__(self, pipe: Any, call: Call, generator: Any, options: dict[str, Any]) -> None:
        self.pipe, self.call, self.options = pipe, call, options
        self.generator = generator
        self.leader: _core.Leader | None = None
        self.active = True  # the core is asked
        self.reason: str | None = None  # why it is not any more
        self.steps = 0  # calls of the scheduler's step so far
        self.evaluated = 0  # those whose denoisers ran
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
        for module in denoisers_of(self.pipe).values():
            hooks.wrap(module, "forward", self._forward_of(module))
        for name, module in encoders_of(self.pipe).items():
            for method in ENCODER_CALLS:
                if hasattr(module, method):
                    hooks.wrap(module, method, self._recording((name, method)))
        scheduler = self.pipe.scheduler
        hooks.wrap_method(scheduler, "step", self._step)
        if hasattr(scheduler, "set_timesteps"):
            hooks.wrap_method(scheduler, "set_timesteps", self._set_timesteps)
        if hasattr(scheduler, "scale_model_input"):
            hooks.wrap_method(scheduler, "scale_model_input", self._scale)

    def give_up(self, reason: str) -> None:
        """From here on the pipeline runs as it would without us."""
        if self.active:
            self.active, self.reason = False, reason
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
            if self.active and self.steps > 0 and ordinal > 0:
                self._check_inputs(module, ordinal, args, kwargs)
            if self._answer is not None:
                fake = self._outputs.fake(module, ordinal, given)
                if fake is not None:
                    return fake
            output = original(*args, **kwargs)
            if self.steps == 0 and self.active:
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
        if self.active and self.steps > 0:
            self._check_inputs(module, 0, args, kwargs)
        if not self.active or self.leader is None:
            return
        x = self._coming_latent(given)
        if x is None:
            self._unseen += 1
            if self._unseen > 2:
                self.give_up("the latents cannot be seen in the denoiser's input")
            return
        self._unseen = 0
        self._give_noise()
        answer = torch.empty(self._shape, dtype=self._like.dtype, device=self._like.device)
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

    def _set_timesteps(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self.steps > 0 and scheduler is self.pipe.scheduler:
            self.give_up("the pipeline runs a second sampling loop in one call")
        return original(*args, **kwargs)

    def _scale(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler is self.pipe.scheduler and self._scaled is None:
            self._scaled = args[0] if args else kwargs.get("sample")
        return original(*args, **kwargs)

    def _step(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self.active or self._answer is not None:
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
        if scheduler is not self.pipe.scheduler:
            return result  # a copy that steps something else, sound beside video
        self.steps += 1
        self.evaluated += self._answer is None
        self._fresh, self._scaled, self._answer = True, None, None
        previous = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        self._previous = previous if isinstance(previous, torch.Tensor) else None
        return result

    def _refusal(self, scheduler: Any, arguments: dict[str, Any]) -> str | None:
        """Why the first step shows that this loop cannot be carried, or None."""
        m, x = arguments.get("model_output"), arguments.get("sample")
        if not isinstance(m, torch.Tensor) or not isinstance(x, torch.Tensor):
            return "the scheduler's step is not handed tensors as model_output and sample"
        if m.shape != x.shape:
            shapes = f"{tuple(m.shape)} where the latents are {tuple(x.shape)}"
            return f"the model output has another shape, {shapes}"
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
        """The first step: shapes and dtypes are known, the leader's output is there. Begins the
        run.
        """
        reason = self._refusal(scheduler, arguments)
        if reason is not None:
            self.give_up(reason)
            return
        m, x = arguments["model_output"], arguments["sample"]
        timesteps = self._timesteps(scheduler, arguments["timestep"])
        step_kwargs = {
            k: v for k, v in arguments.items() if k not in ("model_output", "sample", "timestep")
        }
        try:
            traced = trace_rows(scheduler, timesteps, step_kwargs=step_kwargs)
        except Exception as error:  # a class of the user's own may do anything on a trace
            self.give_up(f"the scheduler cannot be traced: {describe(error)}")
            return
        if traced.stochastic and self.call.ranks > 1:
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
        elif self.active:
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

    # ---- callbacks -------------------------------------------------------------------------------

    def watched(self, callback: Any) -> Any:
        """The user's callback, with a look at what it changes besides the latents.

        Followers go on with what they began with: another guidance scale or other embeddings end
        speculation. A callback of diffusers' own classes stays an instance of its class.
        """

        def watching(call: Any, *args: Any, **kwargs: Any) -> Any:
            before = self._settings()
            given = next((a for a in (*args, *kwargs.values()) if type(a) is dict), {})
            kept = {k: (v, _version(v)) for k, v in given.items() if k != "latents"}
            result = call(*args, **kwargs)
            after = result if isinstance(result, dict) else {}
            for name, (value, version) in kept.items():
                if after.get(name, value) is not value or _version(value) != version:
                    self.give_up(f"the callback changed {name}")
            changed = [k for k, v in self._settings().items() if before.get(k, v) != v]
            if changed:
                self.give_up(f"the callback changed {changed[0].strip('_')}")
            return result

        cls = type(callback)
        if inspect.isroutine(callback):
            return lambda *args, **kwargs: watching(callback, *args, **kwargs)

        def __call__(own: Any, *args: Any, **kwargs: Any) -> Any:
            return watching(super(watching_class, own).__call__, *args, **kwargs)

        watching_class = type(cls.__name__, (cls,), {"__call__": __call__})
        twin = object.__new__(watching_class)
        twin.__dict__ = callback.__dict__  # one state: what the callback counts, it counts itself
        return twin

    def _settings(self) -> dict[str, Any]:
        """The numbers among the pipeline's own attributes: guidance scales and the like."""
        own = vars(self.pipe)
        numbers = {k: v for k, v in own.items() if isinstance(v, (int, float, bool, str))}
        numbers.pop("_interrupt", None)
        numbers.pop("_current_timestep", None)
        return numbers


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None
