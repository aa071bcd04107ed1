"""Finds parastep for the nodes, and says what to do where it cannot be used.

The package is installed, or lies beside this folder where that is a link into a clone.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import sys
from typing import Any

_CLONE = pathlib.Path(__file__).resolve().parent.parent


def _missing() -> str | None:
    """Why the package cannot be used, or None; nothing is imported."""
    if importlib.util.find_spec("parastep") is None and (_CLONE / "parastep").is_dir():
        sys.path.append(str(_CLONE))
    found = importlib.util.find_spec("parastep")
    if found is None or found.origin is None:
        return "parastep is not installed"
    if not any(pathlib.Path(found.origin).parent.glob("_core*.so")):
        return "parastep's C extension is not built"
    return None


def _what_to_do(problem: str) -> str:
    source = str(_CLONE) if (_CLONE / "setup.py").is_file() else "parastep"
    return f"{problem}: run `{sys.executable} -m pip install {source}`, then restart ComfyUI"


_PROBLEM = _missing()
NOTE = "" if _PROBLEM is None else f"CANNOT RUN YET: {_what_to_do(_PROBLEM)}. "


def host() -> Any:
    """`parastep.comfy`; raises RuntimeError with what to do."""
    if _PROBLEM is not None:
        raise RuntimeError(_what_to_do(_PROBLEM))
    try:
        return importlib.import_module("parastep.comfy")
    except ImportError as error:
        raise RuntimeError(_what_to_do(f"parastep cannot be imported ({error})")) from error
