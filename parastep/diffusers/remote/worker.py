"""What runs in a worker: it loads pipelines, follows calls, and ends with its pipe."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import sys
import warnings
from typing import Any

import torch

from ...messages import describe
from ...processes.frames import Frame, Kind, read_frame
from ...processes.streams import SocketStream
from .packing import pipeline_from_memory
from .serving import RemoteCall, Server


class _Life:
    """A worker's life: loads pipelines, follows calls, ends with its pipe."""

    def __init__(self, stream: SocketStream, rank: int, device: torch.device) -> None:
        self._stream, self._device = stream, device
        self._replica: Any = None
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()  # calls, and models to be loaded
        self._server = Server(stream, rank, device, self._jobs, self._other, self._gone)

    def _gone(self, why: str) -> None:
        os._exit(0)  # the leader is, and whoever computes or hangs here does it for nobody

    def _other(self, frame: Frame) -> None:
        if frame.kind == Kind.MODEL and self._stream.descriptors:
            self._jobs.put(self._stream.descriptors.popleft())

    def run(self) -> None:
        while True:
            job = self._jobs.get()
            if isinstance(job, RemoteCall):
                self._server.serve(job, self._replica)
            else:
                self._load(job)

    def _load(self, memory: int) -> None:
        self._replica, why = None, ""
        try:
            self._replica = pipeline_from_memory(memory, self._device)
        except BaseException as error:  # a class that cannot be imported here, no memory, ...
            why = describe(error)
        finally:
            os.close(memory)
        self._server.peer.send(Kind.LOADED, 0, why.encode())


def main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader's user means the leader
    stream = SocketStream(socket.socket(fileno=descriptor))
    hello = json.loads(read_frame(stream).body)
    sys.path[:] = hello["path"]
    logging.disable(logging.CRITICAL)  # the leader says it, once
    warnings.simplefilter("ignore")
    device = torch.device(hello["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whatever says no more than "cuda" means this one
    _Life(stream, hello["rank"], device).run()
