"""ComfyUI: teams. The conditions of one model call, shared out over the devices of a rank.

The head of a team runs its rank's model calls. Where one comes to the conditions that it has to
evaluate (the host's wrappers around `calc_cond_batch`), the team lets the host's own split of CFG
over devices do the sharing: it gives it the models of its devices, and itself in place of the pool
of threads, of which the host has one, without tickets, for a whole run. The head's share is
evaluated by the head's own thread, the others' by helpers, a thread each. The first call is made
whole by all of them, and compared: a helper that computes something else is lost, as is one that
raises, hangs, or gives NaN, and the head evaluates the whole. Knows nothing of rounds, and of the
host what a wrapper is handed. Made by `node` for a run.
"""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from functools import partial
from typing import Any, NamedTuple

import torch

from .. import _core
from ..messages import describe
from ..report import Share, TeamRecord
from ..threads import HostContext, finish_work
from .conditions import active
from .options import CLONES, POOL, copied, map_patches

KEY = "parastep team"  # of the wrapper in model options
KIND = "calc_cond_batch"  # of wrappers around the evaluation of conditions

_WORDS = "conditions (to rounding)"
_SLICE = 0.05  # seconds between looks at whether the run is over
_PATIENCE = 30.0  # for a helper, at least, where no deadline is given
_FIRST = 300.0  # and in its first call: what compiles, or is read from a disk, may be slow
# How far two devices may differ in the same call, relative to its rms, by the model's dtype.
_ROUNDING = {torch.float32: 2.0**-12, torch.float16: 2.0**-9}
_COARSE = 2.0**-7  # bfloat16, and what is stored in less

Call = Callable[[], Any]


class HelperLost(RuntimeError):
    """This rank would go on at its head's speed alone, and others can do without it."""


class _Left(RuntimeError):
    """The run is over."""


class _Unserved(Exception):
    """A helper gave nothing that could be used."""


class Lost(NamedTuple):
    """A helper that serves no more, from which step on, and why."""

    device: torch.device
    step: int
    why: str


class Helper:
    """A thread that evaluates on a device, from its first call to the end of the run."""

    def __init__(self, device: torch.device, home: torch.device, name: str) -> None:
        self.device, self.lost = device, False
        self._home, self._name = home, name
        self._jobs: queue.SimpleQueue[tuple[Call, Any, Future[Any]] | None] = queue.SimpleQueue()
        self._thread: Any = None

    def start(self, call: Call) -> Future[Any]:
        """Its answer may be read when it is there: the work on both devices is finished."""
        if self._thread is None:  # in the modes of who calls first, the head
            context = HostContext()
            self._thread = context.start(
                self._serve, self._name, context.threads, self.device, home=self._home
            )
        ready = None
        if self._home.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._home))
        answer: Future[Any] = Future()
        self._jobs.put((call, ready, answer))
        return answer

    def is_alive(self) -> bool:
        return self._thread is not None and bool(self._thread.is_alive())

    def leave(self) -> None:
        self._jobs.put(None)

    def is_here(self) -> bool:
        """Whether the caller is its thread."""
        return threading.current_thread().name == self._name

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            call, ready, answer = job
            try:
                for device in {self.device, self._home} if ready is not None else ():
                    if device.type == "cuda":
                        torch.cuda.current_stream(device).wait_event(ready)
                made = call()
                finish_work(self.device, self._home)
                answer.set_result(made)
            except BaseException as error:  # the host's interruption is one
                answer.set_exception(error)
            del job, call, ready, answer  # and what they hold


