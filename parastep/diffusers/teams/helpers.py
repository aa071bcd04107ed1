"""Helpers: devices that serve a rank with forwards, and know nothing of steps, rounds or loops.

A helper here is a thread with denoisers of its own, those of a replica. It takes calls in the order
they are made and hands back what the denoiser gave, on the device of the one who asked.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import torch

from ...quiet import thread_name
from ...threads import HostContext, Task, finish_work
from ..compiling import is_compiled
from ..draws import Drawn, OwnDraws
from ..forwards import Inputs, is_finite
from ..parts import denoisers_of
from ..tensors import map_tensors


class Served(NamedTuple):
    """What a forward gave, finished, on the asker's device; `flaw`: why it must not be used, NAN or
    what makes the denoiser no function of its inputs; `kept`: the output where it was made, which a
    later forward of the helper's may be given back.
    """

    output: Any
    flaw: str | None
    kept: Any = None


NAN = "holds NaN or Inf"


class CannotBeSent(Exception):
    """A call that no helper elsewhere can be given; the text says why."""


class Helper(Protocol):
    """`place`: which of the pipeline's devices it is on, `where`: what reports call that; `lost`:
    why it serves no more, or None.
    """

    device: torch.device
    place: int
    where: str
    lost: str | None

    def start(self, name: str, inputs: Inputs, watched: bool = False) -> Future[Served]:
        """Has the denoiser of this name called; `watched`: a random draw in it is an error.

        The answer's exception is what the denoiser raised, CannotBeSent, or an error of
        parastep's own where the helper is gone.
        """

    def close(self, patience: float) -> bool:
        """Nothing more is asked for; whether its replica may be used again."""


def evaluated(
    module: torch.nn.Module, args: Any, kwargs: Any, watched: bool, random: torch.Generator
) -> Served:
    """What a helper's denoiser gives, where it is, for copies of its arguments: what it writes to
    them is to be the head's doing, and shows in their versions.
    """
    with torch.inference_mode(False):
        inputs = Inputs(args, kwargs).own_copy()
    before = inputs.state
    try:
        if watched and not is_compiled(module):
            with OwnDraws(random) as draws, draws.forbidden():
                output = module(*inputs.args, **inputs.kwargs)
        else:
            output = module(*inputs.args, **inputs.kwargs)
    except Drawn as error:
        return Served(None, str(error))
    output = map_tensors(_settled, output)
    if inputs.state != before:
        return Served(None, "its denoiser writes to its own inputs")
    return Served(output, None if is_finite(output) else NAN, output)


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    """A collective's result is no memory until somebody has waited for it."""
    settle = getattr(tensor, "trigger_wait", None)  # of torch's AsyncCollectiveTensor
    return tensor if settle is None else settle()


class _Job(NamedTuple):
    name: str
    inputs: Inputs
    watched: bool
    ready: Any  # on CUDA devices: the event after which the inputs may be read
    answer: Future[Served]


class LocalHelper:
    """A thread of this process, from its first call to the end of the pipeline's."""

    def __init__(self, replica: Any, device: torch.device, home: torch.device, place: int) -> None:
        self.device, self.place, self.where = device, place, str(device)
        self.lost: str | None = None
        self._home = home
        self._modules = denoisers_of(replica)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | Task | None = None
        self._lock = threading.Lock()
        self._brought: dict[str, dict[Any, tuple[torch.Tensor, torch.Tensor]]] = {}

    def start(self, name: str, inputs: Inputs, watched: bool = False) -> Future[Served]:
        with self._lock:
            if self._thread is None:  # in the modes of who calls first, as the head's own call
                context = HostContext()
                named = f"{thread_name(self.place)}-helper"
                self._thread = context.start(
                    self._serve, named, context.threads, self.device, home=self._home
                )
        ready = None
        if self._home.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._home))
        job = _Job(name, inputs, watched, ready, Future())
        self._jobs.put(job)
        return job.answer

    def close(self, patience: float) -> bool:
        self._jobs.put(None)
        if self._thread is None:
            return True
        self._thread.join(0.05 if self.lost else patience)
        return self.lost is None and not self._thread.is_alive()

    def _serve(self) -> None:
        random = torch.Generator(self.device)
        with torch.no_grad():
            while (job := self._jobs.get()) is not None:
                try:
                    job.answer.set_result(self._evaluate(job, random))
                except BaseException as error:
                    job.answer.set_exception(error)

    def _evaluate(self, job: _Job, random: torch.Generator) -> Served:
        inputs = self._bring(job)
        module = self._modules[job.name]
        served = evaluated(module, inputs.args, inputs.kwargs, job.watched, random)
        if served.output is None:
            return served
        there = map_tensors(lambda tensor: tensor.to(self._home), served.output)
        finish_work(self.device, self._home)
        kept = served.output if self.device != self._home else None
        return served._replace(output=there, kept=kept)

    def _bring(self, job: _Job) -> Inputs:
        """The inputs on this device; what came before, conditioning most of all, is there."""
        if job.ready is None:  # all in one memory
            return job.inputs
        for device in {self.device, self._home}:
            torch.cuda.current_stream(device).wait_event(job.ready)
        before, now = self._brought.get(job.name, {}), {}

        def bring(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_inference():
                return tensor.to(self.device)
            key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
            now[key] = before.get(key) or (tensor, tensor.to(self.device))
            return now[key][1]

        values = map_tensors(bring, list(job.inputs.values.values()))
        self._brought[job.name] = now
        return job.inputs.with_values(values)
