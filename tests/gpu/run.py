"""Everything that needs a GPU, on whatever number of devices there is: `make gpu`.

Each part runs in a process of its own under a time limit, so that one that fails or hangs leaves
the rest. Writes out/gpu.json and out/gpu.txt, and prints the table. Needs torch with CUDA; no
network. Without a GPU it says so in one line and succeeds. `--dry` runs the parts that can run on a
CPU there, small, to see that they work; its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROCESSES = ("spawned", "group")  # functions of processes.py
PARTS = ("exact", "rounds", "one_gpu", "denoisers", *PROCESSES)  # the others: of parts.py
LIMIT = 900  # seconds a part

Rows = list[dict[str, Any]]


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


def ran(name: str, command: list[str]) -> dict[str, Any]:
    """The JSON lines that a command printed, and how it ended."""
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        code, out, err = -1, "", f"not done in {LIMIT} s"
    rows: Rows = []
    for line in out.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    seconds = round(time.monotonic() - began, 1)
    result: dict[str, Any] = {"name": name, "ok": code == 0, "seconds": seconds, "rows": rows}
    if code != 0:
        result["error"] = (err or out)[-2000:]
    return result


def measure(count: int, program: str, dry: bool) -> list[dict[str, Any]]:
    results = [ran(f"kernels cuda:{k}", [program, str(k)]) for k in range(count)]
    sanitizer = shutil.which("compute-sanitizer")
    if count and sanitizer:
        for tool in ("memcheck", "racecheck", "synccheck"):
            command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", program, "0", "--check"]
            results.append(ran(f"compute-sanitizer {tool}", command))
    elif count:
        results.append({"name": "compute-sanitizer", "ok": None, "error": "not installed"})
    for part in PARTS:
        file = "processes" if part in PROCESSES else "parts"
        command = [sys.executable, f"tests/gpu/{file}.py", part, str(count)]
        results.append(ran(part, command + (["--dry"] if dry else [])))
    return results


def table(results: list[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        verdict = {True: "ok", False: "FAILED", None: "skipped"}[result["ok"]]
        lines.append(f"{result['name']}: {verdict} ({result.get('seconds', 0)} s)")
        if result["ok"] is not True:
            lines.append("    " + result["error"].strip().replace("\n", "\n    "))
        for row in result.get("rows", []):
            fields = (
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
            lines.append("    " + ", ".join(fields))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True, help="tests/gpu/kernels.c, compiled")
    parser.add_argument("--dry", action="store_true", help="without a GPU, on the CPU")
    options = parser.parse_args()
    count = 0 if options.dry else devices()
    if count == 0 and not options.dry:
        print("no GPU: nothing was run (the tests of the stand-in driver run without one)")
        return 0
    results = measure(count, options.program, options.dry)
    text = table(results)
    out = ROOT / "out"
    out.mkdir(exist_ok=True)
    (out / "gpu.json").write_text(json.dumps({"devices": count, "parts": results}, indent=1))
    (out / "gpu.txt").write_text(text + "\n")
    print(text)
    return 1 if any(result["ok"] is False for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
