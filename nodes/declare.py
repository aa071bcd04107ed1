"""A node's description as the host wants it: its V3 schema, or the older class attributes.

A node here is a class with `node_id`, `display_name`, `description`, `category`, `aliases`, inputs,
optional inputs and outputs in the older notation, {name: (type, options)} and ((type, name), ...),
and a static method `run`; `cached` is False where it is to run whenever the graph does. A class
method `valid`, where there is one, names inputs that it checks in place of the host: True, or why
not; a class method `version` gives, for the inputs, what changes when the node is to run again.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

try:
    from comfy_api.latest import ComfyExtension, io
except ImportError:  # a host without V3 nodes
    io = None


def old_node(node: Any) -> type:
    """The class that NODE_CLASS_MAPPINGS wants."""
    members = {
        "INPUT_TYPES": classmethod(
            lambda cls: {"required": node.inputs, "optional": node.optional}
        ),
        "RETURN_TYPES": tuple(kind for kind, _ in node.outputs),
        "RETURN_NAMES": tuple(name for _, name in node.outputs),
        "FUNCTION": "run",
        "CATEGORY": node.category,
        "DESCRIPTION": node.description,
        "run": staticmethod(node.run),
    }
    if not node.cached:
        members["IS_CHANGED"] = classmethod(_always_new)
    elif hasattr(node, "version"):
        members["IS_CHANGED"] = node.version
    if hasattr(node, "valid"):
        members["VALIDATE_INPUTS"] = node.valid
    return type(node.node_id, (), members)


def _always_new(cls: Any, **inputs: Any) -> float:
    """Differs from what it was the last time, so the host takes the node for changed."""
    return float("nan")  # another object each time: the same one counts as equal to itself


def extension(nodes: tuple[Any, ...]) -> Any:
    """The ComfyExtension that has these nodes."""
    made = [_v3_node(node) for node in nodes]

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return made

    return Extension()


def _v3_node(node: Any) -> type:
    def define_schema(cls: Any) -> Any:
        given = {
            "node_id": node.node_id,
            "display_name": node.display_name,
            "category": node.category,
            "description": node.description,
            "search_aliases": list(node.aliases),
            "inputs": [
                *(_input(name, *described) for name, described in node.inputs.items()),
                *(
                    _input(name, kind, {**options, "optional": True})
                    for name, (kind, options) in node.optional.items()
                ),
            ],
            "outputs": [_type(kind).Output(display_name=name) for kind, name in node.outputs],
            "not_idempotent": not node.cached,
        }
        known = {field.name for field in dataclasses.fields(io.Schema)}
        return io.Schema(**{name: value for name, value in given.items() if name in known})

    members: dict[str, Any] = {
        "define_schema": classmethod(define_schema),
        "execute": classmethod(lambda cls, **inputs: io.NodeOutput(*node.run(**inputs))),
    }
    if not node.cached:
        members["fingerprint_inputs"] = classmethod(_always_new)
    elif hasattr(node, "version"):
        members["fingerprint_inputs"] = node.version
    if hasattr(node, "valid"):
        members["validate_inputs"] = node.valid
    return type(node.node_id, (io.ComfyNode,), members)


def _input(name: str, kind: Any, options: dict[str, Any]) -> Any:
    """Options that this version of the host does not know are left out."""
    make = io.Combo.Input if isinstance(kind, list) else _type(kind).Input
    given = {**options, "options": kind if isinstance(kind, list) else None}
    if "display" in options:
        given["display_mode"] = io.NumberDisplay(options["display"])
    known = inspect.signature(make).parameters
    return make(name, **{key: value for key, value in given.items() if key in known})


def _type(kind: str) -> Any:
    return getattr(io, kind.capitalize())
