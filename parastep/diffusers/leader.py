"""The leader's side of a pipeline call: the pipeline's own loop, its model calls answered by the
core.

The pipeline runs unchanged. At its first denoiser call of an iteration the core is asked with the
latent that the loop is about to use; where it answers, the denoisers are skipped and the
scheduler's own `step` gets the answer on the pipeline's own sample. Whatever cannot be carried so
runs as it would without us, and the reason is kept for the report.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .. import _core
from ..messages import describe
from ..options import Options
from ..speculation import CROWDED, Speculation, give_room, out_of_memory
from ..tracing.noise import NoiseAhead
from ..tracing.program import Traced, trace_rows
from .arguments import first_times, inputs_in, latent_in, named_arguments, sample_in
from .batching import LEADER
from .call import Call, Followers, Loop
from .forwards import Inputs
from .hooks import Hooks
from .listening import Listening
from .parts import denoisers_of
from .replicas import denoisers_print
from .skipping import Outputs
from .state import State, averages
from .teams import ALTERED
from .tensors import is_rounded, map_tensors, private
from .watch import Watch

_FEWEST = 16  # steps that a lane is worth its own check at step 0 for
_STEP_TENSORS = ("model_output", "sample", "timestep", "old_pred_original_sample", "timestep_back")


class _First(NamedTuple):
    """What the first step was handed, from before it ran."""

    m: torch.Tensor
    x: torch.Tensor
    traced: Traced


class Ended(NamedTuple):
    """A loop of the call that is over: its steps, seconds until it began, and the core's report."""

    steps: int
    opened: float
    report: dict[str, Any]


