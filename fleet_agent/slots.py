"""The slots of an agent, as its settings ask for them."""

from __future__ import annotations

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
