"""What a release of this tree still lacks, a line each; `make release-check` runs it.

    python tests/release/check.py [TREE]

Looks at the versions, the changelog, what registries are told, git and dist/. Exits with 1 where
anything is missing; docs/releasing.md is what to do about it. Nothing is sent anywhere.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator

import tomllib
from packaging.version import InvalidVersion, Version

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from wheels import problems_of

IN_SDIST = (
    "compile_flags.txt",
    "csrc/backend/kernels.cu",
    "csrc/backend/compile_kernels.sh",
    "include/parastep.h",
    "parastep/demo/image.safetensors",
    "tests/python/test_layout.py",
    "LICENSE",
    "CHANGELOG.md",
)


def version_of(tree: pathlib.Path) -> str:
    text = (tree / "parastep" / "_version.py").read_text()
    return re.search(r'__version__ = "(.+)"', text).group(1)


def versions(tree: pathlib.Path) -> Iterator[str]:
    own = version_of(tree)
    try:
        if str(Version(own)) != own:
            yield f"parastep/_version.py: {own} is written {Version(own)}"
    except InvalidVersion:
        yield f"parastep/_version.py: {own} is no version"
    pack = tomllib.loads((tree / "nodes" / "pyproject.toml").read_text())["project"]["version"]
    if pack != own:
        yield f"nodes/pyproject.toml: version {pack}, the package has {own}"


def changelog(tree: pathlib.Path) -> Iterator[str]:
    """Of this version with a date and some lines, below an Unreleased that is empty by now."""
    own, text = version_of(tree), (tree / "CHANGELOG.md").read_text()
    parts = dict(re.findall(r"^## \[(.+?)\](.*?)(?=^## |\Z)", text, re.M | re.S))
    if "- " in parts.get("Unreleased", ""):
        yield "CHANGELOG.md: lines under [Unreleased]; they belong to a version"
    body = parts.get(own)
    if body is None:
        yield f"CHANGELOG.md: no heading [{own}]"
    elif not re.match(r" - \d{4}-\d{2}-\d{2}\n", body):
        yield f"CHANGELOG.md: [{own}] has no date, as in ## [{own}] - 2001-12-31"
    elif "\n- " not in body:
        yield f"CHANGELOG.md: nothing below [{own}]"


def told_to_registries(tree: pathlib.Path) -> Iterator[str]:
    package = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    pack = tomllib.loads((tree / "nodes" / "pyproject.toml").read_text())
    for where, urls in (
        ("pyproject.toml", package.get("urls", {})),
        ("nodes/pyproject.toml", pack["project"].get("urls", {})),
    ):
        if not urls.get("Repository"):
            yield f"{where}: no Repository under [project.urls]"
    for key in ("PublisherId", "DisplayName", "Icon"):
        if not pack["tool"]["comfy"].get(key):
            yield f"nodes/pyproject.toml: {key} under [tool.comfy] is empty"


def committed(tree: pathlib.Path) -> Iterator[str]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tree), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    if git("status", "--porcelain"):
        yield "git: changes that are not committed"
    tag = f"v{version_of(tree)}"
    if not git("tag", "--list", tag):
        yield f"git: no tag {tag}"
    elif git("rev-list", "-1", tag) != git("rev-parse", "HEAD"):
        yield f"git: {tag} is another commit than this one"


def built(tree: pathlib.Path) -> Iterator[str]:
    own, folder = version_of(tree), tree / "dist"
    sdist = folder / f"parastep-{own}.tar.gz"
    wheels = sorted(folder.glob(f"parastep-{own}-*.whl"))
    others = sorted({*folder.glob("*")} - {sdist, *wheels})
    yield from (f"dist: {path.name} is not of version {own}" for path in others)
    if not sdist.exists():
        yield f"dist: no {sdist.name}; run make wheel"
    else:
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        yield from (f"dist: {sdist.name} lacks {name}" for name in IN_SDIST if name not in names)
    if not wheels:
        yield f"dist: no wheel of {own}; run make wheel"
    for wheel in wheels:
        yield from (f"dist: {problem}" for problem in problems_of(wheel, kernels=True))


def described(tree: pathlib.Path) -> Iterator[str]:
    """What the registry's own tool says of the files' metadata."""
    files = sorted((tree / "dist").glob("parastep-*"))
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True) if files else None
    if done is not None and done.returncode:
        yield f"twine check: {(done.stdout + done.stderr).strip()}"


CHECKS: tuple[Callable[[pathlib.Path], Iterator[str]], ...] = (
    versions,
    changelog,
    told_to_registries,
    committed,
    built,
    described,
)


def missing(tree: pathlib.Path) -> list[str]:
    return [line for check in CHECKS for line in check(tree)]


def main() -> None:
    tree = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
    lines = missing(tree if tree.is_dir() else tree.parents[2])
    if lines:
        sys.exit("\n".join(["a release lacks:", *(f"- {line}" for line in lines)]))
    print("nothing is missing")


if __name__ == "__main__":
    main()