class Team:
    """Of one rank in one run; `put_into(options)` has it share out what these options evaluate.

    Args:
        patchers: the model of each device, the head's first, loaded and ready to run.
        unsplit: why nothing is shared in the whole run, where it is known before.
        deadline: seconds that the rank may take, of which a helper may take half, so that a
            follower is not late with it. None: 30 for the helper, or five times the longest call,
            and 300 for its first one.
        leaves: whether the rank had better leave when a helper is lost.
        raises: a lost helper is a LostError.
        altered: why the model is no function any more, asked before each call.
        interrupt: what the host raises in a call that the user cancels.

    Attributes:
        step: which one is evaluated next, as the report is to have it.
        held: shares nothing for now.
    """

    def __init__(
        self,
        patchers: Mapping[torch.device, Any],
        name: str,
        *,
        unsplit: str | None = None,
        deadline: float | None = None,
        leaves: Callable[[], bool] = lambda: False,
        raises: bool = False,
        altered: Callable[[], str | None] = lambda: None,
        interrupt: type[BaseException] = KeyboardInterrupt,
    ) -> None:
        self.losses: list[Lost] = []
        self.step, self.held = 0, False
        self._patchers = dict(patchers)
        self._head, *others = self._patchers
        numbers = enumerate(others, 1)
        self._helpers = {
            device: Helper(device, self._head, f"{name}-helper{k}") for k, device in numbers
        }
        self._numbers = {device: k for k, device in enumerate(self._patchers)}
        self._known: set[torch.device] = set()  # that compute what the head does
        self._deadline, self._leaves, self._raises = deadline, leaves, raises
        self._altered, self._interrupt = altered, interrupt
        self._reason, self._why = unsplit, ""
        self._over = False
        self._shared = self._whole = 0
        self._longest = self._own_time = self._waited = 0.0
        self._log: list[Share] = []
        self._placed: dict[int, _Placed] = {}

    def __deepcopy__(self, memo: Any) -> Team:
        return self  # packs copy model options deeply

    def put_into(self, options: dict[str, Any]) -> None:
        """Innermost of the wrappers; `options` are the caller's own, in all their depth."""
        wrappers = options.setdefault("transformer_options", {}).setdefault("wrappers", {})
        wrappers.setdefault(KIND, {})[KEY] = [self]

    def dissolve(self, reason: str) -> None:
        """Shares nothing any more."""
        self._reason = self._reason or reason

    def end(self) -> None:
        """The run is over: nobody waits for helpers any more."""
        self._over = True
        for helper in self._helpers.values():
            helper.leave()

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The head's first."""
        return tuple(self._patchers)

    @property
    def busy(self) -> bool:
        """Whether helpers that are not lost are at work."""
        return any(h.is_alive() and not h.lost for h in self._helpers.values())

    @property
    def serving(self) -> list[Helper]:
        return [helper for helper in self._helpers.values() if not helper.lost]

    def record(self) -> TeamRecord:
        """For the report, by the clock of `time.perf_counter`."""
        lost = next((lost.why for lost in self.losses), "")
        why = self._reason or lost or self._why or "nothing was evaluated"
        return TeamRecord(
            devices=[str(device) for device in self._patchers],
            split=_WORDS if self._shared else None,
            unsplit=None if self._shared else why,
            shared=self._shared,
            missed=0,
            whole=self._whole,
            served=tuple(self._log),
            waited=self._waited if self._waited > self._own_time / 4 else 0.0,
        )

    # ---- a call ----------------------------------------------------------------------------------

    def __call__(
        self,
        executor: Any,
        model: Any,
        conds: Any,
        x: torch.Tensor,
        timestep: torch.Tensor,
        options: dict[str, Any],
    ) -> Any:
        """As the host's wrappers around the evaluation of conditions: their outputs."""
        evaluate = partial(executor, model, conds, x, timestep)
        began = time.perf_counter()
        try:
            if not (self._shares(conds, timestep) and self._places(options)):
                return self._whole_by_head(evaluate, options)
            if any(helper.device not in self._known for helper in self.serving):
                return self._tried(evaluate, x, options)
            return self._shared_out(evaluate, options)
        finally:
            self._longest = max(self._longest, time.perf_counter() - began)

    def _shares(self, conds: Any, timestep: torch.Tensor) -> bool:
        if self._reason is None and (altered := self._altered()) is not None:
            self.dissolve(altered)
        if self._reason is not None or not self.serving:
            return False
        if self.held:
            self._why = "what hangs in its model has not been looked at"
            return False
        if active(conds, timestep) < 2:
            self._why = "one condition a call: there is nothing to share"
            return False
        return True

    def _tried(self, evaluate: Any, x: torch.Tensor, options: dict[str, Any]) -> Any:
        """The whole, by the head; and beside it by helpers that have not shown what they compute.
        The host's split evaluates all on one device where it is given one, and in the thread that
        calls it where it has no pool.
        """
        answers = []
        for helper in self.serving:
            if helper.device not in self._known:
                given = self._options(options, [helper.device])
                answers.append((helper, self._start(helper, partial(evaluate, given))))
        outputs = self._whole_by_head(evaluate, options)
        for helper, answer in answers:
            try:
                found = self._served(helper, answer)
                self._compare(helper, found, outputs, x)
            except _Unserved:
                continue
        return outputs

    def _compare(self, helper: Helper, found: Any, wanted: Any, x: torch.Tensor) -> None:
        apart = max(_apart(a, b, x) for a, b in zip(found, wanted, strict=True))
        if apart <= _rounding(self._patchers[self._head].model):
            self._known.add(helper.device)
        else:
            self._lose(helper, f"it does not compute what its head does: {apart:.3g} apart")

    def _shared_out(self, evaluate: Any, options: dict[str, Any]) -> Any:
        pool = _Pool(self)
        devices = [self._head, *(helper.device for helper in self.serving)]
        try:
            outputs = evaluate({**self._options(options, devices), POOL: pool})
        except (_core.Error, HelperLost, _Left):
            raise
        except _Unserved:
            return self._whole_by_head(evaluate, options)
        except Exception as error:  # the whole says whether it is the share's fault
            outputs = self._whole_by_head(evaluate, options)
            for helper in self.serving:
                self._lose(helper, f"the host's split raises {describe(error)}")
            return outputs
        if not pool.used:
            self.dissolve("the host shares nothing out")
            self._whole += 1
            return outputs
        if not all(map(_is_finite, outputs)):
            return self._blamed(pool.used, evaluate, options)
        self._shared += 1
        self._own_time += pool.through - pool.began
        self._waited += time.perf_counter() - pool.through
        return outputs

    def _whole_by_head(self, evaluate: Any, options: dict[str, Any]) -> Any:
        self._whole += 1
        return evaluate(options)

    def _blamed(self, helpers: list[Helper], evaluate: Any, options: dict[str, Any]) -> Any:
        """What holds NaN or Inf, evaluated whole: the model's own, or a helper's."""
        outputs = self._whole_by_head(evaluate, options)
        if all(map(_is_finite, outputs)):
            self._lose(helpers[0], "its output holds NaN or Inf")
        return outputs

    def _options(self, options: dict[str, Any], devices: list[torch.device]) -> dict[str, Any]:
        """Under which the host evaluates on these devices. It writes into them."""
        own = copied(options)
        own[CLONES] = {device: self._patchers[device] for device in devices}
        map_patches(own, lambda patch: self._placed.get(id(patch), patch))
        return own

    def _places(self, options: dict[str, Any]) -> bool:
        """Patches with weights of their own (a hypernetwork's), which the host would have in one
        place at a time, get a copy for each helper; whether they can have one.
        """
        try:
            map_patches(copied(options), self._place)
        except Exception as error:
            self.dissolve(f"a patch of the model cannot be copied: {describe(error)}")
        return self._reason is None

    def _place(self, patch: Any) -> Any:
        if hasattr(patch, "to") and id(patch) not in self._placed:
            self._placed[id(patch)] = _Placed(patch, self._helpers.values())
        return patch

    # ---- helpers ---------------------------------------------------------------------------------

    def _start(self, helper: Helper, call: Call) -> Future[Any]:
        number, step, began = self._numbers[helper.device], self.step, time.perf_counter()

        def note(_: Future[Any]) -> None:
            self._log.append(Share(number, step, began, time.perf_counter()))

        answer = helper.start(call)
        answer.add_done_callback(note)
        return answer

    def _served(self, helper: Helper, answer: Future[Any]) -> Any:
        """A helper's answer; one without, in time, is lost."""
        patience = left = self._patience(helper)
        while True:
            try:
                error = answer.exception(min(_SLICE, left))
                break
            except NotYet:
                left -= _SLICE
            if self._over:
                raise _Left("the run is over")
            if left <= 0:
                self._lose(helper, f"no output within {patience:.3g} s")
                raise _Unserved
        if isinstance(error, self._interrupt):
            raise error
        if error is not None:
            self._lose(helper, describe(error))
            raise _Unserved from error
        return answer.result()

    def _patience(self, helper: Helper) -> float:
        if self._deadline is not None:
            return self._deadline / 2
        return max(_PATIENCE if helper.device in self._known else _FIRST, 5 * self._longest)

    def _lose(self, helper: Helper, why: str) -> None:
        if not helper.lost:
            helper.lost = True
            self.losses.append(Lost(helper.device, self.step, why))
        words = f"its helper on {helper.device} was lost: {why}"
        if self._raises:
            raise _core.LostError(words)
        if self._leaves():
            raise HelperLost(words)


