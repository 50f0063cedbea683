"""dramatiq: acknowledged after the message; 20 retries; messages of a dead worker go back by its missing heartbeat."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import dramatiq
from _common import TEXT, URL, body, produce, threaded
from dramatiq.brokers.redis import RedisBroker

broker = RedisBroker(url=URL)
dramatiq.set_broker(broker)


@dramatiq.actor
def note(number: int, text: str) -> None:
    """The job."""
    body(number)


def send_many(numbers: range) -> None:
    """A group, as its documentation sends several."""
    dramatiq.group([note.message(number, TEXT) for number in numbers]).run()


if __name__ == "__main__":
    asyncio.run(produce(*threaded(lambda number: note.send(number, TEXT), send_many, 8)))
