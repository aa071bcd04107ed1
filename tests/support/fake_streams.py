"""A stand-in for torch's streams of CUDA devices: each thread has a current one on every device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch


class Stream:
    made = 0

    def __init__(self, device: Any) -> None:
        Stream.made += 1
        self.device = torch.device(device)
        self.synchronized = 0
        self.waited: list[Event] = []

    def synchronize(self) -> None:
        self.synchronized += 1

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)


class Event:
    """`stream`: where it was recorded."""

    stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream = stream


class Streams:
    """In place of `torch.cuda`'s functions, while the test's monkeypatch lasts."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.default = {torch.device("cuda", k): Stream(torch.device("cuda", k)) for k in range(4)}
        self._local = threading.local()
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "current_stream", self.current)

    def current(self, device: Any) -> Stream:
        found = vars(self._local).get("current", {})
        return found.get(torch.device(device), self.default[torch.device(device)])

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        current = vars(self._local).setdefault("current", {})
        before = current.get(stream.device)
        current[stream.device] = stream
        try:
            yield
        finally:
            if before is None:
                del current[stream.device]
            else:
                current[stream.device] = before
