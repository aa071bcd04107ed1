"""Runs what nvcc made of the kernels on the CPU, on full blocks: `make check-ptx`.

    python tests/gpu/ptx/check.py --nvcc nvcc --programs build/c/gpu --build build/ptx

The PTX of the lowest architecture of a build and of the newest is translated to C, which becomes a
stand-in for libcuda.so.1; kernels --check and cases then run on that, with 1, 3 and 132
multiprocessors. It shows that nvcc made of the source what was meant, not what ptxas makes of that,
nor how fast it is. Prints one line an architecture; fails where a result is not the CPU backend's.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys

from translate import Translation

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
COMPILE = ROOT / "csrc/backend/compile_kernels.sh"
PROCESSORS = (3, 1, 132)


def architectures(nvcc: str) -> list[str]:
    """The lowest and the newest of those that a build with this nvcc is for."""
    command = ["sh", str(COMPILE), nvcc]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return list(dict.fromkeys([found[0], found[-1]]))


def driver_for(nvcc: str, arch: str, build: pathlib.Path) -> pathlib.Path:
    """A folder with a libcuda.so.1 that runs the kernels' PTX of this architecture."""
    folder = build / arch
    folder.mkdir(parents=True, exist_ok=True)
    ptx, code = folder / "kernels.ptx", folder / "kernels.c"
    subprocess.run(["sh", str(COMPILE), nvcc, str(ptx), arch], check=True)
    code.write_text(Translation(ptx.read_text()).run())
    flags = ["-shared", "-fPIC", "-O1", "-std=gnu11", "-ffp-contract=off", "-Wl,-Bsymbolic"]
    flags += ["-w", f"-I{HERE}", "-Wl,-soname,libcuda.so.1"]
    library = str(folder / "libcuda.so.1")
    sources = [str(code), str(HERE / "driver.c")]
    subprocess.run(["gcc", *flags, *sources, "-o", library], check=True)
    return folder


def checked(driver: pathlib.Path, programs: pathlib.Path, cases: int) -> dict[str, int]:
    """How many checks and random cases ran, and how many of them were wrong."""
    total = {"checks": 0, "cases": 0, "wrong": 0}
    for processors in PROCESSORS:
        env = {**os.environ, "LD_LIBRARY_PATH": str(driver), "PTX_PROCESSORS": str(processors)}
        share = str(cases // len(PROCESSORS))
        for words in (["kernels", "0", "--check"], ["cases", "0", share, str(processors + 41)]):
            command = [str(programs / words[0]), *words[1:]]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            rows = [json.loads(line) for line in done.stdout.splitlines()]
            if not any("kernels of this build" in row.get("found", "kernels of this build")
                       for row in rows) or done.returncode not in (0, 1):  # fmt: skip
                raise SystemExit(f"{' '.join(words)} on {driver.name}: {done.stdout}{done.stderr}")
            for row in rows:
                total["wrong"] += row.get("wrong", 0)
                total["checks"] += row.get("checks", 0)
                total["cases"] += row.get("lincombs", 0) + row.get("sweeps", 0)
            sys.stderr.write(done.stderr)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nvcc", required=True, help="empty where there is none")
    parser.add_argument("--programs", type=pathlib.Path, required=True)
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--cases", type=int, default=150, help="random ones, for each architecture")
    options = parser.parse_args()
    if not options.nvcc:
        print("no nvcc: the kernels' PTX was not executed")
        return 0
    wrong = 0
    for arch in architectures(options.nvcc):
        driver = driver_for(options.nvcc, arch, options.build)
        found = checked(driver, options.programs, options.cases)
        wrong += found["wrong"] + (found["checks"] == 0) + (found["cases"] == 0)
        print(f"compute_{arch}: {found['checks']} checks, {found['cases']} random cases, "
              f"{found['wrong']} wrong", flush=True)  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
