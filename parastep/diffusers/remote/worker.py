"""What runs in a worker: it loads pipelines, follows calls or helps in them, and ends with its
pipe.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import sys
import warnings
from typing import Any, NamedTuple

import torch

from ...messages import describe
from ...processes.frames import Frame, Kind, read_frame
from ...processes.streams import SocketStream
from ..teams.crew import Cuts
from .helping import RemoteHelper, by_socket, serve
from .packing import pipeline_from_memory
from .serving import RemoteCall, Server, team_of


class _Served(NamedTuple):
    """Who has forwards for this worker in a call, at the other end of a socket."""

    call: int
    descriptor: int


class _Life:
    """A worker's life: loads pipelines, follows calls or helps in them, ends with its pipe."""

    def __init__(self, stream: SocketStream, rank: int, device: torch.device) -> None:
        self._stream, self._device = stream, device
        self._replica: Any = None
        self._cuts = Cuts()  # what was found out, with helpers that were made so
        self._makes: dict[int, int] = {}
        # Calls, those to be served, and models to be loaded.
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._helpers: dict[int, list[RemoteHelper]] = {}  # by call
        self._server = Server(stream, rank, device, self._jobs.put, self._other, self._gone)

    def _gone(self, why: str) -> None:
        os._exit(0)  # the leader is, and whoever computes or hangs here does it for nobody

    def _other(self, frame: Frame) -> None:
        if frame.kind not in (Kind.MODEL, Kind.SERVE, Kind.HELPER) or not self._stream.descriptors:
            return
        descriptor = self._stream.descriptors.popleft()
        if frame.kind == Kind.MODEL:
            self._jobs.put(descriptor)
        elif frame.kind == Kind.SERVE:
            self._jobs.put(_Served(frame.call, descriptor))
        else:
            place, device, made = json.loads(frame.body)
            connect = by_socket(descriptor, place)
            helper = RemoteHelper(connect, torch.device(device), self._device, place)
            self._helpers.setdefault(frame.call, []).append(helper)
            if self._makes.get(place) != made:
                self._cuts.drop(place)
            self._makes[place] = made

    def run(self) -> None:
        while True:
            job = self._jobs.get()
            if isinstance(job, RemoteCall):
                helpers = self._helpers.pop(job.number, [])
                team = team_of(self._device, helpers, self._cuts)
                self._server.serve(job, self._replica, helpers, team)
            elif isinstance(job, _Served):
                self._serve(job)
            else:
                self._load(job)

    def _serve(self, job: _Served) -> None:
        stream = SocketStream(socket.socket(fileno=job.descriptor))
        if self._replica is not None:
            serve(stream, self._replica, self._device)
        stream.close()
        self._server.peer.send(Kind.LEFT, job.call, json.dumps([0, False, None]).encode())

    def _load(self, memory: int) -> None:
        self._replica, self._cuts, why = None, Cuts(), ""
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
