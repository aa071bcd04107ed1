"""The leader's side of a pipeline call: hooks on the user's pipeline, its model calls answered by
the core.

The pipeline runs unchanged. At its first denoiser call of an iteration the core is asked with the
latent that the loop is about to use; where it answers, the denoisers are skipped and the
scheduler's own `step` gets the answer on the pipeline's own sample (`asking`). Whatever cannot be
carried so runs as it would without us, and the reason is kept for the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...options import Options
from ...speculation import CROWDED, Speculation, out_of_memory
from ..arguments import inputs_in, named_arguments
from ..call import Call, Followers
from ..hooks import Hooks
from ..latents import Apart
from ..parts import denoisers_of
from ..state import State, averages
from ..watch import Watch
from .asking import Asking
from .denoising import Denoising
from .entry import Entry
from .loops import Ended, Loops
from .opening import Opening
from .steps import Steps

_FEWEST = 16  # steps that a lane is worth its own check at step 0 for


class Leader(Speculation):
    """Of one call. `generator` is what the pipeline draws from, `generators` are all among the
    call's arguments.
    """

    def __init__(
        self,
        pipe: Any,
        call: Call,
        followers: Sequence[Followers],
        generator: Any,
        generators: Sequence[torch.Generator],
        options: Options,
        state: State,
    ) -> None:
        super().__init__()
        self.pipe, self.call, self.options = pipe, call, options
        self.active = call.ranks > 1 or call.lane  # the core is asked
        self.watch: Watch | None = None
        self.steps, self.loops = Steps(), Loops(call, generators)
        self.denoising = Denoising(call)
        self._entry = Entry(pipe, call, followers, state)
        self._opening = Opening(pipe, generator)
        self._asking: Asking | None = None  # once the loop's first iteration is over

    def place(self, hooks: Hooks) -> None:
        """All hooks; where the pipeline runs alone from the start, only what counts its steps."""
        scheduler = self.pipe.scheduler
        hooks.wrap(scheduler, "step", self._step)
        if not self.active and self.call.team is None:
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
            self.denoising.leave()
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
        calls = self.denoising.most_calls
        if self.active and self.steps.count == 0 and calls > 0:
            self.steps.evaluated = self.steps.count = calls
            self.give_up("pipe.scheduler did not step: the pipeline used another one in its call")

    def finish(self) -> None:
        """The call is over, one way or another: followers leave."""
        self._entry.close()
        if self.core is not None:
            self.core.finish()

    def runs(self) -> list[Ended]:
        """All loops that the core had a part in."""
        return self.loops.ended + ([] if self.core is None else [self._run(self.core)])

    # ---- encoders --------------------------------------------------------------------------------

    def _recording(self, key: tuple[str, str]) -> Callable[..., Any]:
        def hook(original: Any, *args: Any, **kwargs: Any) -> Any:
            begun, calls = self.steps.count > 0, self._calls
            self.loops.encodes |= begun and not self.loops.is_over(calls)
            if not self.active or (begun and self.loops.why_last(calls) is not None):
                return original(*args, **kwargs)
            return self._entry.record(key, original, args, kwargs)

        return hook

    # ---- denoisers -------------------------------------------------------------------------------

    def _forward_of(self, name: str, module: torch.nn.Module) -> Any:
        calls = self.denoising

        def hook(run: Any, *args: Any, **kwargs: Any) -> Any:
            run, first = calls.measured(name, run, self.steps.count), calls.fresh
            if not self.active and not self._skips:
                self._call_alone()
                if self.watch is not None:
                    self.watch.note_inputs(args, kwargs)
                return run(*args, **kwargs)
            inputs = inputs_in(args, kwargs)
            if torch.is_grad_enabled() and not self._skips:
                self._take_gradient()
            if first:
                self._begin_iteration(inputs)
            if self.watch is not None:
                self.watch.note_inputs(args, kwargs)
            ordinal = calls.count(module)
            fake = calls.fake(module, ordinal, inputs) if self._skips else None
            if fake is not None:
                return fake
            if calls.is_joined:
                return calls.together(name, ordinal, first, run, args, kwargs)
            run = functools.partial(self._with_room, run)
            if self.steps.count == 0:
                return calls.first(name, module, ordinal, inputs, run, args, kwargs)
            self._look_at_writing(args, kwargs)
            return run(*args, **kwargs)

        return hook

    def _call_alone(self) -> None:
        """A denoiser is called in an iteration that has nothing to do with the core."""
        if not self.denoising.fresh:
            return
        if self.steps.count == 0:
            self._begin_loop()
        self.denoising.fresh = False
        if self._asking is not None:
            self._asking.answer = None

    def _with_room(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the model returns; where others on its device have left no memory for that, as it
        returns it alone.
        """
        try:
            return run(*args, **kwargs)
        except out_of_memory():
            if self.call.team is not None or not self.call.shares_home:
                raise
        self.give_up(CROWDED)
        if self.core is not None:
            self.core.finish()
        self._entry.send_off()
        return run(*args, **kwargs)

    def _look_at_writing(self, args: Any, kwargs: dict[str, Any]) -> None:
        why = self.denoising.why_written(args, kwargs) if self.steps.count == 1 else None
        if why is not None and self.active:
            self.give_up(why)

    def _take_gradient(self) -> None:
        why = self._opening.why_gradients(self.steps.count)
        if why is not None:
            self.give_up(why)

    @property
    def _answered(self) -> bool:
        return self._asking is not None and self._asking.answered

    @property
    def _skips(self) -> bool:
        return self._asking is not None and self._asking.skips

    # ---- iterations ------------------------------------------------------------------------------

    def _begin_iteration(self, inputs: list[torch.Tensor]) -> None:
        """The first denoiser call since the last step."""
        self._end_iteration()
        self.denoising.iterate()
        shown = self._opening.shown(inputs)
        if self.steps.count == 0:
            self._begin_loop()
        if self._asking is None:
            self._opening.iterate(shown)
        elif self._asking.iterate(self.steps.count, shown) and self.core is not None:
            self.denoising.join(self.core.company)

    def _end_iteration(self) -> None:
        """No more of its calls of step will come: the first one is known now, the others are to
        have been alike.
        """
        if not self.active:
            return
        if self._asking is None:
            if self._opening.latents:
                self._open()
        elif self._asking.is_cut_short():
            self.give_up("some iterations have fewer steps of a scheduler than the first")

    def _begin_loop(self) -> None:
        reason = averages(self.pipe) if self.active else None
        if reason is not None:
            self.give_up(reason)
        self._entry.begin(followers=reason is None)

    def _open(self) -> None:
        """After the first iteration: shapes and dtypes are known, the leader's output is there.
        Begins the run.
        """
        try:
            latents = self._opening.end()
        except Apart as why:
            self.give_up(str(why))
            return
        call, program = self.call, latents.traced.program(noise_ahead=True)
        x, m = latents.first()
        call.lane = call.lane and program.strides and len(program) >= _FEWEST
        if call.ranks == 1 and not call.lane:
            self.active = False
            return
        self.core = self.told(call.lead, program, x, self.options)
        if self.core is None:
            return
        tolerance = self.options.verified_at
        self._asking = Asking(self, self.core, latents, self.watch, tolerance)
        if call.lane:
            self._entry.start_lane()
        patience = self.options.deadline or max(60.0, 10 * self.loops.open())
        call.open(self.core, latents.form, patience)
        self._asking.open(x, m, self._opening.began_ns)

    # ---- loops -----------------------------------------------------------------------------------

    def _set_timesteps(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        ended = self.steps.counts(scheduler) or self.loops.is_over(self._calls)
        if self.steps.count > 0 and ended:
            self._begin_next_loop()
        if self.steps.count == 0 and scheduler is not self.pipe.scheduler:
            self._opening.copies.append(scheduler)
        return original(*args, **kwargs)

    @property
    def _calls(self) -> int:
        """Of step in an iteration, as far as known."""
        if self._asking is None:
            return len(self._opening.latents)
        return self._asking.latents.form.calls

    def _begin_next_loop(self) -> None:
        """A loop is over, and its run; the code goes on to another one in the same call."""
        self._end_iteration()
        if not self.active or self.core is None:
            return
        why = self.loops.why_last(self._calls)
        if why is not None:
            self.give_up(f"the pipeline runs a second sampling loop in one call, {why}")
            return
        self.core.finish()
        after = 0 if self.denoising.fresh else self.denoising.calls
        self.loops.end(self._run(self.core), after)
        for each in (self.steps, self.denoising, self._opening):
            each.begin()
        if self.watch is not None:
            self.watch.begin_loop()
        self.core = self._asking = None

    def _run(self, core: Any) -> Ended:
        submitted = 0 if self._asking is None else self._asking.submitted
        return self.loops.run(core, self.steps.count, submitted)

    # ---- scheduler -------------------------------------------------------------------------------

    def _scale(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler is self.pipe.scheduler and self._opening.scaled is None:
            self._opening.scaled = args[0] if args else kwargs.get("sample")
        return original(*args, **kwargs)

    def _step(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        self.denoising.leave()
        if (self.active or self.call.team is not None) and not self._skips:
            self._look_at_state()
        taken_back = self.steps.take_back(scheduler, self.denoising.fresh, self._answered)
        if taken_back and self._asking is None:
            self._opening.take_back()
        if self.active or self._answered:
            named = named_arguments(scheduler, args, kwargs)
            if named is None:
                self.give_up("the scheduler's step does not take model_output, timestep, sample")
            elif self._asking is None:
                self._prepare(scheduler, named)
            else:
                m, answer = named["model_output"], self._asking.turn(scheduler, named, taken_back)
                if answer is not None:
                    args = tuple(answer if value is m else value for value in args)
                    kwargs = {k: answer if value is m else value for k, value in kwargs.items()}
        result = original(*args, **kwargs)
        self._stepped(scheduler, result)
        return result

    def _look_at_state(self) -> None:
        reason = None if self.denoising.fresh else self._entry.look_at_state()
        if reason is not None:
            self.model_changed(reason)

    def _prepare(self, scheduler: Any, arguments: dict[str, Any]) -> None:
        """Before a step of the first iteration: whether that can be carried, draws to come."""
        reason = self._opening.look(scheduler, arguments, called=not self.denoising.fresh)
        if reason is not None:
            self.give_up(reason)
            return
        self._entry.start()

    def _stepped(self, scheduler: Any, result: Any) -> None:
        self.steps.stepped(scheduler, self.denoising.fresh, self._answered)
        self.denoising.fresh, self._opening.scaled = True, None
        if self._asking is None:
            last, over = self._opening.stepped(result), bool(self._opening.latents)
        else:
            last, over = self._asking.is_at_end(), self._asking.stepped(result)
        self.loops.stepped(result, last and self.active)
        if over and self.watch is not None:
            self.watch.latents_edited = False
