"""Everything that needs a GPU, on whatever number of devices there is: `make gpu`.

    python tests/gpu/run.py --programs build/c/gpu --parts kernels exact --budget 360

Each part runs in processes of its own under a time limit, so that one that fails or hangs leaves
the rest; what would begin after the budget is skipped. gpu.json and gpu.txt are written anew
whenever a part has a result, so that nothing is lost where all of this is ended; the table is
printed at the end. A figure that has a target says whether it is met. Needs torch with CUDA; no
network. Without a GPU it says so in one line and succeeds. `--dry` runs all of it on the CPU and on
the stand-in driver, small, to see that it works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
FAKES = ("libcuda.so.1", "libcublas.so.13", "libnccl.so.2")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
IN_C = ("kernels", "nccl", "sanitizer")
SKIPPED = 77  # the exit code of a program that has nothing to show here, and has said why
NOT_SUPPORTED = "Device not supported"  # what compute-sanitizer says where it cannot attach
PROCESSES = ("workers", "group", "pairs")  # of processes.py; the others are those of parts.py

# Seconds that one command of a part may take, in the order of what they are worth.
PARTS = {
    "kernels": 60,
    "nccl": 90,
    "hosts": 90,
    "exact": 90,
    "one_gpu": 90,
    "end_to_end": 240,
    "memory": 60,
    "denoisers": 120,
    "workers": 90,
    "group": 90,
    "pairs": 90,
    "rounds": 60,
    "half": 120,
    "sanitizer": 60,
}

Row = dict[str, Any]
# (what a row is, its figure, at most (1) or at least (-1), the bound).
TARGETS: list[tuple[Callable[[Row], bool], str, int, float]] = [
    (lambda row: row.get("part") == "lincomb", "of_copy_of_as_many_bytes", -1, 0.85),
    (lambda row: row.get("part") == "lincomb" and row["inputs"] == 20, "us", 1, 40.0),
    (lambda row: row.get("part") == "ask" and row["KB"] <= 2048, "us", 1, 25.0),
    (lambda row: "wall_over_rounds" in row, "wall_over_rounds", 1, 1.02),
    (lambda row: "reserved_GiB" in row, "growth", 1, 1.05),
]


@dataclass(frozen=True)
class Command:
    """One process of a part; `missing` says why it cannot be run here, `wanted` what must be in
    what it prints.
    """

    name: str
    words: list[str]
    limit: float
    missing: str = ""
    wanted: str = ""


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


def wheels() -> list[str]:
    """Folders of libraries of CUDA that wheels have brought, cuBLAS's and NCCL's among them."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return [str(lib) for place in places for lib in sorted(pathlib.Path(place).glob("*/lib"))]


def commands(part: str, count: int, programs: pathlib.Path, dry: bool) -> Iterator[Command]:
    """What a part runs on so many devices."""
    limit = PARTS[part]
    kernels, nccl = str(programs / "kernels"), str(programs / "nccl")
    if part == "kernels":
        check = ["--check"] if dry else []
        for k in range(count):
            yield Command(f"kernels cuda:{k}", [kernels, str(k), *check], limit)
        cases = [str(programs / "cases"), "0", "100" if dry else "400"]
        yield Command("random cases", cases, limit)
        # Without cuBLAS passes go through the host, which would prove nothing of it.
        there = any(next(pathlib.Path(lib).glob("libcublas.so*"), None) for lib in wheels())
        plain, wanted = [str(programs / "plain"), "0", *check], "cuBLAS 1" if there else ""
        yield Command("plain, by cuBLAS", plain, limit, wanted=wanted)
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


def environment(programs: pathlib.Path, dry: bool, in_c: bool) -> dict[str, str]:
    """For the programs in C: the wheels' libraries, which torch finds by itself; in a dry run the
    stand-ins ahead of all.
    """
    env = dict(os.environ)
    if in_c:
        before = env.get("LD_LIBRARY_PATH", "")
        env["LD_LIBRARY_PATH"] = ":".join([*filter(None, [before]), *wheels()])
    if dry and in_c:
        fakes = [programs.parent / "fake" / name for name in FAKES]
        env["LD_PRELOAD"] = ":".join(map(str, fakes))
    return env


# ---- one command ---------------------------------------------------------------------------------


def rows_in(text: str) -> list[Row]:
    rows: list[Row] = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(row := json.loads(line), dict):
                rows.append(row)
    return rows


def judged(row: Row) -> Row:
    """With a figure's target and whether it is met."""
    for fits, figure, sign, bound in TARGETS:
        if fits(row) and figure in row:
            at = "at most" if sign > 0 else "at least"
            met = "met" if sign * row[figure] <= sign * bound else "MISSED"
            row = {**row, f"target for {figure}": f"{at} {bound:g}: {met}"}
    return row


