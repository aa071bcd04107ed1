"""A process of our own: this Python on a module of ours, at the end of a socket.

It looks for modules where this process does, but never in the current folder first: a user's own
`queue.py` there is no part of it. What it writes to stderr is kept, for when it dies.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from .. import _core
from .streams import SocketStream

# The path is in order before anything is imported but sys, which is built in.
_BEGIN = (
    "import sys; _, descriptor, name, *sys.path = sys.argv; import importlib; "
    "importlib.import_module(name).main(int(descriptor))"
)
_TAIL = 4096  # bytes of stderr that its last line is looked for in


class Spawned:
    """Runs `main(descriptor)` of the module `name` there; `stream` is this end of the socket."""

    def __init__(self, name: str) -> None:
        ours, theirs = socket.socketpair()
        self._errors, self._words = tempfile.TemporaryFile(), ""
        self._lock = threading.Lock()
        with theirs:
            try:
                self._process = _start(name, theirs.fileno(), self._errors.fileno())
            except BaseException:
                ours.close()
                self._errors.close()
                raise
        self.stream = SocketStream(ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ending(self) -> str:
        """How it ended, with its own last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.returncode
        how = "killed" if code is None else f"exit status {code}"
        words = self._last_words()
        return f"{how}: {words}" if words else how

    def _last_words(self) -> str:
        """The last line that it wrote to stderr; read aside from the offset that it writes at."""
        with self._lock:
            if not self._errors.closed:
                number = self._errors.fileno()
                end = os.fstat(number).st_size
                text = os.pread(number, _TAIL, max(0, end - _TAIL)).decode(errors="replace")
                lines = [line.strip() for line in text.splitlines() if line.strip()]
                self._words = lines[-1].replace("\0", "?") if lines else ""
            return self._words

    def kill(self) -> None:
        """From any thread; `end` reaps it."""
        self._process.kill()

    def end(self) -> None:
        """Kills it: it holds nothing that would have to be put in order."""
        self._process.kill()
        self._process.wait()
        self._last_words()
        with self._lock:
            self._errors.close()


def _start(name: str, descriptor: int, errors: int) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl-C in a terminal reaches this process alone."""
    if not sys.executable:
        raise _core.UnsupportedError("this Python does not know its own executable")
    return subprocess.Popen(
        [sys.executable, "-c", _BEGIN, str(descriptor), name, *_safe_path()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        pass_fds=[descriptor],
        start_new_session=True,
    )


def _safe_path() -> list[str]:
    """Where this process finds modules, without the current folder, and the package first."""
    package = str(Path(__file__).resolve().parents[2])
    current = os.path.realpath("")
    return [package, *(p for p in sys.path if p and os.path.realpath(p) != current)]
