"""SAQ: one Redis queue, a worker with 100 tasks at once; a job stuck past its timeout is swept and run again."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import uvloop
from _common import TEXT, URL, body, produce
from saq import Queue, Worker

queue = Queue.from_url(URL)


async def note(context: object, *, number: int, text: str) -> None:
    """The job."""
    body(number)


async def main() -> None:
    """The producer, or the worker where that is asked for."""
    await queue.connect()
    if sys.argv[1] == "work":
        await Worker(queue, functions=[note], concurrency=100).start()
        return
    await produce(
        lambda number: queue.enqueue("note", number=number, text=TEXT),
        lambda numbers: asyncio.gather(*(queue.enqueue("note", number=number, text=TEXT) for number in numbers)),
    )


if __name__ == "__main__":
    uvloop.run(main())