class Leader(Speculation):
    """Hooks on the user's pipeline for one call.

    Followers are started when the loop begins, before its first denoiser call, or after its first
    evaluation where that is to show whether the denoisers keep something (`state`); the lane after
    the first step, where steps ahead of the loop will be evaluated.
    """

    def __init__(
        self,
        pipe: Any,
        call: Call,
        followers: Sequence[Followers],
        generator: Any,
        options: Options,
        state: State,
    ) -> None:
        super().__init__()
        self.pipe, self.call, self.options, self.state = pipe, call, options, state
        self.generator, self._followers = generator, followers
        self.generators: Sequence[torch.Generator] = ()  # all among the call's arguments
        self.active = call.ranks > 1 or call.lane  # the core is asked
        self.team = call.team
        self.evaluated = 0  # steps whose denoisers ran
        self.submitted = 0  # and whose output the core took
        self.shared = 0  # and which were evaluated together with other ranks'
        self.loops: list[Ended] = []  # of this call that are over
        self.watch: Watch | None = None
        self.began = time.perf_counter()
        self._listening = Listening()
        self._started = self._lane_started = False  # followers are
        self._team_open = False
        self._fresh = True  # no denoiser call yet since the last step
        self._ordinals: dict[int, int] = {}
        self._gradients = False  # on in the denoisers' calls of the first iteration
        self._encodes = False  # in its loop
        self._begin()

    def _begin(self) -> None:
        """Nothing is known of the loop to come."""
        self.core = None
        self.steps = 0  # calls of the scheduler's step so far
        self.opened = 0.0  # seconds from the call's beginning to the run's
        self._outputs = Outputs()
        self._scheduler: Any = None  # the one that steps: the pipeline's own, or its copy of that
        self._scaled: torch.Tensor | None = None  # what scale_model_input was given
        self._previous: torch.Tensor | None = None  # what the last step returned
        self._returned: Any = None  # all of it, once the program's last step is done
        self._edited_before = False  # by a callback, between the last two steps
        self._previous_is_next: bool | None = None  # and the next step was handed, so far
        self._shown: list[torch.Tensor] = []  # inputs of the iteration's first denoiser call
        self._shown_at: int | None = None  # which of them is the latent; None where none is
        self._asked: torch.Tensor | None = None
        self._answer: torch.Tensor | None = None
        self._joins = False  # this iteration's evaluation is part of a batch
        self._unseen = 0
        self._forward_ns = 0
        self._m_dtype = self._dtype = torch.float32
        self._shape: tuple[int, ...] = ()
        self._length = 0  # steps of the program
        self._noise: NoiseAhead | None = None
        self._noise_given = 0

    def place(self, hooks: Hooks) -> None:
        """All hooks; where the pipeline runs alone from the start, only what counts its steps."""
        scheduler = self.pipe.scheduler
        hooks.wrap(scheduler, "step", self._step)
        if not self.active and self.team is None:
            return
        for name, module in denoisers_of(self.pipe).items():
            hooks.wrap_call(module, self._forward_of(name, module))
        if not self.active:
            return
        hooks.wrap_encoders(self.pipe, self._recording)
        if hasattr(scheduler, "set_timesteps"):
            hooks.wrap(scheduler, "set_timesteps", self._set_timesteps)
        if hasattr(scheduler, "scale_model_input"):
            hooks.wrap(scheduler, "scale_model_input", self._scale)

    def give_up(self, reason: str) -> None:
        if self.reason is None:
            self.active = False
            self._leave_batch()
        super().give_up(reason)

    def model_changed(self, reason: str) -> None:
        """Replicas are no longer what the user's modules are: nobody evaluates for the host."""
        self.call.dissolve(reason)
        self.settings_changed(reason)

    def settings_changed(self, reason: str) -> None:
        """Which followers cannot know of; helpers are handed what a forward is given."""
        if self.active:
            self.give_up(reason)

    def complete(self) -> None:
        """The pipeline returned. Denoiser calls without a step were those of another scheduler."""
        if self.active and self.steps == 0 and self._ordinals:
            self.evaluated = self.steps = max(self._ordinals.values())
            self.give_up("pipe.scheduler did not step: the pipeline used another one in its call")

    def finish(self) -> None:
        """The call is over, one way or another: followers leave."""
        self.state.close()
        if self.core is not None:
            self.core.finish()

    # ---- encoders --------------------------------------------------------------------------------

    def _recording(self, key: tuple[str, str]) -> Callable[..., Any]:
        module = getattr(self.pipe, key[0])

        def hook(original: Any, *args: Any, **kwargs: Any) -> Any:
            self._encodes = self._encodes or (self.steps > 0 and self._returned is None)
            if not self.active or (self.steps > 0 and self._why_last_loop() is not None):
                return original(*args, **kwargs)
            with self._listening.recorded(module) as heard:
                output = original(*args, **kwargs)
            self.call.tell_encoded(key, (output, heard))
            return output

        return hook

    # ---- denoisers -------------------------------------------------------------------------------

    def _forward_of(self, name: str, module: torch.nn.Module) -> Any:
        def hook(run: Any, *args: Any, **kwargs: Any) -> Any:
            if self.team is not None:
                run = functools.partial(self._share_out, self._fresh, name, run)
            if not self.active and self._answer is None:
                if self._fresh and self.steps == 0:
                    self._begin_loop()
                self._fresh = False
                if self.watch is not None:
                    self.watch.note_inputs(args, kwargs)
                return run(*args, **kwargs)
            inputs = inputs_in(args, kwargs)
            if torch.is_grad_enabled() and self._answer is None:
                self._take_gradient()
            first = self._fresh
            if first:
                self._begin_iteration(inputs)
            if self.watch is not None:
                self.watch.note_inputs(args, kwargs)
            ordinal = self._ordinals.get(id(module), 0)
            self._ordinals[id(module)] = ordinal + 1
            if self._answer is not None:
                fake = self._outputs.fake(module, ordinal, inputs)
                if fake is not None:
                    return fake
            if self._joins and self.call.meeting is not None:
                self.shared += first
                return self.call.meeting.call(LEADER, name, ordinal, first, run, args, kwargs)
            if self.steps > 0:
                return self._with_room(run, args, kwargs)
            given = Inputs(args, kwargs).own_copy() if self.call.meeting is not None else None
            output = self._with_room(run, args, kwargs)
            self._outputs.keep(module, ordinal, inputs, output)
            if given is not None and self.call.meeting is not None:
                self.call.meeting.tell_exact(name, ordinal, given, output)
            return output

        return hook

    def _with_room(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the model returns; where others on its device have left no memory for that, as it
        returns it alone.
        """
        try:
            return run(*args, **kwargs)
        except out_of_memory():
            if self.team is not None or not self.call.shares_home:
                raise
        self.give_up(CROWDED)
        if self.core is not None:
            self.core.finish()
        self.call.end()
        for some in self._followers:  # those at work are through then
            some.gather(set())
        give_room()
        return run(*args, **kwargs)

    def _share_out(
        self, first: bool, name: str, run: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        assert self.team is not None
        if first:
            self.team.begin(self.steps)
        return self.team.call(name, run, args, kwargs)

    def _leave_batch(self) -> None:
        """No more of this iteration's evaluation is to come."""
        if self._joins and self.call.meeting is not None:
            self.call.meeting.done(LEADER)
        self._joins = False

    def _take_gradient(self) -> None:
        """With gradients on in the denoiser's call and off in step, something is made of them."""
        if self.steps == 0:
            self._gradients = True
        elif not self._gradients:
            self.give_up("the pipeline takes gradients through the denoiser")

    def _begin_iteration(self, inputs: list[torch.Tensor]) -> None:
        """The first denoiser call since the last step: the moment to ask."""
        self._fresh, self._answer, self._asked = False, None, None
        self._ordinals.clear()
        self._shown = inputs if self._scaled is None else [self._scaled, *inputs]
        if self.steps == 0:
            self._begin_loop()
        self._forward_ns = _core.now_ns()
        if self.core is None or self._beyond_end():
            return
        x = self._coming_latent()
        if x is None:
            self._unseen += 1
            if self._unseen > 2:
                self.give_up(self._why_unseen())
            return
        self._give_noise()
        answer = torch.empty(self._shape, dtype=self._m_dtype, device=x.device)
        self._asked = x.detach().clone()  # the host may edit x in place
        wanted = () if self._edited_at_once() else (answer,)
        answered = self._told(self.core.ask, self.steps, self._as_latent(x), *wanted)
        if answered:
            self._answer = answer
        elif answered is False and self.call.meeting is not None and self.call.meeting.leads:
            self.call.meeting.begin(LEADER, self.core.company)
            self._joins = True

    def _beyond_end(self) -> bool:
        """Of the program: a call after the last step, to fill a cache for one, or more steps."""
        return self.steps >= self._length

    def _begin_loop(self) -> None:
        reason = averages(self.pipe) if self.active else None
        if reason is not None:
            self.give_up(reason)
        if self.team is not None and self.call.made_from != denoisers_print(self.pipe):
            self.call.dissolve(ALTERED)
        settled = self.state.begin(self.pipe)
        if self.state.doubtful:
            self.call.doubt()
        if settled:
            self._open_team()
            if reason is None:
                self._start_followers()

    def _open_team(self) -> None:
        """What hangs in the denoisers keeps nothing: helpers may be asked."""
        if self.team is not None and not self._team_open:
            self.team.open(denoisers_of(self.pipe), self.state.is_still)
        self._team_open = True

    def _start_followers(self) -> None:
        for some in () if self._started else self._followers:
            some.start()
        self._started = True

    def _look_at_state(self) -> None:
        """Denoisers that keep something from call to call must not be evaluated ahead."""
        if self._answer is None and not self._fresh:
            reason = self.state.kept()
            if reason is not None:
                self.model_changed(reason)
            else:
                self._open_team()

    def _coming_latent(self) -> torch.Tensor | None:
        """The sample that the next step will be handed, as far as can be told now.

        What the last step returned, if the input agrees; the input itself where the host edited or
        cast it. Where the input shows no latent, what the last step returned, as long as that has
        always been the next sample. The step hook sees the sample itself and corrects what was
        wrong here.
        """
        previous, shown = self._previous, self._shown_latent()
        if shown is None:
            trusted = self._previous_is_next is not False and not self._edited()
            seen = previous is not None and tuple(previous.shape) == self._shape
            return previous if trusted and seen else None
        if previous is None or self._previous_is_next is False or not is_rounded(previous, shown):
            return shown
        return previous

    def _why_unseen(self) -> str:
        """NaN equals nothing, itself included."""
        if self._previous is not None and not torch.isfinite(self._previous).all():
            return "the pipeline's own latents hold NaN or Inf"
        return "the latents cannot be seen in the denoiser's input"

    def _edited(self) -> bool:
        """Whether a callback edited the latents since the last step."""
        return self.watch is not None and self.watch.latents_edited

    def _edited_at_once(self) -> bool:
        """Whether a callback made an edit at this step alone: it is evaluated, however small. One
        that edits in every step is part of the loop, and what it does is drift; so is all where
        drift has no limit, or none of it is let pass.
        """
        tolerance = self.options.verified_at
        limited = tolerance is not None and 0 < tolerance < math.inf
        return limited and self._edited() and not self._edited_before

    def _shown_latent(self) -> torch.Tensor | None:
        if self._shown_at is None:
            return None
        first = self._shown[self._shown_at : self._shown_at + 1]
        found = (latent_in(given, self._shape) for given in (*first, *self._shown))
        return next((latent for latent in found if latent is not None), None)

    def _as_latent(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().to(self._dtype).contiguous()

    def _give_noise(self) -> None:
        """Noise of the steps that the next guesses may pass, drawn ahead by a clone."""
        if self._noise is None or self.core is None:
            return
        self._noise.release(self.steps)
        for step in range(max(self._noise_given, self.steps), self.core.horizon):
            drawn = self._noise.noise(step)
            if drawn is not None:
                self._told(self.core.noise, step, self._as_latent(drawn))
        self._noise_given = max(self._noise_given, self.core.horizon)

    # ---- scheduler -------------------------------------------------------------------------------

    def _set_timesteps(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self.steps > 0 and scheduler is self._scheduler:
            self._begin_next_loop()
        return original(*args, **kwargs)

    def _why_last_loop(self) -> str | None:
        """Why followers cannot go on to a second loop, or None."""
        if self.call.meeting is not None or self.call.teams or self.team is not None:
            return "and ranks that share forwards cannot follow there"
        if self._encodes:
            return "and the first calls an encoder at its steps"
        if self._returned is None:
            return "and the first was longer or shorter than its scheduler's"
        return None

    def _begin_next_loop(self) -> None:
        """A loop is over, and its run; the code goes on to another one in the same call."""
        if not self.active or self.core is None:
            return
        why = self._why_last_loop()
        if why is not None:
            self.give_up(f"the pipeline runs a second sampling loop in one call, {why}")
            return
        self.core.finish()
        ended = Ended(self.steps, self.opened, self.core.report())
        lost = {rank: text for rank, _, _, text in ended.report["failures"]}
        states = [generator.get_state() for generator in self.generators]
        self.loops.append(ended)
        self.call.begin_next_loop(Loop(self.steps, self._returned, states), lost)
        self._ordinals.clear()
        self._begin()

    def runs(self) -> list[Ended]:
        """All loops that the core had a part in."""
        own = [] if self.core is None else [Ended(self.steps, self.opened, self.core.report())]
        return self.loops + own

    def _scale(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler is self.pipe.scheduler and self._scaled is None:
            self._scaled = args[0] if args else kwargs.get("sample")
        return original(*args, **kwargs)

    def _step(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        first = None
        self._leave_batch()
        if self.active or self.team is not None:
            self._look_at_state()
        if self.active or self._answer is not None:
            named = named_arguments(scheduler, args, kwargs)
            if named is None:
                self.give_up("the scheduler's step does not take model_output, timestep, sample")
            elif self._scheduler is None:
                first = self._prepared(scheduler, named)
            else:
                self._turn(scheduler, named)
        if self._answer is not None and "model_output" in kwargs:
            kwargs["model_output"] = self._answer
        elif self._answer is not None:
            args = (self._answer, *args[1:])
        result = original(*args, **kwargs)
        if self._scheduler is None:
            self._scheduler = scheduler
        if scheduler is not self._scheduler:
            return result  # a copy that steps something else, sound beside video
        if first is not None:
            self._open(first, result)
        self.steps += 1
        self.evaluated += self._answer is None
        self._fresh, self._scaled, self._answer = True, None, None
        self._previous = sample_in(result)
        last = self.active and self.steps == self._length
        self._returned = map_tensors(private, result) if last else None
        if self.watch is not None:
            self._edited_before = self.watch.latents_edited
            self.watch.latents_edited = False
        return result

    def _refusal(self, scheduler: Any, arguments: dict[str, Any]) -> str | None:
        """Why the first step shows that this loop cannot be carried, or None."""
        m, x = arguments.get("model_output"), arguments.get("sample")
        if not isinstance(m, torch.Tensor) or not isinstance(x, torch.Tensor):
            return "the scheduler's step is not handed tensors as model_output and sample"
        if m.shape != x.shape:
            shapes = f"{tuple(m.shape)} where the latents are {tuple(x.shape)}"
            if m.ndim > 1 and (m.shape[0], m.shape[1] // 2, *m.shape[2:]) == tuple(x.shape):
                return f"the denoiser predicts the variance of the noise too, {shapes}"
            return f"the model output has another shape, {shapes}"
        if scheduler is not self.pipe.scheduler:
            return "the pipeline steps a copy of its scheduler"
        if self._fresh:
            return "the scheduler stepped before a denoiser was called"
        if self._gradients and not torch.is_grad_enabled():
            return "the pipeline takes gradients through the denoiser"
        for name, value in arguments.items():
            if name not in _STEP_TENSORS and isinstance(value, torch.Tensor) and value.numel() > 1:
                return f"step is handed a tensor as {name!r}"
        return None

    def _prepared(self, scheduler: Any, arguments: dict[str, Any]) -> _First | None:
        """Before the first step: whether the loop can be carried, and the draws to come."""
        reason = self._refusal(scheduler, arguments)
        if reason is not None:
            self.give_up(reason)
            return None
        m, x = (arguments[name].detach().clone() for name in ("model_output", "sample"))
        step_kwargs = {k: v for k, v in arguments.items() if k not in _STEP_TENSORS[:3]}
        try:
            timesteps = self._timesteps(scheduler, arguments["timestep"])
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
        except Exception as error:  # a class of the user's own may do anything on a trace
            self.give_up(f"the scheduler cannot be traced: {describe(error)}")
            return None
        self._start_followers()
        return _First(m, x, traced)

    def _open(self, first: _First, result: Any) -> None:
        """After the first step: shapes and dtypes are known, the leader's output is there. Begins
        the run.
        """
        m, x = first.m, first.x
        self._shape, self._m_dtype = tuple(x.shape), m.dtype
        shown = [latent_in(given, self._shape) for given in self._shown]
        seen = [k for k, latent in enumerate(shown) if latent is not None and is_rounded(x, latent)]
        self._shown_at = seen[0] if seen else None
        self._dtype = _latents_dtype(x, sample_in(result), shown[seen[0]] if seen else None)
        self._shown = []
        program = first.traced.program(noise_ahead=True)
        x, self._length = self._as_latent(x), len(program)
        self.call.lane = lane = self.call.lane and program.strides and len(program) >= _FEWEST
        if self.call.ranks == 1 and not lane:
            self.active = False
            return
        self.core = self._told(self.call.lead, program, x, self.options)
        if self.core is None:
            return
        for some in self._followers if lane and not self._lane_started else ():
            some.start_lane()
        self._lane_started = self._lane_started or lane
        self.opened = time.perf_counter() - self.began
        patience = self.options.deadline or max(60.0, 10 * self.opened)
        self.call.open(self.core, result, patience)
        self._told(self.core.ask, 0, x)
        self._submit(m)

    def _submit(self, m: torch.Tensor) -> None:
        core = self.core
        assert core is not None
        self.submitted += 1
        self._told(core.submit, m.contiguous(), self._forward_ns)

    def _timesteps(self, scheduler: Any, first: Any) -> Any:
        """What the loop will hand to step, by the scheduler's list from the first one on."""
        left = first_times(scheduler, first)
        count = getattr(self.pipe, "_num_timesteps", None)
        return left[:count] if isinstance(count, int) and 0 < count < len(left) else left

    def _turn(self, scheduler: Any, arguments: dict[str, Any]) -> None:
        """A later step: hands in the leader's output, or puts the answer in its place."""
        m, x = arguments["model_output"], arguments["sample"]
        if scheduler is not self._scheduler or self._fresh:
            self.give_up("two steps of a scheduler in one iteration")
            return
        if tuple(x.shape) != self._shape:
            if self._answer is not None:
                raise _core.ShapeError(
                    f"the latents are {tuple(x.shape)} in step {self.steps} where the denoiser was "
                    f"shown {self._shape}; this pipeline cannot be run in parallel"
                )
            self.give_up(f"the latents became {tuple(x.shape)} where they were {self._shape}")
            return
        if self._beyond_end():
            return
        if self._asked is None or not is_rounded(self._asked, x):
            self._correct(x)
        if self._answer is None and self.active and self.core is not None:
            self._submit(m.detach())

    def _correct(self, x: torch.Tensor) -> None:
        """The sample that the step is handed is not what the core was asked with: it measures and
        rebases on this one.
        """
        core = self.core
        if core is None:
            return
        if self._previous is not None and not self._edited():
            self._previous_is_next = is_rounded(self._previous, x)
        if self._asked is None:
            self._told(core.ask, self.steps, self._as_latent(x))
        elif self._answer is None:
            self._told(core.amend, self._as_latent(x))
        else:
            spent = self._told(core.amend, self._as_latent(x), self._answer)
            tolerance = self.options.verified_at
            if None not in (spent, tolerance) and not spent < tolerance:
                self.give_up("the host edited the latents after the denoiser was called")


def _latents_dtype(
    x: torch.Tensor, stepped: torch.Tensor | None, shown: torch.Tensor | None
) -> torch.dtype:
    """How finely the host keeps its latents, in which guesses travel and drift is measured.

    Some begin in float32 and go on in the model's dtype, others hand step a wider copy of what the
    denoiser is shown.
    """
    if stepped is not None and stepped.dtype.itemsize < x.dtype.itemsize:
        return stepped.dtype
    if shown is not None and shown.dtype.itemsize < x.dtype.itemsize:
        if torch.equal(shown.to(x.dtype), x):
            return shown.dtype
    return x.dtype