def started_by(pid: int) -> list[int]:
    """The processes below one, whatever session they are in: torchrun gives each rank its own."""
    below: dict[int, list[int]] = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            below.setdefault(parent, []).append(int(stat.parent.name))
    found = list(below.get(pid, []))
    for child in found:
        found += below.get(child, [])
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """It, and all that it started: ranks that go on would disturb what is measured next."""
    own = started_by(process.pid) if process.poll() is None else []
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        if kind == signal.SIGTERM and own:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)  # torchrun ends its ranks itself
    for pid in own:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def ran(
    command: Command,
    limit: float,
    env: dict[str, str],
    out: pathlib.Path,
    told: Callable[[Row], None],
) -> Row:
    """The JSON lines that a command printed, and how it ended; ok is None where it was skipped.
    `told` hears of it whenever there are more of them.
    """
    result: Row = {"name": command.name, "ok": None, "seconds": 0.0, "rows": []}
    if command.missing or limit < 5:
        return {**result, "error": command.missing or "no time left"}
    began = time.monotonic()
    printed, errors = out / "printed.txt", out / "errors.txt"
    result["error"] = f"not done in {limit:.0f} s"
    try:
        with printed.open("wb") as to, errors.open("wb") as aside:
            process = subprocess.Popen(
                command.words, cwd=ROOT, stdout=to, stderr=aside, env=env, start_new_session=True
            )
            try:
                while process.poll() is None and time.monotonic() - began < limit:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.5)
                    rows = rows_in(printed.read_text(errors="replace"))
                    if len(rows) > len(result["rows"]):
                        result["rows"] = rows
                        told(result)
                code = process.poll()
            finally:
                end(process)
    except OSError as error:
        return {**result, "ok": False, "error": str(error)}
    text, words = printed.read_text(errors="replace"), errors.read_text(errors="replace")
    result |= {"rows": rows_in(text), "seconds": round(time.monotonic() - began, 1)}
    if code is None:
        return {**result, "ok": False}
    if code != 0:
        ok = None if code == SKIPPED or NOT_SUPPORTED in text + words else False
        return {**result, "ok": ok, "error": (words or text)[-2000:]}
    if command.wanted not in text:
        return {**result, "ok": False, "error": f"it found no {command.wanted}"}
    del result["error"]
    return {**result, "ok": True}


# ---- all of them ---------------------------------------------------------------------------------


class Results:
    """What there is so far, written anew with every piece of it."""

    def __init__(self, out: pathlib.Path, count: int, dry: bool) -> None:
        self.out, self.count, self.dry = out, count, dry
        self.done: list[Row] = []
        out.mkdir(parents=True, exist_ok=True)

    def write(self, running: Row | None = None) -> None:
        parts = [*self.done, *([] if running is None else [running])]
        if not self.dry:
            parts = [{**part, "rows": list(map(judged, part["rows"]))} for part in parts]
        text = {"devices": self.count, "dry": self.dry, "parts": parts}
        for name, content in (("gpu.json", json.dumps(text, indent=1)), ("gpu.txt", table(parts))):
            new = self.out / f"{name}.new"
            new.write_text(content + "\n")
            new.replace(self.out / name)  # whole at any moment

    def add(self, result: Row) -> None:
        self.done.append(result)
        self.write()
        print(result["name"], verdict(result), file=sys.stderr, flush=True)


def measure(options: argparse.Namespace, results: Results, until: float) -> None:
    programs = pathlib.Path(options.programs).resolve()
    for part in options.parts:
        env = environment(programs, options.dry, part in IN_C)
        for command in commands(part, results.count, programs, options.dry):
            limit = min(command.limit, until - time.monotonic())
            results.add(ran(command, limit, env, results.out, results.write))


def verdict(result: Row) -> str:
    return {True: "ok", False: "FAILED", None: "skipped"}[result["ok"]]


def table(results: list[Row]) -> str:
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
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all of it")
    parser.add_argument("--began", type=float, default=time.time(), help="since 1970, of the build")
    parser.add_argument("--out", default=str(ROOT / "out"), help="where the figures are written")
    parser.add_argument("--dry", action="store_true", help="without a GPU, on the CPU")
    options = parser.parse_args()
    until = time.monotonic() + options.budget - (time.time() - options.began)
    count = 1 if options.dry else devices()
    if count == 0:
        print("no GPU: nothing was run (the tests of the stand-in driver run without one)")
        return 0
    results = Results(pathlib.Path(options.out).resolve(), count, options.dry)
    measure(options, results, until)
    print((results.out / "gpu.txt").read_text(), end="")
    return 1 if any(result["ok"] is False for result in results.done) else 0


if __name__ == "__main__":
    sys.exit(main())
