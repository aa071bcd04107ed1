"""Fuzzes what parses the pipe of a worker, and a rank's connection: frames, on both ends.

    python tests/fuzz/frames.py [SECONDS [SEED]]

A leader's `Link` and a follower's `Follower` are fed good frames with random changes, through a
socket. Whatever comes, the end says once that the connection is over, its threads leave, and the
process has room for the next.
"""

from __future__ import annotations

import queue
import random
import resource
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from parastep import _core
from parastep.diffusers.call import Call
from parastep.diffusers.remote.link import Link, RemoteRank
from parastep.diffusers.remote.packing import pack
from parastep.diffusers.remote.serving import Server
from parastep.options import Options
from parastep.processes.frames import _HEAD, _MAGIC, Kind, read_frame
from parastep.processes.streams import SocketStream

BODIES = [
    b"",
    b"3",
    b"x" * 200,
    pack((("unet", "forward"), torch.ones(2))),
    pack(((1, 4), torch.float32)),
    pack(torch.zeros(1, 4)),
]


def frame(draw: random.Random) -> bytes:
    body = draw.choice(BODIES)
    kind = draw.choice([int(kind) for kind in Kind if kind != Kind.HELLO])
    call, count = draw.choice([0, 1, 1, 1, 2, 2**64 - 1]), len(body)
    if draw.random() < 0.1:
        count = draw.choice([0, 1, count + 1, 2**32, 2**40, 2**64 - 1])
    if draw.random() < 0.1:
        kind = draw.randrange(2**16)
    data = bytearray(_HEAD.pack(_MAGIC, kind, 0, call, count) + body)
    while draw.random() < 0.2:
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data[: draw.randrange(len(data)) if draw.random() < 0.05 else len(data)])


class Bytes:
    """A stream of bytes that ends."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def get(self, count: int) -> bytearray:
        piece = self.data[self.at : self.at + count]
        self.at += count
        if len(piece) < count:
            raise EOFError
        return bytearray(piece)


def read(draw: random.Random) -> None:
    stream: Any = Bytes(b"".join(frame(draw) for _ in range(4)))
    try:
        while True:
            read_frame(stream)
    except (EOFError, _core.ProtocolError):
        pass


def feed(theirs: socket.socket, draw: random.Random) -> None:
    try:
        for _ in range(draw.randint(1, 6)):
            theirs.sendall(frame(draw))
    except OSError:
        pass  # it has had enough
    theirs.shutdown(socket.SHUT_WR)


def lead(draw: random.Random) -> None:
    ours, theirs = socket.socketpair()
    call = Call(2)
    with ours, theirs:
        link = Link(SocketStream(ours), "fuzz-link", True)
        rank = RemoteRank(link, 1, 1, call)
        call.remote[1] = rank
        call.begin_remote(b"arguments")
        program = _core.Program.euler([4.0, 2.0, 1.0])
        x = torch.ones(1, 4)
        leader = call.lead(program, x, Options(deadline=5.0))
        feed(theirs, draw)
        call.open(leader, x, patience=5.0)
        for step in range(2):
            if not leader.ask(step, x, leader.output()):
                leader.submit(x)
        leader.finish()
        assert link.wait(lambda: False, time.monotonic() + 5.0) and not link.alive
        link.peer.close()


def follow(draw: random.Random) -> None:
    ours, theirs = socket.socketpair()
    gone: queue.SimpleQueue[str] = queue.SimpleQueue()
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with ours, theirs:
        end = Server(
            SocketStream(ours), 1, torch.device("cpu"), calls.put, lambda frame: None, gone.put
        )
        feed(theirs, draw)
        gone.get(timeout=5.0)
        end.peer.close()
    assert gone.empty()
    while not calls.empty():
        call = calls.get()
        call.end()
        end.serve(call, None)  # rubbish for arguments: it fails, and says so to nobody


def main(seconds: float, seed: int) -> None:
    print(f"frames: seed {seed}")
    torch.set_num_threads(1)
    failed: list[Any] = []
    threading.excepthook = failed.append  # an exception that escapes from a thread
    begin, count = threading.active_count(), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        draw = random.Random(f"{seed} {count}")
        try:
            for part in (read, lead, follow):
                part(draw)
            assert not failed, failed
        except BaseException:
            print(f"frames: seed {seed}, number {count}", file=sys.stderr)
            raise
        count += 1
    until = time.monotonic() + 5
    while threading.active_count() > begin:
        assert time.monotonic() < until, threading.enumerate()
        time.sleep(0.01)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert most < 4096, f"{most:.0f} MB"  # lengths that are lies are never taken at their word
    print(f"frames: {count} connections on each end")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(float(given[0]) if given else 5, int(given[1]) if len(given) > 1 else time.time_ns())
