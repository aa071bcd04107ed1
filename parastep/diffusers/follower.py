"""A follower's side of a pipeline call: a replica's own loop, led from step to step by the core.

The replica enters the pipeline's own `__call__`. It evaluates step 0 on its own first latent, which
the leader verifies; after that its `step` hook hands the loop the point it is to evaluate, and the
iterations before that are passed, or walked through without their denoisers. Nothing is stepped,
encoded or decoded here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from .. import _core
from ..messages import describe
from . import tokens
from .arguments import inputs_in, named_arguments
from .call import Call
from .compiling import is_compiled
from .draws import OwnDraws
from .hooks import Hooks
from .iteration import Iteration, widest
from .leaving import GoBack, Leave
from .listening import Listening
from .parts import denoisers_of
from .replicas import denoisers_print
from .skipping import Outputs, Skipping
from .teams.team import ALTERED, Team
from .tensors import generators_in, is_rounded, map_tensors


class Follower:
    """Hooks on one replica for one call, and the thread's body."""

    def __init__(self, replica: Any, rank: int, call: Call, device: torch.device) -> None:
        self.replica, self.rank, self.call, self.device = replica, rank, call, device
        self.evaluated = 0  # iterations whose denoisers ran
        self._team: Team | None = None
        self._made_from: int | None = None  # its denoisers' fingerprint, until the loop begins
        self._outputs = [Outputs()]  # of each loop, the last one the run's own
        self._skipping = Skipping(replica)
        self._target = 0  # the step to evaluate next
        self._point: torch.Tensor | None = None  # where; None at step 0, which has its own latent
        self._form: Iteration | None = None  # of the run's iterations, once there is a run
        self._xs: list[torch.Tensor] = []  # what steps of the target were handed, and the outputs
        self._ms: list[torch.Tensor] = []
        self._skipped: dict[int, Any] = {}  # by its calls, what iterations on the way work with:
        # the shape alone matters
        self._end: _core.Follower | None = None
        self._listening = Listening()
        self._restart()

    def run(self, arguments: Callable[[], Any], random: torch.Generator) -> None:
        """Follows until the run is over; whatever goes wrong is told to the leader.

        `arguments` gives the call's (args, kwargs), fresh ones for each entry. `random` draws in
        place of torch's global generator, which is the leader's alone.
        """
        state = random.get_state()
        self._team = self.call.teams.get(self.rank)
        if self._team is not None:
            self._made_from = denoisers_print(self.replica)
        try:
            while self._enter(arguments(), random):
                random.set_state(state)
                self._restart()
        except Leave:
            pass
        except BaseException as error:
            self.call.fail(self.rank, describe(error))

    @property
    def _walks(self) -> bool:
        """Whether the replica is in a loop whose run is over, on its way to the next one."""
        return self._loop < len(self._outputs) - 1

    def _restart(self) -> None:
        self._step = self._loop = self._calls = self._between = 0
        self._xs, self._ms = [], []
        self._states: list[torch.Tensor] = []
        self._walk = self._target - 1  # the next iteration not to be passed: that before the target
        self._ordinals: dict[int, int] = defaultdict(int)
        self._encoded: dict[tuple[str, str], int] = defaultdict(int)
        self._began_ns = 0
        self._opened = False  # its team, for this entry's hooks

    def _enter(self, arguments: Any, random: torch.Generator) -> bool:
        """Runs the pipeline's call; True where it is to be entered again."""
        hooks, (args, kwargs) = Hooks(), arguments
        self._draws = OwnDraws(random)
        try:
            self._place(hooks)
            self._generators = generators_in(args, kwargs)
            self._skipping.watch(random, (*args, *kwargs.values()))
            with self._draws:
                self.replica(*args, **kwargs)
        except GoBack:
            return True
        finally:
            hooks.restore()
            self.replica.as_made.restore()
        return self._ran_out()

    def _ran_out(self) -> bool:
        """The loop is shorter than its scheduler's list of steps: those beyond have no output, and
        the leader will not ask for any.
        """
        if self._end is None:
            raise RuntimeError("the replica's call ended before the first step")
        if self._skipping.known:  # or iterations were passed that were none
            self._skipping.give_up()
            return True
        while self._target >= self._step:
            self._hand_in(torch.full_like(self._m, torch.nan))
            self._take_work()
        return True

    def _place(self, hooks: Hooks) -> None:
        for name, module in denoisers_of(self.replica).items():
            hooks.wrap_call(module, self._forward_of(name, module))
        hooks.wrap_encoders(self.replica, self._replay_of)
        hooks.wrap(self.replica.scheduler, "step", self._step_hook)  # and of copies of that
        if hasattr(self.replica.scheduler, "set_timesteps"):
            hooks.wrap(self.replica.scheduler, "set_timesteps", self._set_timesteps)
        self._skipping.place(hooks, self.replica, self._passed)

    def _passed(self) -> bool:
        if self._walks or self._step >= self._walk:
            return False
        scheduler = self.replica.scheduler
        _count_step(scheduler, self._skipping.first)
        self._step += 1
        return True

    def _replay_of(self, key: tuple[str, str]) -> Callable[..., Any]:
        module = getattr(self.replica, key[0])

        def hook(original: Any, *args: Any, **kwargs: Any) -> Any:
            ordinal = self._encoded[key]
            self._encoded[key] += 1
            told = self.call.encoded(key, ordinal)
            if not told:
                return original(*args, **kwargs)
            output, heard = map_tensors(lambda t: t.to(self.device, copy=True), told[0])
            self._listening.say(module, heard)
            return output

        return hook

    def _forward_of(self, name: str, module: torch.nn.Module) -> Any:
        compiled = is_compiled(module)

        def hook(run: Any, *args: Any, **kwargs: Any) -> Any:
            if self.call.over:
                raise Leave
            if self._calls > 0:
                raise RuntimeError("the replica's iteration has fewer steps than the leader's")
            if self._between > 0:  # calls of it that belong to no iteration, and fill caches
                self._between -= 1
                with self._draws.lifted():
                    return run(*args, **kwargs)
            ordinal, inputs = self._ordinals[id(module)], inputs_in(args, kwargs)
            self._ordinals[id(module)] += 1
            if self._end is None and not self._walks:
                self.call.arrive(self.rank)
            if self._walks or self._step != self._target:
                fake = self._outputs[self._loop].fake(module, ordinal, inputs)
                if fake is not None:
                    return fake
            if self._walks:
                return run(*args, **kwargs)
            first = self._step == self._target and self._began_ns == 0
            if first:
                self._began_ns = _core.now_ns()
                self.evaluated += 1
            watched = self._step == 0 and not compiled
            with self._draws.forbidden() if watched else self._draws.lifted():
                if self._team is not None and self._step == self._target:
                    if first:
                        self._begin_in_team(self._team)
                    output = self._team.call(name, run, args, kwargs)
                elif self.call.meeting is None or self._step != self._target:
                    output = run(*args, **kwargs)
                else:
                    call = self.call.meeting.call
                    output = call(self.rank, name, ordinal, first, run, args, kwargs)
            if self._step == 0:
                self._outputs[-1].keep(module, ordinal, inputs, output)
            return output

        return hook

    def _begin_in_team(self, team: Team) -> None:
        if not self._opened:
            if self._made_from not in (None, denoisers_print(self.replica)):
                team.dissolve(ALTERED)
            self._made_from = None  # what forwards write counts for nothing
            team.open(denoisers_of(self.replica))
        self._opened = True
        team.begin(self.call.steps_before(self._loop) + self._step)

    def _step_hook(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        with self._draws.lifted():
            named = named_arguments(scheduler, args, kwargs) or {}
            if self._walks:
                return self._walked(scheduler, named["timestep"])
            if self._form is None:
                self._join(scheduler, named["timestep"])
            assert self._form is not None
            if self._step == self._target and not self._form.kept[self._calls]:
                self._calls += 1
                return original(*args, **kwargs)
            return self._stepped(self._form, scheduler, named)

    def _join(self, scheduler: Any, timestep: Any) -> None:
        """The run, as soon as there is one. The leader's message of step 0 tells its own first
        latent; ours was evaluated meanwhile.
        """
        self._end = self.call.follower(self.rank)
        self._form, began_ns = self.call.returned, self._began_ns
        self._take_work()
        self._began_ns = began_ns
        self._skipping.begin(scheduler, timestep)
        if self._form.calls > 1:
            self._skipping.give_up()  # copies of the scheduler would not be counted

    def _stepped(self, form: Iteration, scheduler: Any, named: dict[str, Any]) -> Any:
        """What the scheduler's step returns here, in whose iteration the target may lie."""
        call, evaluated = self._calls, self._step == self._target
        self._calls = (call + 1) % form.calls
        if evaluated:
            self._collect(form, call, scheduler, named)
        if evaluated and self._calls == 0:
            self._submit(form, named["timestep"])
            self._take_work()
            if self._walks and form.calls == 1:
                self._calls = call
                return self._walked(scheduler, named["timestep"])
        coming = self._step + 1
        if self._calls == 0:
            self._step = coming
            self._ordinals.clear()
        _count_step(scheduler, named["timestep"])
        # The first of several steps have returned before it was known what comes next.
        if self._calls == 0 and self._target < coming + (evaluated and form.calls > 1):
            raise GoBack
        if coming != self._target and not self._skipping.known:
            if call not in self._skipped:
                self._skipped[call] = self._as_returned(form, call)
            return self._skipped[call]
        self._walk = self._target
        return self._as_returned(form, call)

    def _walked(self, scheduler: Any, timestep: Any) -> Any:
        """What a step of an earlier loop returns: the last ones what the leader's did, with which
        the code goes on that leads to the next loop.
        """
        loop, call = self.call.loops[self._loop], self._calls
        self._calls = (call + 1) % len(loop.returned)
        _count_step(scheduler, timestep)
        if self._calls == 0:
            self._step += 1
            self._ordinals.clear()
        if self._step > loop.steps:
            raise RuntimeError("the replica's loop is longer than the leader's")
        if self._step == loop.steps:
            self._loop, self._step, self._states = self._loop + 1, 0, loop.states
            self._between = loop.calls
            self._walk = self._target - 1
        returned = loop.returned[call]
        return map_tensors(lambda tensor: tensor.to(self.device, copy=True), returned)

    def _set_timesteps(self, scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Between loops: the leader's steps may have drawn, and nothing is stepped here."""
        for generator, state in zip(self._generators, self._states):
            generator.set_state(state)
        self._states = []
        return original(*args, **kwargs)

    def _as_returned(self, form: Iteration, call: int) -> Any:
        """What the leader's step returned, with the point in place of its sample; a copy, since the
        host may edit it in place.
        """
        assert self._point is not None
        part = None
        if form.kept[call]:
            part = form.part(self._point, form.latent_of(call))

        def placed(tensor: torch.Tensor) -> torch.Tensor:
            if part is None or tensor.shape != part.shape or not tensor.is_floating_point():
                return tensor.to(self.device, copy=True)
            return part.to(tensor.dtype, copy=True)

        return map_tensors(placed, form.returned[call])

    def _collect(
        self, form: Iteration, call: int, scheduler: Any, arguments: dict[str, Any]
    ) -> None:
        """One of the target's latents and its output; copies, where others are to come."""
        m, x = arguments["model_output"].detach(), arguments["sample"].detach()
        if form.by_token[form.latent_of(call)]:
            m = tokens.in_rows_measure(m, tokens.shares(scheduler, arguments))
        several = len(form.shapes) > 1
        self._xs.append(x.clone() if several else x)
        self._ms.append(m.clone() if several else m)

    def _submit(self, form: Iteration, timestep: Any) -> None:
        assert self._point is not None
        began_ns, moved = self._began_ns, None
        parts = (form.part(self._point, k) for k in range(len(form.shapes)))
        if not all(map(is_rounded, self._xs, parts)):
            moved = [form.joined(self._xs, self._point.dtype)]
        if self._step > 0 and not self._skipping.check(self._step, timestep, moved is not None):
            raise GoBack  # the target lies elsewhere in this loop, which is to be walked through
        self._m = form.joined(self._ms, widest(m.dtype for m in self._ms))
        self._xs, self._ms = [], []
        self._hand_in(self._m, moved, began_ns)

    def _hand_in(self, m: torch.Tensor, moved: Any = None, began_ns: int = 0) -> None:
        assert self._end is not None
        if self.call.meeting is not None:
            self.call.meeting.done(self.rank)
        self._end.submit([m], moved, began_ns)

    def _take_work(self) -> None:
        assert self._end is not None
        work = self._end.next()
        if work is None:
            self._await_next_loop()
            return
        self._target, point = work[0]
        self._point = point.to(self.device)
        self._began_ns = 0
        self._skipped = {}
        if self.call.meeting is not None and self._target > 0:
            self.call.meeting.begin(self.rank, self._end.company)

    def _await_next_loop(self) -> None:
        """The run is over; there may be another one in the same call."""
        self.call.loop_before(len(self._outputs) - 1)
        self._outputs.append(Outputs())
        self._skipping.give_up()
        self._end, self._form, self._point, self._skipped = None, None, None, {}
        self._target = self._began_ns = 0


def _count_step(scheduler: Any, timestep: Any) -> None:
    """Moves the scheduler's own counter on, which scale_model_input and sigmas are read by."""
    if not hasattr(scheduler, "_step_index"):
        return
    if scheduler._step_index is None:
        scheduler._init_step_index(timestep)
    scheduler._step_index += 1
