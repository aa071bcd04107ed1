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
from . import tokens
from .arguments import inputs_in, loop_times, named_arguments
from .batching import LEADER
from .call import Call, Followers, Loop
from .forwards import Inputs
from .hooks import Hooks
from .latents import Apart, Latent, Latents, refusal
from .listening import Listening
from .parts import denoisers_of
from .replicas import denoisers_print
from .skipping import Outputs
from .state import State, averages
from .teams.team import ALTERED
from .tensors import is_rounded, map_tensors, private
from .watch import Watch
from .writing import Written

_FEWEST = 16  # steps that a lane is worth its own check at step 0 for


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
        self.steps = 0  # calls of the scheduler's step so far, but for those that were taken back
        self.opened = 0.0  # seconds from the call's beginning to the run's
        self._outputs = Outputs()
        self._scheduler: Any = None  # the iteration's first that steps, whose steps are counted
        self._index: int | None = None  # where the last step left its scheduler
        self._copies: list[Any] = []  # of the scheduler, that were set up for the loop
        self._scaled: torch.Tensor | None = None  # what scale_model_input was given
        self._first: list[Latent] = []  # of the first iteration's calls of step
        self._latents: Latents | None = None  # all of them, once that is over
        self._at = self._calls = 0  # the iteration's step, and its calls of step so far
        self._returned: list[Any] = []  # by the program's last iteration
        self._edited_before = False  # by a callback, ahead of the last iteration
        self._shown: list[torch.Tensor] = []  # inputs of the iteration's first denoiser call
        self._asked: list[torch.Tensor] | None = None  # the samples the core was asked with
        self._answer: torch.Tensor | None = None  # until all steps of the iteration had their part
        self._answered = False  # the iteration was: its denoisers' outputs are none of its own
        self._xs: list[torch.Tensor] = []  # the samples that step is handed, as far as known
        self._ms: list[torch.Tensor] = []  # and outputs, of the iteration
        self._joins = False  # this iteration's evaluation is part of a batch
        self._unseen = 0
        self._written = Written()  # by the first iteration's calls
        self._forward_ns = 0
        self._length = 0  # steps of the program
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
            self._encodes = self._encodes or (self.steps > 0 and not self._is_over())
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
            if self.steps == 0 and self.call.peak is not None:
                run = self.call.peak.over(run)
            if self.team is not None:
                run = functools.partial(self._share_out, self._fresh, name, run)
            if not self.active and self._answer is None:
                if self._fresh and self.steps == 0:
                    self._begin_loop()
                self._answered = self._answered and not self._fresh
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
                self._look_at_writing(args, kwargs)
                return self._with_room(run, args, kwargs)
            run = self._written.over(run)
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

    def _look_at_writing(self, args: Any, kwargs: dict[str, Any]) -> None:
        name = self._written.handed_again(args, kwargs) if self._at == 1 else None
        if name is not None and self.active:
            self.give_up(f"a denoiser writes to what it is handed again, {name}")

    def _take_gradient(self) -> None:
        """With gradients on in the denoiser's call and off in step, something is made of them."""
        if self.steps == 0:
            self._gradients = True
        elif not self._gradients:
            self.give_up("the pipeline takes gradients through the denoiser")

    def _begin_iteration(self, inputs: list[torch.Tensor]) -> None:
        """The first denoiser call since the last step: the moment to ask."""
        self._end_iteration()
        self._fresh, self._answered, self._answer, self._asked = False, False, None, None
        self._xs, self._ms = [], []
        self._at, self._calls = self.steps, 0
        self._ordinals.clear()
        self._shown = inputs if self._scaled is None else [self._scaled, *inputs]
        if self.steps == 0:
            self._begin_loop()
        self._forward_ns = _core.now_ns()
        if self.core is None or self._latents is None or self._beyond_end():
            return
        xs = self._latents.coming(self._shown, self._edited())
        if xs is None:
            self._unseen += 1
            if self._unseen > 2:
                self.give_up(self._why_unseen())
            return
        self._give_noise(self._latents)
        x = self._latents.point(xs)
        answer = torch.empty(x.shape, dtype=self._latents.m_dtype, device=x.device)
        self._asked = [x.detach().clone() for x in xs]  # the host may edit x in place
        wanted = () if self._edited_at_once() else (answer,)
        answered = self._told(self.core.ask, self._at, x, *wanted)
        if answered:
            self._answered, self._answer = True, answer
        elif answered is False and self.call.meeting is not None and self.call.meeting.leads:
            self.call.meeting.begin(LEADER, self.core.company)
            self._joins = True

    def _end_iteration(self) -> None:
        """No more of its calls of step will come: the first one is known now, the others are to
        have been alike.
        """
        if self._latents is None:
            if self._first and self.active:
                self._open()
        elif self.active and 0 < self._calls < self._latents.form.calls:
            self.give_up("some iterations have fewer steps of a scheduler than the first")

    def _beyond_end(self) -> bool:
        """Of the program: a call after the last step, to fill a cache for one, or more steps."""
        return self._at >= self._length

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

    def _why_unseen(self) -> str:
        if self._latents is not None and not all(one.is_finite() for one in self._latents.all):
            return "the pipeline's own latents hold NaN or Inf"
        return "the latents cannot be seen in the denoiser's input"

    def _edited_at_once(self) -> bool:
        """Whether a callback made an edit at this step alone: it is evaluated, however small. One
        that edits in every step is part of the loop, and what it does is drift; so is all where
        drift has no limit, or none of it is let pass.
        """
        before, self._edited_before = self._edited_before, self._edited()
        tolerance = self.options.verified_at
        limited = tolerance is not None and 0 < tolerance < math.inf
        return limited and self._edited_before and not before

    def _edited(self) -> bool:
        """Whether a callback edited the latents since the last step."""
        return self.watch is not None and self.watch.latents_edited

    def _give_noise(self, latents: Latents) -> None:
        """Noise of the steps that the next guesses may pass, drawn ahead by a clone."""
        if self.core is None or not latents.draws:
            return
        latents.forget_noise(self._at)
        for step in range(max(self._noise_given, self._at), self.core.horizon):
            drawn = latents.noise(step)
            if drawn is not None:
                self._told(self.core.noise, step, drawn)
        self._noise_given = max(self._noise_given, self.core.horizon)

    # ---- scheduler -------------------------------------------------------------------------------

    def _set_timesteps(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self.steps > 0 and (scheduler is self._scheduler or self._is_over()):
            self._begin_next_loop()
        if self.steps == 0 and scheduler is not self.pipe.scheduler:
            self._copies.append(scheduler)
        return original(*args, **kwargs)

    def _is_over(self) -> bool:
        """Whether the program's last iteration is done, and its calls of step."""
        calls = len(self._first) if self._latents is None else self._latents.form.calls
        return 0 < len(self._returned) == calls

    def _why_last_loop(self) -> str | None:
        """Why followers cannot go on to a second loop, or None."""
        if self.call.meeting is not None or self.call.teams or self.team is not None:
            return "and ranks that share forwards cannot follow there"
        if self._encodes:
            return "and the first calls an encoder at its steps"
        if not self._is_over():
            return "and the first was longer or shorter than its scheduler's"
        return None

    def _begin_next_loop(self) -> None:
        """A loop is over, and its run; the code goes on to another one in the same call."""
        self._end_iteration()
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
        after = 0 if self._fresh else sum(self._ordinals.values())
        self.call.begin_next_loop(Loop(self.steps, self._returned, states, after), lost)
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
        self._leave_batch()
        if self.active or self.team is not None:
            self._look_at_state()
        taken_back = self._take_back(scheduler)
        if self.active or self._answered:
            named = named_arguments(scheduler, args, kwargs)
            if named is None:
                self.give_up("the scheduler's step does not take model_output, timestep, sample")
            elif self._latents is None:
                self._prepare(scheduler, named)
            else:
                m, answer = named["model_output"], self._turn(scheduler, named, taken_back)
                if answer is not None:
                    args = tuple(answer if value is m else value for value in args)
                    kwargs = {k: answer if value is m else value for k, value in kwargs.items()}
        result = original(*args, **kwargs)
        self._stepped(scheduler, result)
        return result

    def _take_back(self, scheduler: Any) -> bool:
        """Whether the host has taken back the last step of this scheduler, to step once more: it
        was for what that predicts.
        """
        index = getattr(scheduler, "_step_index", None)
        if scheduler is not self._scheduler or not self._fresh or None in (index, self._index):
            return False
        if self._index != index + 1:  # type: ignore[operator]
            return False
        self.steps -= 1
        self.evaluated -= not self._answered
        if self._latents is None and self._first:
            self._first[-1].taken_back = True
        return True

    def _stepped(self, scheduler: Any, result: Any) -> None:
        if self._scheduler is None or not self._fresh:
            self._scheduler = scheduler
        if scheduler is self._scheduler:
            self.steps += 1
            self.evaluated += not self._answered
            self._index = getattr(scheduler, "_step_index", None)
        call, self._calls = self._calls, self._calls + 1
        self._fresh, self._scaled = True, None
        over = last = False
        if self._latents is not None:
            over, last = self._calls >= self._latents.form.calls, self._at + 1 == self._length
            if call < self._latents.form.calls:
                self._latents.calls[call].stepped(result)
        elif self._first:
            over, last = True, len(self._first[0].traced) == 1
            if self._first[-1].result is None:
                self._first[-1].result = result
        if last and self.active:
            self._returned.append(map_tensors(private, result))
        else:
            self._returned.clear()
        if over:
            self._answer = None
        if over and self.watch is not None:
            self.watch.latents_edited = False

    def _prepare(self, scheduler: Any, arguments: dict[str, Any]) -> None:
        """Before a step of the first iteration: whether that can be carried, draws to come."""
        reason = refusal(arguments) or self._why_not()
        if reason is not None:
            self.give_up(reason)
            return
        try:
            timesteps = loop_times(self.pipe, scheduler, arguments["timestep"])
            given = (scheduler, arguments, timesteps, self._shown, self.generator)
            latent = Latent(*given, self._first)
        except Exception as error:  # a class of the user's own may do anything on a trace
            self.give_up(f"the scheduler cannot be traced: {describe(error)}")
            return
        self._start_followers()
        self._first.append(latent)

    def _why_not(self) -> str | None:
        """Why the first step shows that this loop cannot be carried, or None."""
        if self._fresh and not self._first:
            return "the scheduler stepped before a denoiser was called"
        if self._gradients and not torch.is_grad_enabled():
            return "the pipeline takes gradients through the denoiser"
        return None

    def _open(self) -> None:
        """After the first iteration: shapes and dtypes are known, the leader's output is there.
        Begins the run.
        """
        try:
            latents = Latents(self._first, self.pipe, self._copies)
        except Apart as why:
            self.give_up(str(why))
            return
        program = latents.traced.program(noise_ahead=True)
        (x, m), self._length = latents.first(), len(program)
        self.call.lane = lane = self.call.lane and program.strides and len(program) >= _FEWEST
        if self.call.ranks == 1 and not lane:
            self.active = False
            return
        self.core = self._told(self.call.lead, program, x, self.options)
        if self.core is None:
            return
        self._latents = latents
        for some in self._followers if lane and not self._lane_started else ():
            some.start_lane()
        self._lane_started = self._lane_started or lane
        self.opened = time.perf_counter() - self.began
        patience = self.options.deadline or max(60.0, 10 * self.opened)
        self.call.open(self.core, latents.form, patience)
        self._told(self.core.ask, 0, x)
        self._submit(m)

    def _submit(self, m: torch.Tensor) -> None:
        core = self.core
        assert core is not None
        self.submitted += 1
        self._told(core.submit, m, self._forward_ns)

    def _turn(
        self, scheduler: Any, arguments: dict[str, Any], taken_back: bool
    ) -> torch.Tensor | None:
        """A later step: hands in the leader's output, or gives the answer that takes its place."""
        latents, call = self._latents, self._calls
        assert latents is not None
        m, x = arguments["model_output"], arguments["sample"]
        why = latents.why_unlike(call, scheduler, taken_back, x)
        if why is not None and self._answered:
            raise _core.ShapeError(
                f"{why}, in step {self._at}, which was not evaluated: this pipeline cannot be run "
                "in parallel"
            )
        if why is not None:
            self.give_up(why)
            return None
        if not latents.form.kept[call] or self._beyond_end():
            return None
        number = latents.form.latent_of(call)
        shares = tokens.shares(scheduler, arguments) if latents.form.by_token[number] else None
        x, m = x.detach(), m.detach()
        if latents.form.calls > 1:  # the host may edit them before the last one comes
            x, m = x.clone(), m.clone()
        self._xs.append(x)
        if self._asked is None or not is_rounded(self._asked[number], x):
            self._correct(number)
        if self._answer is not None:
            answer = latents.form.part(self._answer, number).to(latents.all[number].m_dtype)
            return answer if shares is None else tokens.in_own_measure(answer, shares)
        self._ms.append(m if shares is None else tokens.in_rows_measure(m, shares))
        if latents.form.is_last(number) and self.active and self.core is not None:
            self._submit(latents.output(self._ms))
        return None

    def _correct(self, number: int) -> None:
        """The sample that this step is handed is not what the core was asked with: it measures and
        rebases on this one.
        """
        core, latents = self.core, self._latents
        if core is None or latents is None:
            return
        if not self._edited():
            latents.all[number].was_handed(self._xs[-1])
        if self._asked is None:
            if latents.form.is_last(number):
                self._told(core.ask, self._at, latents.point(self._xs))
            return
        point = latents.point([*self._xs, *self._asked[number + 1 :]])
        if self._answer is None:
            self._told(core.amend, point)
            return
        spent = self._told(core.amend, point, self._answer)
        tolerance = self.options.verified_at
        if None not in (spent, tolerance) and not spent < tolerance:
            self.give_up("the host edited the latents after the denoiser was called")
