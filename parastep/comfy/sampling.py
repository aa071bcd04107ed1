"""A k-diffusion sampler function run as it is, its model calls answered by the core.

The function gets a `Sampling` where it expects its model. A tensor's way through a call of it: the
latents x at noise level sigma go to the core (`ask`), which answers with an output d, verified or
between two others, turned into denoised latents; or else sends guesses of the coming latents to the
followers, each a thread with a `Lane` of its own, while the model itself runs here, at x or, where
rounds are strided, at a guess further ahead; then takes in what all of them made (`submit`). Called
by `node`; knows no host.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .. import _core
from ..messages import describe
from ..options import Options
from ..quiet import thread_name
from ..report import Report
from ..sampling import serve
from ..speculation import CROWDED, Speculation, give_room, out_of_memory, with_room
from ..stacking import Stacking
from ..threads import HostContext, Task
from ..tracing.kdiffusion import (
    Traced,
    added_functions,
    call_after_guidance,
    noise_ahead,
    to_d,
    to_denoised,
)
from ..tracing.schedulers import NotTraceableError
from .guidance import Guidance, Unguided, telling

# (x, sigma (B,)) -> denoised; a third argument is a function to be called after guidance.
Lane = Callable[..., torch.Tensor]
Sampler = Callable[..., torch.Tensor]
Evaluation = tuple[int, torch.Tensor, Unguided | None]  # when it began, denoised, unguided

_PATIENCE = 10.0  # seconds for followers that are at work when the leader's loop is left


class Host:
    """What of a host reaches into a run; this one has nothing to say, which suits plain callables.

    `interrupt` is what the host raises in a model call that the user cancels.
    """

    interrupt: type[BaseException] = KeyboardInterrupt
    shares = False  # whether others help the leader with its own evaluations

    def begin(self, arguments: dict[str, Any]) -> None:
        """The sampler makes its first call of the model, with these."""

    def cancel(self, on: bool) -> None:
        """Asks all model calls in progress to raise `interrupt`, or no longer."""

    def settle(
        self, denoised: torch.Tensor, sigma: torch.Tensor, arguments: dict[str, Any]
    ) -> torch.Tensor:
        """What the model's own call does to its output whatever that is: the blend of a mask."""
        return denoised

    def unknown(self) -> bool:
        """Whether nobody knows yet that the model is a function of its inputs."""
        return False

    def look_at(self, evaluate: Callable[[], Any]) -> tuple[Any, str | None]:
        """`evaluate()`, with nobody else at work, and why the model is no function, if so."""
        return evaluate(), None

    def altered(self) -> str | None:
        """Why the lanes no longer compute what the model does, or None."""
        return None

    def at(self, rank: int, step: int) -> None:
        """A rank evaluates this step next, in this thread."""

    def leave(self) -> None:
        """Followers are to leave; who helps them need not be waited for."""

    def end(self) -> None:
        """The run is over; helpers of all ranks are to leave."""

    def busy(self) -> bool:
        """Whether helpers are still at work."""
        return False


