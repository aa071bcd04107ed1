"""No two files need each other, and no room uses one above it: read off the sources alone."""

from __future__ import annotations

import ast
import pathlib
import re

TREE = pathlib.Path(__file__).parents[2]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node: those that reach each other."""

    def reach(start: str) -> set[str]:
        found: set[str] = set()
        ahead = [start]
        while ahead:
            fresh = graph.get(ahead.pop(), set()) - found
            found |= fresh
            ahead += fresh
        return found

    reached = {node: reach(node) for node in graph}
    mutual = {
        tuple(sorted(n for n in reached[node] if node in reached.get(n, ()))) for node in graph
    }
    return [list(nodes) for nodes in sorted(mutual) if len(nodes) > 1]


def test_circles_are_those_that_reach_each_other() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"d"}, "e": {"a", "f"}, "f": {"e"}}
    assert circles(graph) == [["a", "b", "c"], ["e", "f"]]


# ---- C -------------------------------------------------------------------------------------------

# Room, its files, and the rooms that they may use beside their own.  The first pattern that fits
# says where a file is.  The method reaches backends and links through tables of functions alone.
BELOW = ["base", "platform", "backend"]
TENSORS = "binding|holders|errors|lookup|place|dlpack|block|tensor|intake|convert|view|like|probe"
ROOMS = [
    ("base", r"core/(base|status|alloc)\.", []),
    ("platform", r"platform/", ["base"]),
    ("method", r"core/", ["base", "platform"]),
    ("backend", r"backend/", ["base", "platform"]),
    ("transport", r"transport/", BELOW),
    ("tensors", rf"python/({TENSORS})", BELOW),
    ("module", r"python/module\.", [*BELOW, "method", "transport", "tensors", "runs"]),
    ("runs", r"python/", [*BELOW, "method", "transport", "tensors"]),
]
MAY_USE = {name: [name, *others] for name, _, others in ROOMS}

WORDS = re.compile(r'/\*.*?\*/|"(\\.|[^"\\\n])*"|\'(\\.|[^\'\\])\'', re.S)
NAME = re.compile(r"\bpsb?_\w+")
# A function with its body, or a variable, that other files can see; and one within a header.
DEFINED = re.compile(
    r"^(?!static|typedef|extern)\w[\w *]*?\b(psb?_\w+)(?:;|\[| =|\([^;{]*\)\n\{)", re.M
)
INLINE = re.compile(r"^static inline [^;{]*?\b(psb?_\w+)\([^;{]*\)\n\{\n.*?^\}", re.M | re.S)


def sources() -> dict[str, str]:
    paths = (TREE / "csrc").glob("*/*.[ch]")
    return {f"{path.parent.name}/{path.name}": path.read_text() for path in paths}


def uses() -> dict[str, set[str]]:
    """Which files have a name defined that a file uses, be it called or put into a table."""
    texts = {file: WORDS.sub("", text) for file, text in sources().items()}
    home, bodies = {}, {}
    for file, text in texts.items():
        inlines = list(INLINE.finditer(text))
        names = DEFINED.findall(text) if file.endswith(".c") else [found[1] for found in inlines]
        home.update(dict.fromkeys(names, file))
        bodies[file] = text if file.endswith(".c") else "".join(found[0] for found in inlines)
    return {
        file: {home[name] for name in NAME.findall(body) if name in home} - {file}
        for file, body in bodies.items()
    }


def includes() -> dict[str, set[str]]:
    """Which headers of csrc a file includes itself."""
    texts, graph = sources(), {}
    for file, text in texts.items():
        beside = file.split("/")[0]
        named = re.findall(r'^#include "(.+)"', text, re.M)
        graph[file] = {path for name in named for path in (name, f"{beside}/{name}")} & set(texts)
    return graph


def test_no_files_of_c_need_each_other() -> None:
    found = [*circles(uses()), *circles(includes())]
    assert not found, "\n".join(" and ".join(files) for files in found)


def test_no_room_of_c_uses_one_above_it() -> None:
    def room(file: str) -> str:
        return next(name for name, pattern, _ in ROOMS if re.match(pattern, file))

    named, included = uses(), includes()
    upward = [
        f"{file} ({room(file)}) uses {other} ({room(other)})"
        for file in sorted(named)
        for other in sorted(named[file] | included[file])
        if room(other) not in MAY_USE[room(file)]
    ]
    assert not upward, "\n".join(upward)


# ---- Python --------------------------------------------------------------------------------------

# Rooms of the package from the lowest up: each uses itself and those before it.  Hosts stand beside
# each other.
LEVELS = [
    ["_core", "_version"],
    ["report", "marks"],
    [
        "messages",
        "options",
        "quiet",
        "reach",
        "sampling",
        "speculation",
        "stacking",
        "threads",
        "tolerance",
    ],  # fmt: skip
    ["tracing", "processes", "planning"],
    ["comfy", "diffusers"],
    ["calibration", "check", "cli", "demo", "__init__", "__main__"],
]


def modules() -> dict[str, pathlib.Path]:
    """{"diffusers.call": its file}, a package under its own name, the top one as __init__."""
    found = {}
    for path in (TREE / "parastep").rglob("*.py"):
        parts = path.relative_to(TREE / "parastep").with_suffix("").parts
        inner = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        found[".".join(inner)] = path
    return found


def imported(name: str, path: pathlib.Path, known: set[str]) -> set[str]:
    """The modules that a module imports, wherever in it; of a package the part that is meant."""
    package = path.relative_to(TREE / "parastep").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
            inner = ".".join(part for part in base if part)
            parts = {f"{inner}.{alias.name}".strip(".") for alias in node.names}
            found |= (parts & known) or {inner or "__init__"}
    return found - {name}


def imports() -> dict[str, set[str]]:
    known = {*modules(), "_core"}
    return {name: imported(name, path, known) for name, path in modules().items()}


def test_no_modules_of_the_package_need_each_other() -> None:
    found = circles(imports())
    assert not found, "\n".join(" and ".join(names) for names in found)


def test_no_module_imports_from_a_room_above_it() -> None:
    level = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
    upward = []
    for name, others in sorted(imports().items()):
        own = name.split(".")[0]
        for other in sorted({other.split(".")[0] for other in others} - {own}):
            beside = {own, other} == {"comfy", "diffusers"}
            if beside or level[other] > level[own]:
                upward.append(f"{name} imports {other}")
    assert not upward, "\n".join(upward)


def test_the_package_keeps_its_rooms() -> None:
    """What lies beside the rooms is little enough to be read at a glance."""
    assert len(list((TREE / "parastep").glob("*.py"))) <= 16
