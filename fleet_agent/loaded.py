"""What the slots' processes have in memory, as the server hears it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from fleet.v1 import node_pb2

from fleet_agent.slot_process import SlotProcess


def loaded_files(slots: Iterable[SlotProcess]) -> list[node_pb2.LoadedFile]:
    """Models in memory, once each however many slots hold it."""
    now = time.monotonic()
    found: dict[tuple[str, str], node_pb2.LoadedFile] = {}
    for model in (model for slot in slots for model in slot.loaded):
        file = found.get((model.engine, model.name))
        if file is None:
            file = found[model.engine, model.name] = node_pb2.LoadedFile(
                name=model.name,
                engine=model.engine,
                loaded_seconds_ago=now - model.loaded_at,
                used_seconds_ago=now - model.used_at,
            )
        file.memory_bytes += model.memory_bytes
        file.loras.extend(name for name in model.loras if name not in file.loras)
        file.loaded_seconds_ago = max(file.loaded_seconds_ago, now - model.loaded_at)
        file.used_seconds_ago = min(file.used_seconds_ago, now - model.used_at)
        file.pinned |= model.pinned
        if model.pixel_steps_per_second is not None:
            # Of a job anywhere on the node, the slowest place is counted on.
            slowest = file.pixel_steps_per_second if file.HasField("pixel_steps_per_second") else math.inf
            file.pixel_steps_per_second = min(slowest, model.pixel_steps_per_second)
    return list(found.values())
