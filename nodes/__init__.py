"""The ComfyUI node pack: copy or link this folder into `custom_nodes`.

The host imports it when it starts and looks for `comfy_entrypoint` (V3 nodes), or, in older
versions, for NODE_CLASS_MAPPINGS. Nothing of parastep is imported before a node runs.
"""

from __future__ import annotations

from typing import Any

from . import declare
from .report import ParaStepReport
from .step import ParaStep

_NODES = (ParaStep, ParaStepReport)

if declare.io is not None:
    __all__ = ["comfy_entrypoint"]

    async def comfy_entrypoint() -> Any:
        return declare.extension(_NODES)
else:
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
    NODE_CLASS_MAPPINGS = {node.node_id: declare.old_node(node) for node in _NODES}
    NODE_DISPLAY_NAME_MAPPINGS = {node.node_id: node.display_name for node in _NODES}
