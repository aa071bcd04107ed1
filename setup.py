"""Builds the extension parastep._core; everything else about the package is in pyproject.toml.

The flags that every compilation shares are in compile_flags.txt, which the Makefile, clang-tidy and
clangd read too.  PARASTEP_SANITIZE=address,undefined (any list that -fsanitize takes) builds an
instrumented extension; `make sanitize` shows how to load one.  Where nvcc is found, the CUDA
kernels are compiled and embedded; PARASTEP_NVCC names another nvcc, or none where it is empty.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
LAYERS = ("core", "backend", "transport", "platform", "python")


def paths(pattern: str) -> list:
    """Files below this directory, relative to it as setuptools wants them, in a stable order."""
    return sorted(path.relative_to(HERE).as_posix() for path in HERE.glob(pattern))


def version() -> str:
    text = (HERE / "parastep" / "_version.py").read_text()
    return re.search(r'__version__ = "([^"]+)"', text).group(1)


def sanitizer_flags() -> list:
    sanitizers = os.environ.get("PARASTEP_SANITIZE", "")
    if not sanitizers:
        return []
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    return [*flags, "-fno-omit-frame-pointer", "-g", "-O1"]


class BuildWithKernels(build_ext):
    """Compiles kernels.cu first, if it can be: an extension without them has slower means.
    PARASTEP_KERNELS names a file of kernels that was compiled before.
    """

    def run(self) -> None:
        image = Path(self.build_temp).resolve() / "kernels.fatbin"
        ready = os.environ.get("PARASTEP_KERNELS")
        if ready:
            self.extensions[0].define_macros.append(("PS_KERNEL_IMAGE", f'"{ready}"'))
        nvcc = os.environ.get("PARASTEP_NVCC", shutil.which("nvcc"))
        if nvcc:
            image.parent.mkdir(parents=True, exist_ok=True)
            script = HERE / "csrc/backend/compile_kernels.sh"
            status = subprocess.run(["sh", str(script), nvcc, str(image)]).returncode
            if status == 0:
                self.extensions[0].define_macros.append(("PS_KERNEL_IMAGE", f'"{image}"'))
            else:
                print(f"{nvcc} failed: building without CUDA kernels", file=sys.stderr)
        super().run()


shared_flags = (HERE / "compile_flags.txt").read_text().split()
core = Extension(
    "parastep._core",
    sources=[path for layer in LAYERS for path in paths(f"csrc/{layer}/*.c")],
    depends=[
        *paths("include/*.h"),
        *paths("csrc/**/*.h"),
        *paths("csrc/**/*.cu"),
        "compile_flags.txt",
    ],
    include_dirs=[numpy.get_include()],
    define_macros=[("PARASTEP_VERSION", f'"{version()}"')],
    # Python's own flags come first and may differ in -O and in the language; the last one counts.
    extra_compile_args=[*shared_flags, "-O3", *sanitizer_flags()],
    extra_link_args=["-pthread", *sanitizer_flags()],
    libraries=["dl", "m"],
)

# Relative include directories are meant from here, wherever the build was started.  The license
# stands here because setuptools before 77 reads no such word in pyproject.toml.
os.chdir(HERE)
setup(license="Apache-2.0", ext_modules=[core], cmdclass={"build_ext": BuildWithKernels})
