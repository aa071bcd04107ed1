"""Everything that needs a GPU, on whatever number of devices there is: `make gpu`.

    python tests/gpu/run.py --programs build/c/gpu --parts kernels exact --budget 360

Each part runs in processes of its own under a time limit, so that one that fails or hangs leaves
the rest; what would begin after the budget is skipped. Writes out/gpu.json and out/gpu.txt, and
prints the table. Needs torch with CUDA; no network. Without a GPU it says so in one line and
succeeds. `--dry` runs all of it on the CPU and on the stand-in driver, small, to see that it works;
its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
FAKES = ("libcuda.so.1", "libcublas.so.13", "libnccl.so.2")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
PROCESSES = ("spawned", "group")  # functions of processes.py

# Seconds that one command of a part may take. The first three parts are programs in C, the others
# functions of parts.py and processes.py. What is proved comes first, what is measured after it.
PARTS = {
    "kernels": 60,
    "sanitizer": 60,
    "nccl": 60,
    "exact": 90,
    "hosts": 90,
    "spawned": 90,
    "group": 90,
    "rounds": 60,
    "denoisers": 150,
    "one_gpu": 90,
    "half": 120,
}


@dataclass(frozen=True)
class Command:
    """One process of a part; `missing` says why it cannot be run here."""

    name: str
    words: list[str]
    limit: float
    missing: str = ""


def devices() -> int:
    """CUDA devices that the driver reports, without torch."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    if driver.cuInit(0) == 0:
        driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def commands(part: str, count: int, programs: pathlib.Path, dry: bool) -> Iterator[Command]:
    """What a part runs on so many devices."""
    limit = PARTS[part]
    kernels, nccl = str(programs / "kernels"), str(programs / "nccl")
    if part == "kernels":
        check = ["--check"] if dry else []
        for k in range(count):
            yield Command(f"kernels cuda:{k}", [kernels, str(k), *check], limit)
        yield Command("plain, by cuBLAS", [str(programs / "plain"), "0", *check], limit)
    elif part == "sanitizer":
        found = shutil.which("compute-sanitizer")
        for tool in SANITIZERS:
            words = [found or "", f"--tool={tool}", "--error-exitcode=9", kernels, "0", "--check"]
            missing = "" if found and not dry else "compute-sanitizer is not installed"
            yield Command(f"compute-sanitizer {tool}", words, limit, missing)
    elif part == "nccl":
        if dry:
            yield Command("nccl, two processes", [nccl, "0", "1", "--small"], limit)
            return
        yield Command("nccl, two processes on cuda:0", [nccl, "0", "0"], limit)
        missing = "" if count > 1 else "one device"
        yield Command("nccl, cuda:0 and cuda:1", [nccl, "0", "1"], limit, missing)
    else:
        file = "processes" if part in PROCESSES else "parts"
        words = [sys.executable, f"tests/gpu/{file}.py", part, str(count)]
        yield Command(part, words + (["--dry"] if dry else []), limit)


def environment(programs: pathlib.Path, dry: bool) -> dict[str, str]:
    """In a dry run the stand-in libraries come first, for the programs in C alone."""
    fakes = [programs.parent / "fake" / name for name in FAKES]
    preload = {"LD_PRELOAD": ":".join(map(str, fakes))} if dry else {}
    return {**os.environ, **preload}


def ran(command: Command, limit: float, env: dict[str, str] | None) -> dict[str, Any]:
    """The JSON lines that a command printed, and how it ended; ok is None where it was skipped."""
    result: dict[str, Any] = {"name": command.name, "ok": None, "seconds": 0.0, "rows": []}
    if command.missing or limit < 5:
        return {**result, "error": command.missing or "no time left"}
    began = time.monotonic()
    try:
        done = subprocess.run(
            command.words, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=env
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        code, err = -1, f"not done in {limit:.0f} s"
    except OSError as error:
        code, out, err = -1, "", str(error)
    for line in out.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            result["rows"].append(json.loads(line))
    result |= {"ok": code == 0, "seconds": round(time.monotonic() - began, 1)}
    return result if code == 0 else {**result, "error": (err or out)[-2000:]}


def measure(options: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    end = time.monotonic() + options.budget
    programs = pathlib.Path(options.programs).resolve()
    results = []
    for part in options.parts:
        in_c = part in ("kernels", "sanitizer", "nccl")
        env = environment(programs, options.dry and in_c)
        for command in commands(part, count, programs, options.dry):
            limit = min(command.limit, end - time.monotonic())
            results.append(ran(command, limit, env))
            print(results[-1]["name"], verdict(results[-1]), file=sys.stderr, flush=True)
    return results


def verdict(result: dict[str, Any]) -> str:
    return {True: "ok", False: "FAILED", None: "skipped"}[result["ok"]]


def table(results: list[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        lines.append(f"{result['name']}: {verdict(result)} ({result['seconds']} s)")
        if result["ok"] is not True:
            lines.append("    " + result["error"].strip().replace("\n", "\n    "))
        for row in result["rows"]:
            fields = (
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
            lines.append("    " + ", ".join(fields))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", required=True, help="where the programs in C were built")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all of it")
    parser.add_argument("--out", default=str(ROOT / "out"), help="where the figures are written")
    parser.add_argument("--dry", action="store_true", help="without a GPU, on the CPU")
    options = parser.parse_args()
    count = 1 if options.dry else devices()
    if count == 0:
        print("no GPU: nothing was run (the tests of the stand-in driver run without one)")
        return 0
    results = measure(options, count)
    text = table(results)
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps({"devices": count, "parts": results}, indent=1))
    (out / "gpu.txt").write_text(text + "\n")
    print(text)
    return 1 if any(result["ok"] is False for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
