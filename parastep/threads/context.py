"""Followers as threads of this process: what of the caller's context they must be given.

torch keeps grad mode, inference mode, autocast, the default device, the current CUDA device and the
current streams per thread, and new threads inherit none of them.  Used by `sampling` and by
the hosts' adapters.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from . import kept


def _is_cuda(device: Any) -> bool:
    return getattr(device, "type", None) == "cuda"


def finish_work(*devices: Any) -> None:
    """Waits for what this thread has given to its current streams on these devices, so that another
    thread may read the results on a stream of its own.
    """
    torch: Any = sys.modules.get("torch")
    for device in {d for d in devices if _is_cuda(d)}:
        torch.cuda.current_stream(device).synchronize()


def start_thread(
    body: Callable[[], None], name: str, device: Any = None
) -> threading.Thread | kept.Task:
    """Starts a daemon thread: one that hangs does not keep the process. On a CUDA device the one of
    this name, if it is idle, that was there in calls before.
    """
    if _is_cuda(device):
        return kept.start(device, name, body)
    thread = threading.Thread(target=body, name=name, daemon=True)
    thread.start()
    return thread


class HostContext:
    """The calling thread's context, to be entered in the threads of the followers."""

    def __init__(self) -> None:
        self.variables = contextvars.copy_context()
        self.torch: Any = sys.modules.get("torch")
        if self.torch is not None:
            self.grad = self.torch.is_grad_enabled()
            self.inference = self.torch.is_inference_mode_enabled()
            self.autocast = [
                (device, self.torch.get_autocast_dtype(device))
                for device in ("cpu", "cuda", "mps", "xpu")
                if self.torch.is_autocast_enabled(device)
            ]
            self.cache = self.torch.is_autocast_cache_enabled()
            self.device = self.torch.get_default_device()
            self.threads = self.torch.get_num_threads()

    def __getstate__(self) -> dict[str, Any]:
        """For a process of our own: torch's modes, without the variables of Python's context."""
        return {k: v for k, v in vars(self).items() if k not in ("variables", "torch")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.variables, self.torch = contextvars.copy_context(), sys.modules.get("torch")

    @contextlib.contextmanager
    def entered(
        self,
        name: str,
        intraop: int | None = None,
        device: Any = None,
        stream: Any = None,
        home: Any = None,
    ) -> Iterator[None]:
        """The modes of the caller; `intraop` threads of torch here.  On a CUDA device this stream,
        or the one of this name: ranks of one device are not in each other's order.  And on the
        leader's device, `home`, another one: torch copies on a stream of where it copies from,
        which would be the one that the leader works on.

        torch gives what one thread sets to threads that begin later: the number is set back.
        """
        with contextlib.ExitStack() as stack:
            if self.torch is not None:
                if intraop is not None:
                    self.torch.set_num_threads(intraop)
                    stack.callback(self.torch.set_num_threads, self.threads)
                if self.device.type != "cpu":
                    stack.enter_context(self.device)
                if _is_cuda(device):
                    if _is_cuda(home) and home != device:
                        aside = kept.stream_of(home, f"{name}, away")
                        stack.enter_context(self.torch.cuda.stream(aside))
                    stream = stream or kept.stream_of(device, name)
                    stack.enter_context(self.torch.cuda.stream(stream))  # and on its device
                stack.enter_context(self.torch.inference_mode(self.inference))
                stack.enter_context(self.torch.set_grad_enabled(self.grad))
                for device, dtype in self.autocast:
                    again = self.torch.autocast(device, dtype, cache_enabled=self.cache)
                    stack.enter_context(again)
            yield

    def start(
        self,
        target: Callable[[], None],
        name: str,
        intraop: int | None = None,
        device: Any = None,
        stream: Any = None,
        home: Any = None,
    ) -> threading.Thread | kept.Task:
        """A thread in this context, as `start_thread` has it."""

        def body() -> None:
            with self.entered(name, intraop, device, stream, home):
                target()

        finish_work(device, home)
        variables = self.variables.copy()
        return start_thread(functools.partial(variables.run, body), name, device)
