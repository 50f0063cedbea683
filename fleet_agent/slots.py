"""The slots of an agent, as its settings ask for them."""

from __future__ import annotations

from collections.abc import Sequence

from fleet_agent.settings import AgentSettings
from fleet_agent.slot_process import SlotProcess


def slots_of(settings: AgentSettings) -> list[SlotProcess]:
    """So many slots, each with an option of its own that numbers it; none is started."""
    options = settings.engine_options()
    return [
        SlotProcess(
            index,
            settings.models_folder,
            settings.data_dir,
            options | {"slot": str(index)},
            seats=settings.batch,
            batch_wait_seconds=settings.batch_wait_seconds,
        )
        for index in range(settings.slots)
    ]


def slot_for(model: str, free: Sequence[SlotProcess]) -> SlotProcess:
    """The one of these that work with this model ("": none) is for: whose child has it in memory comes first."""
    if not model:
        return free[0]
    having = (slot for slot in free if any(loaded.name == model for loaded in slot.loaded))
    # One that loads something else would have to be waited for.
    return next(having, min(free, key=lambda slot: slot.busy))
