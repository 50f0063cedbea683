"""arq with poll_delay=0.01 (its default of 0.5 s would be most of what is measured); at least once, 5 tries."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).parent))

import uvloop
from _common import TEXT, URL, body, produce
from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import create_worker


async def note(context: object, number: int, text: str) -> None:
    """The job."""
    body(number)


class WorkerSettings:
    """Read by arq."""

    functions: ClassVar = [note]
    redis_settings = RedisSettings.from_dsn(URL)
    max_jobs = 100
    poll_delay = 0.01
    keep_result = 0


async def main() -> None:
    """The producer, or the worker where that is asked for."""
    if sys.argv[1] == "work":
        await create_worker(WorkerSettings).main()
        return
    pool = await create_pool(WorkerSettings.redis_settings)
    await produce(
        lambda number: pool.enqueue_job("note", number, TEXT),
        lambda numbers: asyncio.gather(*(pool.enqueue_job("note", number, TEXT) for number in numbers)),
    )


if __name__ == "__main__":
    uvloop.run(main())
