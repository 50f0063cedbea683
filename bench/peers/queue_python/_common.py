"""What every Python peer's program shares. It needs the standard library alone: it runs in the peers' environments.

A body appends 16 bytes to the file of marks: its job's number and the monotonic clock, in nanoseconds. A producer reads
orders from its standard input, one JSON object a line, and answers each with a line: {"start": ns, "end": ns}.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

URL = os.environ["BENCH_STORE_URL"]
TEXT = "a lighthouse at dusk, " * 9
"""198 bytes that every job carries beside its number."""

_fd = os.open(os.environ["BENCH_MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
_MARK = struct.Struct("<QQ")

One = Callable[[int], Awaitable[object]]
Many = Callable[[range], Awaitable[object]]


def body(number: int) -> None:
    """The whole work of a job."""
    os.write(_fd, _MARK.pack(number, time.monotonic_ns()))


async def produce(one: One, many: Many) -> None:
    """Carries out orders until the input ends: `single` and `batch` at once, `spaced` one job each `gap` seconds."""
    say({})
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        first, count, size, callers = order["first"], order["count"], order["size"], order["callers"]
        starts: list[int] = []
        start = time.monotonic_ns()
        if order["kind"] == "spaced":
            for number in range(first, first + count):
                await asyncio.sleep(order["gap"])
                starts.append(time.monotonic_ns())
                await one(number)
        else:
            parts = [range(at, min(at + size, first + count)) for at in range(first, first + count, size)]
            waiting = iter(parts)

            async def caller(waiting: object = waiting, kind: str = order["kind"]) -> None:
                for numbers in waiting:  # type: ignore[attr-defined]
                    await (one(numbers[0]) if kind == "single" else many(numbers))

            await asyncio.gather(*(caller() for _ in range(callers)))
        say({"start": start, "end": time.monotonic_ns(), "starts": starts})


def threaded(send: Callable[[int], object], send_many: Callable[[range], object], threads: int) -> tuple[One, Many]:
    """A library that blocks, called from so many threads."""
    pool = ThreadPoolExecutor(threads)

    async def one(number: int) -> object:
        return await asyncio.get_running_loop().run_in_executor(pool, send, number)

    async def many(numbers: range) -> object:
        return await asyncio.get_running_loop().run_in_executor(pool, send_many, numbers)

    return one, many


def say(message: object) -> None:
    """One line to the benchmark."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
