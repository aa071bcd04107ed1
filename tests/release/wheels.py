"""Whether a wheel works where there is no compiler; `make wheel` runs it on what it made.

    python tests/release/wheels.py WHEEL [--kernels]

Makes an empty environment, installs the wheel there, and runs `parastep check` with nothing else on
the path. With --kernels the wheel has to hold code for GPUs. Prints sizes; exits with 1 and the
reason where anything is not as it should be.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile

COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "nvcc")
FATBIN = bytes.fromhex("50ed55ba0100")  # how an image of several GPUs' code begins
MB = 1e6


def extension_of(wheel: pathlib.Path) -> bytes:
    """The compiled module in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.startswith("parastep/_core.") and ".so" in n)
        return archive.read(name)


def problems_of(wheel: pathlib.Path, kernels: bool) -> list[str]:
    """What the file itself lacks."""
    found = []
    if "manylinux" not in wheel.name:
        found.append(f"{wheel.name} is for this machine alone: no manylinux tag")
    if kernels and FATBIN not in extension_of(wheel):
        found.append(f"{wheel.name} holds no CUDA kernels")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    wanted = ("parastep/py.typed", "parastep/_core.pyi", "parastep/demo/image.safetensors")
    missing = [name for name in wanted if name not in names]
    if not any(name.endswith("LICENSE") for name in names):
        missing.append("LICENSE")
    return [*found, *(f"{wheel.name} lacks {name}" for name in missing)]


def installed(wheel: pathlib.Path, folder: pathlib.Path) -> str:
    """What `parastep check` prints in a new environment, its own commands alone on the path."""
    venv.create(folder, with_pip=True)
    own = folder / "bin"
    pip = [own / "python", "-m", "pip", "install", "--quiet", "--only-binary=:all:", wheel]
    subprocess.run(pip, check=True)
    there = [name for name in COMPILERS if shutil.which(name, path=str(own))]
    assert not there, f"a compiler is on the path: {there}"
    done = subprocess.run(
        [own / "parastep", "check"],
        env={"PATH": str(own), "HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if done.returncode or "self-test    passed" not in done.stdout:
        raise SystemExit(f"parastep check failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("wheel", type=pathlib.Path)
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args()
    wheel = options.wheel.resolve()
    problems = problems_of(wheel, options.kernels)
    if problems:
        sys.exit("\n".join(problems))
    with tempfile.TemporaryDirectory() as folder:
        print(installed(wheel, pathlib.Path(folder)), end="")
    extension, own = extension_of(wheel), "with" if options.kernels else "without"
    print(f"{wheel.name}: {wheel.stat().st_size / MB:.2f} MB")
    print(f"of which the extension, {own} CUDA kernels: {len(extension) / MB:.2f} MB unpacked")


if __name__ == "__main__":
    main()
