"""Fuzzes what is read of DLPack capsules: any field may hold anything but a lie about memory.

    python tests/fuzz/capsules.py [SECONDS [SEED]]

Each capsule is over an array in the middle of a larger block, and no shape and strides made here
reach out of that block, so that a tensor which is taken in can be read. It must be taken in whole
or refused with an exception, and its deleter called exactly once. A crash is a crash of this
process; a byte read too far shows with an extension built by PARASTEP_SANITIZE.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from handmade import Handmade, OldProducer, Producer

from parastep import _core

ODD = (-(2**63), -(2**31), -1, 0, 1, 2, 2**31 - 1, 2**31, 2**62, 2**63 - 1)
BLOCK = np.zeros(1 << 16, dtype=np.uint8)
MIDDLE = BLOCK[1 << 15 :].view(np.float32)


def shape(draw: random.Random) -> list[int]:
    sizes = [draw.randint(0, 4) for _ in range(draw.randint(0, 6))]
    if sizes and draw.random() < 0.2:
        sizes[draw.randrange(len(sizes))] = draw.choice([-1, -(2**63), 2**62, 2**63 - 1])
    return sizes


def capsule(draw: random.Random) -> Handmade:
    sizes = shape(draw)
    fields = {"shape": sizes, "strides": None}
    if draw.random() < 0.6:
        fields["strides"] = [draw.randint(-8, 8) for _ in sizes]
    elif any(abs(size) > 4 for size in sizes):
        sizes.append(0 if draw.random() < 0.5 else -3)  # a compact tensor that large would be a lie
        fields["shape"] = sizes
    for name, odd in (
        ("code", draw.randint(0, 255)),
        ("bits", draw.choice([0, 1, 7, 8, 16, 32, 64, 128, 255])),
        ("lanes", draw.choice([0, 1, 2, 65535])),
        ("device_type", draw.choice([-1, 0, 1, 2, 3, 11, 13, 2**31 - 1])),
        ("device_id", draw.choice([-1, 0, 1, 2**31 - 1])),
        ("ndim", draw.choice([-(2**31), -1, 0, 9, 64, 2**31 - 1])),
        ("byte_offset", draw.choice([0, 1, 2, 4, 60])),
        ("data", draw.choice([None, BLOCK.ctypes.data + (1 << 15) + draw.randint(0, 9)])),
    ):
        if draw.random() < 0.12:
            fields[name] = odd
    if fields.get("ndim", 0) > len(sizes):  # shape and strides are read up to the most dimensions
        fields["shape"] = sizes + [1] * (64 - len(sizes))
        if fields["strides"] is not None:
            fields["strides"] = fields["strides"] + [0] * (64 - len(sizes))
    ndim = fields.pop("ndim", None)
    made = Handmade(
        MIDDLE,
        versioned=draw.random() < 0.5,
        major=draw.choice([0, 1, 1, 1, 2, 2**32 - 1]),
        minor=draw.choice([0, 3, 2**32 - 1]),
        flags=draw.choice([0, 1, 2, 4, 2**64 - 1]),
        deleter=draw.random() < 0.9,
        **fields,
    )
    made.managed.tensor.ndim = len(sizes) if ndim is None else ndim
    return made


def once(draw: random.Random) -> bool:
    """Whether the tensor was taken in."""
    made = capsule(draw)
    producer = (Producer if made.versioned else OldProducer)(made)
    try:
        if draw.random() < 0.5:
            _core._roundtrip(producer, writable=draw.random() < 0.3)
        else:
            _core.copy(producer)
        taken = True
    except (_core.Error, BufferError, TypeError, ValueError):
        taken = False
    assert made.deleted == bool(made.callback), (made.deleted, taken)
    Handmade.alive.clear()
    return taken


def main(seconds: float, seed: int) -> None:
    print(f"capsules: seed {seed}")
    end, count, taken = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        draw = random.Random(f"{seed} {count}")
        try:
            taken += once(draw)
        except BaseException:
            print(f"capsules: seed {seed}, number {count}", file=sys.stderr)
            raise
        count += 1
    print(f"capsules: {count}, of which {taken} were taken in")
    assert count == 0 or 0 < taken < count


if __name__ == "__main__":
    given = sys.argv[1:]
    main(float(given[0]) if given else 5, int(given[1]) if len(given) > 1 else time.time_ns())
