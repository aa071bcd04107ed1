"""What `make gpu` needs of a machine, looked at before anything is built: one line, and an exit
code, where something is missing. Needs nothing itself.
"""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import sys
import sysconfig


def missing() -> list[str]:
    found = []
    if shutil.which("gcc") is None:
        found.append("gcc")
    headers = pathlib.Path(sysconfig.get_path("include"), "Python.h")
    if not headers.exists():
        found.append(f"Python's headers ({headers})")
    for name in ("numpy", "setuptools", "torch"):
        if importlib.util.find_spec(name) is None:
            found.append(f"{name} for {sys.executable}")
    return found


if __name__ == "__main__":
    lacking = missing()
    if lacking:
        sys.exit("make gpu needs " + ", ".join(lacking))
    if not (shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")):
        print("no nvcc: built without kernels, passes are made by cuBLAS", file=sys.stderr)
