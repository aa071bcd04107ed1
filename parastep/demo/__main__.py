"""`python -m parastep.demo`: three generations sequentially and with parastep, to see and to hear.

Small trained models in real diffusers pipelines make coloured digits, clips of digits that move,
and spoken digits. A table for each gives rounds (model forwards of wall time), wall time and
distance to the sequential result; pictures, a GIF and WAV files go into out/.
"""

from __future__ import annotations

import argparse
import pathlib
import warnings
from typing import Any

from tqdm.auto import tqdm

from . import NAMES, load, runs, show

CLASSES = {"image": list(range(10)), "video": [3, 8, 5, 2], "sound": [0, 3, 7, 6]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m parastep.demo", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tolerance", type=float, help="parastep's own default if not given")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    chosen = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    options: dict[str, Any] = {}
    if chosen.tolerance is not None:
        options["tolerance"] = chosen.tolerance
    found = {}
    with tqdm(total=9 * len(chosen.models), desc="demo", unit="run") as bar:
        for name in chosen.models:
            job = runs.Job(load(name), CLASSES[name], steps=chosen.steps)
            found[name] = runs.compare(job, bar, **options)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name, each in found.items():
        print(f"\n{name}, {len(CLASSES[name])} at once\n{runs.table(each)}")
    written = [chosen.out / "demo.png"]
    show.overview(found, written[0])
    if "video" in found:
        written.append(chosen.out / "demo.gif")
        show.animation(found["video"], written[-1])
    if "sound" in found:
        written += show.voices(found["sound"], chosen.out / "demo")
    print("\nwritten:", *written)


if __name__ == "__main__":
    main()
