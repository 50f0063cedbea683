"""Celery over Redis, no results; by default acknowledged BEFORE the task runs: lost with a worker that dies."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _common import TEXT, URL, body, produce, threaded
from celery import Celery, group

app = Celery("bench", broker=URL)
# For short tasks its documentation advises a prefetch of 50 or 150 instead of 4.
app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=64, broker_connection_retry_on_startup=True)


@app.task(name="note")
def note(number: int, text: str) -> None:
    """The job."""
    body(number)


def send_many(numbers: range) -> None:
    """A group, as its documentation sends several."""
    group(note.s(number, TEXT) for number in numbers).apply_async()


if __name__ == "__main__":
    asyncio.run(produce(*threaded(lambda number: note.delay(number, TEXT), send_many, 8)))
