"""A ComfyUI node for tests: the recorded protocol of a real one (`samples/`, version 0.3.64) over real sockets.

`ComfyNode` serves it from a thread of its own on a port of its own; what it should do besides, its `Script` says.
"""

from tests.comfy_node.classes import ANIMATEDIFF, STANDARD, VIDEO_HELPER, combo, node_class, sample
from tests.comfy_node.execution import Failure
from tests.comfy_node.node import ComfyNode
from tests.comfy_node.script import Script

__all__ = [
    "ANIMATEDIFF",
    "STANDARD",
    "VIDEO_HELPER",
    "ComfyNode",
    "Failure",
    "Script",
    "combo",
    "node_class",
    "sample",
]
