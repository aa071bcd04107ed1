"""What a release lacks is named, each thing once, and nothing is where nothing is missing."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

RELEASE = pathlib.Path(__file__).parents[1] / "release"
pytest.importorskip("packaging")
if sys.version_info < (3, 11):
    pytest.skip("tomllib came with Python 3.11", allow_module_level=True)


def loaded(name):
    found = importlib.util.spec_from_file_location(f"release_{name}", RELEASE / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


check, wheels = loaded("check"), loaded("wheels")
WHEEL = "dist/parastep-1.2.0-cp311-cp311-manylinux_2_34_x86_64.whl"
URL = '[project.urls]\nRepository = "https://example.org/parastep"\n'
COMFY = '[tool.comfy]\nPublisherId = "a"\nDisplayName = "b"\nIcon = "c"\n'
TEXTS = {
    "parastep/_version.py": '__version__ = "1.2.0"\n',
    "nodes/pyproject.toml": f'[project]\nversion = "1.2.0"\n{URL}{COMFY}',
    "pyproject.toml": f'[project]\nname = "parastep"\n{URL}',
    "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-01-02\n\n- A thing.\n",
    ".gitignore": "dist/\n",
}
IN_WHEEL = {
    "parastep/_core.cpython-311-x86_64-linux-gnu.so": b"\x7fELF" + wheels.FATBIN,
    "parastep/py.typed": b"",
    "parastep/_core.pyi": b"",
    "parastep/demo/image.safetensors": b"",
    "parastep-1.2.0.dist-info/licenses/LICENSE": b"",
}


def git(tree, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", str(tree), *who, *arguments], check=True, capture_output=True)


def write_wheel(path, holds):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in holds.items():
            archive.writestr(name, content)


def write_sdist(tree, names):
    (tree / "file").write_text("")
    with tarfile.open(tree / "dist/parastep-1.2.0.tar.gz", "w:gz") as archive:
        for name in names:
            archive.add(tree / "file", f"parastep-1.2.0/{name}")
    (tree / "file").unlink()


@pytest.fixture
def tree(tmp_path):
    """A tree that a release could be made of."""
    for name, text in TEXTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "dist").mkdir()
    write_wheel(tmp_path / WHEEL, IN_WHEEL)
    write_sdist(tmp_path, check.IN_SDIST)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "all")
    git(tmp_path, "tag", "v1.2.0")
    return tmp_path


def lines_of(tree):
    return [line for one in check.CHECKS if one is not check.described for line in one(tree)]


def test_nothing_is_missing(tree):
    assert lines_of(tree) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("parastep/_version.py", "1.2.0", "1.3.0", "version 1.2.0, the package has 1.3.0"),
        ("parastep/_version.py", "1.2.0", "1.2.x", "is no version"),
        ("nodes/pyproject.toml", '"c"', '""', "Icon under [tool.comfy] is empty"),
        ("pyproject.toml", URL, "", "pyproject.toml: no Repository"),
        ("CHANGELOG.md", "- A thing.", "", "nothing below [1.2.0]"),
        ("CHANGELOG.md", " - 2026-01-02", "", "[1.2.0] has no date"),
        ("CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n- More.\n", "lines under [Unreleased]"),
        ("CHANGELOG.md", "[1.2.0]", "[1.1.0]", "no heading [1.2.0]"),
    ],
)
def test_what_texts_lack(tree, file, old, new, told):
    path = tree / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    lines = lines_of(tree)
    assert any(told in line for line in lines), lines
    assert any("not committed" in line for line in lines), lines


def test_a_tag_is_this_commit(tree):
    git(tree, "commit", "--allow-empty", "--quiet", "-m", "more")
    assert lines_of(tree) == ["git: v1.2.0 is another commit than this one"]
    git(tree, "tag", "--delete", "v1.2.0")
    assert lines_of(tree) == ["git: no tag v1.2.0"]


def test_what_dist_lacks(tree):
    write_sdist(tree, [name for name in check.IN_SDIST if name != "compile_flags.txt"])
    assert lines_of(tree) == ["dist: parastep-1.2.0.tar.gz lacks compile_flags.txt"]
    (tree / "dist/parastep-1.2.0.tar.gz").unlink()
    (tree / WHEEL).rename(tree / "dist/parastep-1.1.0-cp311-cp311-manylinux_2_34_x86_64.whl")
    lines = "\n".join(lines_of(tree))
    assert "no parastep-1.2.0.tar.gz" in lines and "no wheel of 1.2.0" in lines
    assert "is not of version 1.2.0" in lines


def test_what_a_wheel_lacks(tree):
    without = dict.fromkeys(IN_WHEEL, b"")
    del without["parastep/py.typed"], without["parastep-1.2.0.dist-info/licenses/LICENSE"]
    local = tree / "parastep-1.2.0-cp311-cp311-linux_x86_64.whl"
    write_wheel(local, without)
    problems = "\n".join(wheels.problems_of(local, kernels=True))
    for told in ("no manylinux tag", "no CUDA kernels", "lacks parastep/py.typed", "lacks LICENSE"):
        assert told in problems
    assert "kernels" not in "\n".join(wheels.problems_of(local, kernels=False))
