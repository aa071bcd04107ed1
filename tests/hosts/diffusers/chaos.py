"""Faults drawn at random for followers in worker processes; `make chaos` runs it.

    python tests/hosts/diffusers/chaos.py 50

Every one of them is survived, and at the end no process, thread or descriptor is left. A call that
hangs ends all with a traceback.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
from hosting import children, threads
from survival import GENTLE, HARD, make, run, survive


def held() -> tuple[set[int], int, list[str]]:
    """Processes, descriptors (models go over as memory that is one) and threads of ours."""
    return children(), len(os.listdir("/proc/self/fd")), threads()


def main(count: int) -> None:
    draw, seen = random.Random(7), dict.fromkeys(GENTLE + HARD, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with make(folder) as together:  # what torch and threads hold from their first use on
            run(together)
        together.close()
        before = held()
        together = make(folder)
        run(together)
        for _ in range(count):
            what = draw.choice(GENTLE + HARD)
            survive(together, folder, what, draw)
            seen[what] += 1
        together.close()
        del together
        gc.collect()
        end = time.monotonic() + 20
        while held() != before:
            assert time.monotonic() < end, (before, held())
            time.sleep(0.05)
    print(f"{count} faults of workers:", ", ".join(f"{what} {n}" for what, n in seen.items()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