class _Pool:
    """In place of the host's pool of threads, for one call of its split."""

    def __init__(self, team: Team) -> None:
        self.used: list[Helper] = []
        self.began = self.through = time.perf_counter()  # when the head was through with its own
        self._team = team
        self._own: Call | None = None
        self._made: Any = None
        self._answers: dict[torch.device, Future[Any]] = {}

    def submit(self, device: torch.device, function: Any, *args: Any, **kwargs: Any) -> None:
        """A helper begins at once; the head when the first result is asked for."""
        call, helper = partial(function, *args, **kwargs), self._team._helpers.get(device)
        if helper is None:
            self._own = call
        else:
            self.used.append(helper)
            self._answers[device] = self._team._start(helper, call)

    def get_result(self, device: torch.device) -> tuple[Any, None]:
        if self._own is not None:
            call, self._own = self._own, None
            self._made = call()
            finish_work(self._team._head)
            self.through = time.perf_counter()
        if device in self._answers:
            helper = self._team._helpers[device]
            return self._team._served(helper, self._answers[device]), None
        return self._made, None


class _Placed:
    """A patch that is the head's own in its thread, and in each helper's a copy of it there."""

    def __init__(self, patch: Any, helpers: Any) -> None:
        self._patch = patch
        self._copies = [(h, copy.deepcopy(patch).to(h.device)) for h in helpers]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._here()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._here(), name)

    def to(self, *args: Any, **kwargs: Any) -> _Placed:
        """It is in all places."""
        return self

    def _here(self) -> Any:
        return next((own for helper, own in self._copies if helper.is_here()), self._patch)


def _apart(found: torch.Tensor, wanted: torch.Tensor, x: torch.Tensor) -> float:
    """Relative distance of two denoised outputs for x, as far as the model made them: the rest is
    x, which may be a thousand times as large.
    """
    if found.shape != wanted.shape:
        return float("inf")
    if not torch.isfinite(found).equal(torch.isfinite(wanted)):
        return float("inf")
    a, b = found.double().nan_to_num(), wanted.double().nan_to_num()
    size = max(float((x.double() - b).norm()), float(b.norm()))
    distance = float((a - b).norm())
    return distance / size if distance else 0.0


def _rounding(model: Any) -> float:
    """Between devices, by the dtype in which a host's model computes."""
    cast = getattr(model, "manual_cast_dtype", None)
    dtype = cast or (model.get_dtype() if hasattr(model, "get_dtype") else torch.float32)
    return _ROUNDING.get(dtype, _COARSE)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
