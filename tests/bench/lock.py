"""Threads or processes: what ranks lose to Python's one lock while they launch operations.

A forward of 20 ms spends a part of it launching small operations from Python, as a GPU's denoiser
does, whose kernels run meanwhile. Ranks in threads of one process launch one after the other. The
figure is the wall time of a round over that of a rank alone, which needs a core for each rank.

    python tests/bench/lock.py
    python tests/bench/lock.py --ranks 2 4 --parts 0 25 50 75 100
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _table import arguments, show, write
from _waiting import WAIT, launch
from engine import STEPS, call, parallel_pipeline, piped, waiting_pipeline


def launches_a_second() -> float:
    """Of a thread alone."""
    count, seconds = 20000, []
    for _ in range(5):
        began = time.perf_counter()
        launch(count)
        seconds.append(time.perf_counter() - began)
    return count / min(seconds)


def alone(pipe: Any) -> tuple[float, int]:
    """Seconds and rounds of the untouched pipeline."""
    began = time.perf_counter()
    call(pipe)
    return time.perf_counter() - began, STEPS


def seconds_a_round(run: Callable[[Any], tuple[float, int]], pipe: Any, repeats: int) -> float:
    runs = [run(pipe) for _ in range(repeats)]
    return statistics.median(seconds / rounds for seconds, rounds in runs)


def main() -> None:
    options = arguments("lock", ranks=[2], parts=[0, 25, 50, 75, 100], repeats=5)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rate, rows, found = launches_a_second(), [], []
    for part in options.parts:
        pipe = waiting_pipeline()
        pipe.transformer.launches = round(rate * WAIT * part / 100)
        one = seconds_a_round(alone, pipe, options.repeats)
        for ranks in options.ranks:
            ratio = {}
            for mode in ("threads", "processes"):
                parallel = parallel_pipeline(pipe, ranks, mode)
                ratio[mode] = seconds_a_round(piped, parallel, options.repeats) / one
                parallel.close()
            rows.append([f"{part} %", ranks, *(f"{of_mode:.2f}" for of_mode in ratio.values())])
            found.append({"launching": part / 100, "ranks": ranks, **ratio})
    columns = ["launching", "ranks", "threads", "processes"]
    show(f"a round over a rank alone, {os.cpu_count()} cores", columns, rows)
    write(options.json, {"lock": found})


if __name__ == "__main__":
    main()
