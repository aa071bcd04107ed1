"""Files that a node is given by name: they lie in ComfyUI's input folder, and nowhere else."""

from __future__ import annotations

import pathlib
from typing import Any

from .package import host


def calibration_at(name: str) -> Any:
    """The `parastep.Calibration` in a file; raises ValueError with what to do where it is none."""
    host()  # says what is missing where parastep cannot be imported
    from parastep import Calibration, Error

    path = _path_of(name)
    if not path.is_file():
        raise ValueError(f"calibration: there is no file {name.strip()!r} in {_folder()}")
    try:
        return Calibration.load(path)
    except Error as error:
        raise ValueError(
            f"calibration: {error}; write the name of a file that Calibration.save made, or nothing"
        ) from error


def version_of(name: str | None) -> str:
    """Another text where the file of this name is another one; None comes over a link."""
    if not name or not name.strip():
        return ""
    try:
        told = _path_of(name).stat()
    except (OSError, ValueError):
        return name
    return f"{name} {told.st_mtime_ns} {told.st_size}"


def _folder() -> pathlib.Path:
    import folder_paths

    return pathlib.Path(folder_paths.get_input_directory()).resolve()


def _path_of(name: str) -> pathlib.Path:
    path = (_folder() / name.strip()).resolve()
    if not path.is_relative_to(_folder()):
        raise ValueError(
            f"calibration: {name.strip()!r} is not in ComfyUI's input folder: put the file into "
            f"{_folder()}, and write its name"
        )
    return path
