"""Ends without files on the disk: what a crash leaves, what one fsync carries, what a full disk does."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fleet.v1 import node_pb2

from fleet_agent import journal as module
from fleet_agent.journal import Journal
from tests.waiting import wait_until


def end(token: str, text: str = "done") -> node_pb2.JobComplete:
    return node_pb2.JobComplete(job_id=f"job-{token}", token=token, text=text)


def reread(path: Path) -> list[str]:
    """What the next process finds."""
    return [one.token for one in Journal(path).open()]


def change(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def size(path: Path) -> int:
    return path.stat().st_size


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


async def test_what_was_added_is_there_after_a_crash_oldest_first(path: Path) -> None:
    journal = Journal(path)
    for token in ("c", "a", "b"):
        await journal.add(end(token))
    assert reread(path) == ["c", "a", "b"]
    assert "a" in journal and "x" not in journal


async def test_what_is_forgotten_is_gone_after_the_next_write_or_an_orderly_end(path: Path) -> None:
    journal = Journal(path)
    await journal.add(end("a"))
    await journal.add(end("b"))
    journal.forget("a")
    await journal.add(end("c"))
    assert reread(path) == ["b", "c"]
    journal.forget("b")
    await journal.aclose()
    assert reread(path) == ["c"]


async def test_a_token_kept_anew_after_it_was_forgotten_is_kept(path: Path) -> None:
    journal = Journal(path)
    await journal.add(end("a", "first"))
    journal.forget("a")
    await journal.add(end("a", "second"))
    assert [one.text for one in Journal(path).open()] == ["second"]


async def test_ends_that_come_together_share_an_fsync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    await journal.add(end("0"))
    synced: list[int] = []
    real = os.fdatasync

    def counted(fd: int) -> None:
        synced.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    await asyncio.gather(*(journal.add(end(str(number))) for number in range(1, 51)))
    assert len(synced) == 1
    assert reread(path) == [str(number) for number in range(51)]


async def test_ends_that_come_while_the_file_is_being_opened_wait_for_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens: list[Path] = []
    reading, going_on = threading.Event(), threading.Event()
    really_read = module._read

    def read_slowly(data: bytes) -> tuple[list[node_pb2.JobComplete], int]:
        opens.append(path)
        reading.set()
        assert going_on.wait(50)
        return really_read(data)

    monkeypatch.setattr(module, "_read", read_slowly)
    journal = Journal(path)
    assert journal.open() == []
    first = asyncio.create_task(journal.add(end("t0")))
    await wait_until(reading.is_set)
    later = [asyncio.create_task(journal.add(end(f"t{n}"))) for n in range(1, 8)]
    # Long enough for one that does not wait to be written, and then cut off.
    await asyncio.wait(later, timeout=0.05)
    going_on.set()
    await asyncio.gather(first, *later)
    assert len(opens) == 1
    await journal.aclose()
    assert sorted(reread(path)) == [f"t{n}" for n in range(8)]


async def test_an_end_is_on_the_disk_before_add_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    journal.open()
    seen: list[bool] = []
    adding: asyncio.Task[None] | None = None
    loop = asyncio.get_running_loop()

    async def added() -> bool:
        return adding is not None and adding.done()

    def slow(fd: int) -> None:
        seen.append(asyncio.run_coroutine_threadsafe(added(), loop).result(50))

    monkeypatch.setattr(os, "fdatasync", slow)
    adding = asyncio.create_task(journal.add(end("a")))
    await adding
    assert seen == [False]


@pytest.mark.parametrize("cut", range(1, 24, 4))
async def test_a_record_torn_by_a_crash_ends_the_file_and_no_more(path: Path, cut: int) -> None:
    journal = Journal(path)
    await journal.add(end("a"))
    await journal.add(end("b"))
    change(path, lambda data: data[:-cut])
    torn = size(path)
    again = Journal(path)
    assert [one.token for one in again.open()] == ["a"]
    assert size(path) < torn
    await again.add(end("c"))
    assert reread(path) == ["a", "c"]


async def test_a_damaged_record_is_not_taken(path: Path) -> None:
    journal = Journal(path)
    await journal.add(end("a"))
    await journal.add(end("b"))
    change(path, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    assert reread(path) == ["a"]


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
async def test_an_end_that_the_disk_does_not_take_is_refused_and_the_next_one_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    journal = Journal(path)
    await journal.add(end("a"))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space") as caught:
            await journal.add(end("b"))
        assert caught.value.errno == errno.ENOSPC
    assert "b" not in journal
    await journal.add(end("c"))
    assert reread(path) == ["a", "c"]


async def test_the_file_is_written_anew_with_what_is_still_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TIDY_BYTES", 4_000)
    journal = Journal(path)
    await journal.add(end("kept"))
    for number in range(200):
        await journal.add(end(str(number), "x" * 100))
        journal.forget(str(number))
        assert size(path) < 5_000
    await journal.add(end("last"))
    assert reread(path) == ["kept", "last"]