class Sampling(Speculation):
    """One run of a sampler function; also the model that it is handed."""

    def __init__(
        self,
        model: Any,
        lanes: Sequence[Lane],
        options: Options,
        host: Host | None = None,
        reason: str | None = None,
    ) -> None:
        """`lanes` are the followers', ranks 1 and on; `reason`, where there is one, is why the
        model is to be asked alone from the start.
        """
        super().__init__(reason)
        self._model, self._lanes, self._options = model, list(lanes), options
        self._host = host or Host()
        self.calls = 0  # of the model, by the sampler
        self.evaluated = 0  # times that it ran
        self._interrupted: BaseException | None = None  # in a follower's thread
        self._threads: dict[int, threading.Thread | Task] = {}
        self._arguments: dict[str, Any] = {}
        self._values: list[float] = []  # (N,) noise levels of the calls
        self._sigmas: dict[torch.device, torch.Tensor] = {}  # (N, B) the same, on each device
        self._noise: list[torch.Tensor] | None = None
        self._noise_given = 0
        self._guidance: Guidance | None = None  # of a sampler that uses the unguided output as well
        self._functions: list[Any] = []  # by which it learns of that
        self._seconds = 0.0
        self.began = 0.0  # by time.perf_counter; what the report's times are counted from

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run(
        self,
        function: Sampler,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        options: dict[str, Any],
        traced: Callable[[], Traced],
        **rest: Any,
    ) -> torch.Tensor:
        """`function(model, x, sigmas, extra_args=..., **options, **rest)`, its result and errors.

        `traced` gives the function's rows; it is called only where they are needed.
        """
        began = self.began = time.perf_counter()
        try:
            if (self._lanes or self._options.strides) and self.reason is None:
                self._open(function, x, sigmas, extra_args, options, traced)
            return function(self, x, sigmas, extra_args=extra_args, **rest, **options)
        except self._host.interrupt as error:
            self._interrupted = error
            raise
        finally:
            self._close()
            self._host.end()
            if self._host.busy():
                self._wait_while(self._host.busy, time.monotonic() + _PATIENCE)
            self._seconds = time.perf_counter() - began

    @property
    def report(self) -> Report:
        """What happened, once `run` is over."""
        if self.core is None:
            report = Report(ranks=1, evaluations=[0])
        else:
            report = Report.from_core(self.core.report(), self._options.verified_at)
        alone = self.evaluated - report.rounds
        report.accepted = report.accepted + [1] * max(alone, 0)
        report.steps = self.calls
        report.rounds = report.evaluations[0] = self.evaluated
        report.forwards = sum(report.evaluations)
        report.drift = (report.drift + [math.nan] * report.steps)[: report.steps]
        report.seconds, report.fallback = self._seconds, self.reason
        return report

    # ---- the run's beginning and end -------------------------------------------------------------

    def _open(
        self,
        function: Sampler,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        options: dict[str, Any],
        traced: Callable[[], Traced],
    ) -> None:
        try:
            rows = traced()
            if rows.draws:
                given = (self._model, x, sigmas, extra_args, options)
                self._noise = noise_ahead(rows, function, *given)
            program = rows.program(noise=self._noise is not None)
            if not self._lanes and not program.strides:
                return
            if rows.e is not None:
                self._guidance = Guidance(rows.b, rows.e, x.device)
            devices = [x.device, *(self._place_of(lane, x.device) for lane in self._lanes)]
            places = [d.index if d.type == "cuda" else -1 for d in devices]
            self.core = with_room(
                partial(
                    _core.Leader,
                    program,
                    self._latents(x),
                    ranks=len(devices),
                    devices=places if x.is_cuda else None,
                    **self._options.for_core(),
                )
            )
            self.began = time.perf_counter()
        except (NotTraceableError, _core.Error) as error:
            self.give_up(str(error))
            return
        self._arguments = dict(extra_args)
        self._values = rows.levels.tolist()
        sigmas = rows.levels[:, None].repeat(1, len(x))
        self._sigmas = {device: sigmas.to(device) for device in dict.fromkeys(devices)}
        context = HostContext()
        for rank, lane in enumerate(self._lanes, 1):
            follow = Stacking(partial(self._follow, lane))
            body = partial(serve, self.core.follower(rank), follow)
            # The leader keeps its own number of threads, which its bits may depend on.
            intraop = 1 if devices[rank].type == "cpu" else None
            try:
                self._threads[rank] = context.start(
                    body, thread_name(rank), intraop, devices[rank], home=x.device
                )
            except RuntimeError as error:  # no more threads
                self.core.leave_out(rank, describe(error))

    @staticmethod
    def _place_of(lane: Lane, home: torch.device) -> torch.device:
        """Where a lane's tensors are; the host may leave out the number of the leader's device."""
        device: torch.device = getattr(lane, "device", home)
        unnumbered = device.type == "cuda" and device.index is None
        return torch.device("cuda", 0) if unnumbered else device

    def _close(self) -> None:
        """Followers leave. Where the user cancelled, those at work are made to stop as well: the
        host tells only one model call.
        """
        if self.core is None:
            return
        self.core.finish()
        self._host.leave()
        lost = {line[0] for line in self.core.report()["failures"]}
        patience = time.monotonic() + _PATIENCE
        for rank, thread in self._threads.items():
            until = time.monotonic() + 0.05 if rank in lost else patience
            self._wait_while(thread.is_alive, until, thread.join)

    def _wait_while(
        self,
        at_work: Callable[[], bool],
        until: float,
        wait: Callable[[float], Any] = lambda left: time.sleep(min(left, 0.002)),
    ) -> None:
        """Those at work are told again and again of what the user cancelled."""
        while at_work() and (left := until - time.monotonic()) > 0:
            if self._interrupted is not None:
                self._host.cancel(True)
                left = min(left, 0.02)
            wait(left)
        if self._interrupted is not None:
            self._host.cancel(False)

    # ---- followers -------------------------------------------------------------------------------

    def _follow(self, lane: Lane, point: torch.Tensor, step: int, rank: int) -> torch.Tensor:
        """In a follower's thread: d at a guess of the latents of this call."""
        self._host.at(rank, step)
        try:
            return self._d(lane, step, point)
        except self._host.interrupt as error:
            self._interrupted = error
            self._host.cancel(True)  # whoever sees it first clears it, and the leader is to see it
            raise

    def _d(self, model: Lane, step: int, point: torch.Tensor) -> torch.Tensor:
        if self._guidance is None:
            sigma = self._sigma(step, point)
            return to_d(point, sigma, model(point, sigma))
        x, other = point.chunk(2)
        sigma, unguided = self._sigma(step, x), Unguided()
        output = self._output(x, sigma, model(x, sigma, unguided), unguided)
        # The parts are guessed alike up to rounding and the core's own guesses of d + q; by the
        # slope with which it rebases, the second output is one at its own point.
        output[len(x) :] += (other - x) * (0.25 / self._values[step])
        if step >= self.calls:  # and not the first round's check, at the call itself
            self._guidance.take(step, output)
        return output

    def _latents(self, x: torch.Tensor) -> torch.Tensor:
        """As the core has them."""
        return (x if self._guidance is None else torch.cat([x, x])).contiguous()

    def _output(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        denoised: torch.Tensor,
        unguided: Unguided | None,
    ) -> torch.Tensor:
        """As the core has it: d, or (d, d + q)."""
        d = to_d(x, sigma, denoised)
        if unguided is None:
            return d
        assert unguided.seen is not None
        return torch.cat([d, to_d(x, sigma, unguided.seen.to(x.device))])

    def _sigma(self, step: int, x: torch.Tensor) -> torch.Tensor:
        return self._sigmas[x.device][step].clone()

    # ---- the model that the sampler calls --------------------------------------------------------

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **arguments: Any) -> torch.Tensor:
        step, self.calls = self.calls, self.calls + 1
        self._host.at(0, step)
        if step == 0:
            self._host.begin(arguments)
        if self.core is not None and self.reason is None:
            self._watch(step, x, sigma, arguments)
        alone = self._alone(x, sigma, arguments) if step == 0 else None
        if self.core is None or self.reason is not None:
            return alone[1] if alone else self._evaluate(x, sigma, None, arguments)
        if self.reason is None and (answer := self._ask(step, x, arguments)) is not None:
            return self._answered(x, sigma, answer, arguments)
        began, denoised, unguided = alone or self._evaluation(x, sigma, arguments)
        if unguided is not None and unguided.seen is None:
            self.give_up("the guider tells nobody of its unguided output")
        if self.reason is None:
            output = self._output(x, sigma, denoised, unguided)
            self.told(self.core.submit, output, began)
            if self._guidance is not None:
                self._guidance.take(step, output)
        self._check_interrupt()
        return denoised

    def _alone(
        self, x: torch.Tensor, sigma: torch.Tensor, arguments: dict[str, Any]
    ) -> Evaluation | None:
        """The first evaluation, before any other's, where the model has to be looked at."""
        led = self.core is not None and self.reason is None
        if not (led or self._host.shares) or not self._host.unknown():
            return None
        evaluate = partial(self._evaluation, x, sigma, arguments)
        made, reason = self._host.look_at(evaluate)
        if reason is not None:
            self.give_up(reason)
            self._close()
            self.core = None  # nobody was asked anything
        return made

    def _evaluation(
        self, x: torch.Tensor, sigma: torch.Tensor, arguments: dict[str, Any]
    ) -> Evaluation:
        """One by the leader, at the latents of a call."""
        self._host.at(0, self.calls - 1)  # it may have evaluated ahead
        began = _core.now_ns()
        unguided = Unguided() if self._guidance is not None else None
        return began, self._evaluate(x, sigma, unguided, arguments), unguided

    def _evaluate(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        unguided: Unguided | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        self.evaluated += 1
        try:
            return self._call_model(x, sigma, unguided, arguments)
        except out_of_memory():
            if not any(getattr(lane, "device", x.device) == x.device for lane in self._lanes):
                raise
        self.give_up(CROWDED)
        self._close()  # those at work are through then
        give_room()
        return self._call_model(x, sigma, unguided, arguments)

    def _call_model(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        unguided: Unguided | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        if unguided is None:
            return self._model(x, sigma, **arguments)
        with telling(arguments["model_options"], unguided):
            return self._model(x, sigma, **arguments)

    def _answered(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        answer: torch.Tensor,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """Denoised latents by the core's answer, of which the sampler's functions are told."""
        d, *unguided = answer.split(len(x))
        denoised = to_denoised(x, sigma, d)
        if self._guidance is not None:
            self._guidance.take(self.calls - 1, answer)
            given = (x, sigma, denoised, to_denoised(x, sigma, *unguided))
            call_after_guidance(self._functions, *given)
        return self._host.settle(denoised, sigma, arguments)

    def _ask(self, step: int, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor | None:
        """d of this call by a verified output, or interpolated; None: to be evaluated."""
        assert self.core is not None
        self._give_noise(step)
        x = self._latents(x)
        answer = torch.empty_like(x, memory_format=torch.contiguous_format)
        while True:
            answered = self.told(self.core.ask, step, x, answer)
            self._check_interrupt()
            if answered is not None or self.reason is not None:
                return answer if answered else None
            self._evaluate_ahead(arguments)

    def _evaluate_ahead(self, arguments: dict[str, Any]) -> None:
        """A round in which the model runs at guesses ahead of this call, as in a follower."""
        assert self.core is not None
        model = partial(self._evaluate, unguided=None, arguments=arguments)
        work = self.told(self.core.work) or []
        outputs = []
        for step, point in work:
            self._host.at(0, step)
            outputs.append(self._d(model, step, point))
        for take, given in ((self.core.fill, outputs), (self.core.submit, None)):
            if self.reason is None:
                self.told(take, given)

    def _give_noise(self, step: int) -> None:
        """Noise of the rows that the next guesses may pass; what q adds is told anew each time."""
        assert self.core is not None
        horizon = min(self.core.horizon, len(self._values))
        if self._guidance is not None:
            for later, z in enumerate(self._guidance.ahead(step, horizon), step):
                drawn = 0.0 if self._noise is None else self._latents(self._noise[later])
                self.told(self.core.noise, later, z + drawn)
        elif self._noise is not None:
            for later in range(max(self._noise_given, step), horizon):
                self.told(self.core.noise, later, self._noise[later])
            self._noise_given = max(self._noise_given, horizon)

    def _watch(
        self, step: int, x: torch.Tensor, sigma: torch.Tensor, arguments: dict[str, Any]
    ) -> None:
        """Ends speculation where this is not the call that followers evaluated ahead."""
        if step == 0 and self._guidance is not None:
            self._learn_functions(arguments)
        given = self._arguments
        if step >= len(self._values) or sigma.tolist() != [self._values[step]] * len(x):
            self.give_up("the sampler asks at other noise levels than it did when it was traced")
        elif arguments.keys() != given.keys() or any(arguments[k] is not given[k] for k in given):
            self.give_up("the sampler changes the arguments of the model")
        elif (reason := self._host.altered()) is not None:
            self.give_up(reason)

    def _learn_functions(self, arguments: dict[str, Any]) -> None:
        """The options with the sampler's functions are those that the next calls are to have."""
        before, now = (a.get("model_options") or {} for a in (self._arguments, arguments))
        functions = added_functions(before, now)
        if functions is None:
            return self.give_up("the sampler changes the options of the model")
        self._functions = functions
        self._arguments = {**self._arguments, "model_options": now}

    def _check_interrupt(self) -> None:
        if self._interrupted is not None:
            raise self._interrupted
