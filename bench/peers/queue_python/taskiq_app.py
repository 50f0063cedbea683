"""taskiq with its Redis stream broker: acknowledged after the task (WHEN_SAVED), taken over after 600 s."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import uvloop
from _common import TEXT, URL, body, produce
from taskiq_redis import RedisStreamBroker

broker = RedisStreamBroker(URL)


@broker.task(task_name="note")
async def note(number: int, text: str) -> None:
    """The job."""
    body(number)


async def main() -> None:
    """The producer."""
    await broker.startup()
    # The library has no call for several: its documentation awaits `kiq` once a task.
    await produce(
        lambda number: note.kiq(number, TEXT),
        lambda numbers: asyncio.gather(*(note.kiq(number, TEXT) for number in numbers)),
    )
    await broker.shutdown()


if __name__ == "__main__":
    uvloop.run(main())
