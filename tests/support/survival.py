"""A pipeline on workers that carry out faults, and one fault of a worker survived.

Of each the pipeline's result comes out, to the bit at tolerance 0, but where the fault is Ctrl-C,
which comes out as itself; the call after it is as if nothing had been.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import faults
import tiny
import torch
from hosting import own, parallel, set_options

RANKS, STEPS = 3, 6
HANGS = 900  # seconds after which a call is said to hang; on a busy machine workers start slowly
DEADLINE = 3.0

# Workers stay through the first ones, and are replaced after the others.
GENTLE = ("raise", "nan", "infinity", "memory", "dtype", "interrupt")
HARD = ("kill", "exit", "rubbish", "stop", "hang", "silence", "interrupt start")


def make(folder: Path) -> Any:
    """Stable Diffusion, tiny, on workers that carry out the folder's orders."""
    pipe = tiny.CASES["sd"].build()
    pipe.unet.mid_block.resnets[0] = faults.Faulty(pipe.unet.mid_block.resnets[0], folder)
    return parallel(pipe, RANKS, mode="processes")


def run(together: Any) -> torch.Tensor:
    """A call within its time."""
    faulthandler.dump_traceback_later(HANGS, exit=True)
    try:
        result: torch.Tensor = tiny.run(together, tiny.CASES["sd"].kwargs(steps=STEPS))
    finally:
        faulthandler.cancel_dump_traceback_later()
    return result


def interrupted(together: Any, after: float) -> torch.Tensor | None:
    """A call with Ctrl-C so many seconds after its begin; None where it was not done by then."""
    begun, done = time.monotonic(), False

    def press() -> None:
        time.sleep(after)
        if not done:
            os.kill(os.getpid(), signal.SIGINT)

    key = threading.Thread(target=press)
    result = None
    try:
        key.start()
        result = run(together)
        done = True
        key.join()
    except KeyboardInterrupt:
        assert time.monotonic() - begun >= after
    return result


def survive(together: Any, folder: Path, what: str, draw: random.Random) -> None:
    """One fault, and a call after it."""
    expected = own("sd", STEPS).result
    tolerance = draw.choice(("rehearse", 0.05))
    set_options(together, tolerance=tolerance, deadline=DEADLINE)
    if what == "interrupt start":
        for worker in together._ranks._remote._workers.values():
            worker._process.end()
    elif what != "interrupt":
        faults.order(folder, what, draw.randint(1, STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if what.startswith("interrupt"):
            result = interrupted(together, draw.uniform(0.0, 0.5))
        else:
            result = run(together)
    if result is not None:
        assert result.isfinite().all(), what
        assert tolerance != "rehearse" or torch.equal(result, expected), what
    Path(folder, "order").unlink(missing_ok=True)  # at a tolerance it may not come to it
    set_options(together, tolerance="rehearse", deadline=None)
    assert torch.equal(run(together), expected), what
    assert together.report.failures == [] and together.report.fallback is None, what
