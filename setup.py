"""Builds the extension parastep._core; everything else about the package is in pyproject.toml.

The flags that every compilation shares are in compile_flags.txt, which the Makefile, clang-tidy and
clangd read too.  PARASTEP_SANITIZE=address,undefined (any list that -fsanitize takes) builds an
instrumented extension; `make sanitize` shows how to load one.  Where nvcc is found, the CUDA
kernels are compiled and embedded; PARASTEP_NVCC names another nvcc, or none where it is empty, and
PARASTEP_CUDA_ARCHS the GPUs that are meant (csrc/backend/compile_kernels.sh).
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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


class BuildSideBySide(build_ext):
    """Compiles a file of C on each core, and kernels.cu meanwhile, if it can be: an extension
    without them has slower means.  Setuptools by itself compiles one file after another.
    """

    def build_extensions(self) -> None:
        one_by_one = self.compiler.compile
        with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
            kernels = pool.submit(self.kernels)

            def compiled(source: str, options: dict) -> list:
                if source.endswith("backend/image.c") and kernels.result():
                    macro = ("PS_KERNEL_IMAGE", f'"{kernels.result()}"')
                    options = options | {"macros": [*options["macros"], macro]}
                return one_by_one([source], **options)

            def compile_all(sources: list, **options: object) -> list:
                sources = sorted(sources, key=lambda path: path.endswith("backend/image.c"))
                jobs = [pool.submit(compiled, source, options) for source in sources]
                return [path for job in jobs for path in job.result()]

            self.compiler.compile = compile_all
            super().build_extensions()

    def kernels(self) -> "Path | None":
        """The file that nvcc made of them, now or, by PARASTEP_KERNELS, before."""
        if os.environ.get("PARASTEP_KERNELS"):
            return Path(os.environ["PARASTEP_KERNELS"])
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        nvcc = os.environ.get("PARASTEP_NVCC", found)
        if not nvcc:
            return None
        image = Path(self.build_temp).resolve() / "kernels.fatbin"
        image.parent.mkdir(parents=True, exist_ok=True)
        script = HERE / "csrc/backend/compile_kernels.sh"
        if subprocess.run(["sh", str(script), nvcc, str(image)]).returncode == 0:
            return image
        if os.environ.get("PARASTEP_CUDA_ARCHS"):
            raise SystemExit(f"{nvcc} failed, and PARASTEP_CUDA_ARCHS asks for its kernels")
        print(f"{nvcc} failed: building without CUDA kernels", file=sys.stderr)
        return None


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
setup(license="Apache-2.0", ext_modules=[core], cmdclass={"build_ext": BuildSideBySide})
