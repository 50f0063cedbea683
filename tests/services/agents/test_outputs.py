"""Files of outputs: whole or not at all, and never outside their folder."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_server.domain.errors import FleetError
from fleet_server.storage.names import is_output_name
from fleet_server.storage.outputs import CHUNK_BYTES, LocalOutputs, OutputLimits
from tests.waiting import wait_until

SMALL = random.Random(1).randbytes(5_000)
LARGE = random.Random(2).randbytes(3 * CHUNK_BYTES + 17)
TINY_CACHE = OutputLimits(reserve_bytes=0, cache_bytes=10_000, cached_file_bytes=6_000)


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(one.name for one in folder.iterdir())


async def chunks(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
async def outputs(tmp_path: Path) -> AsyncIterator[LocalOutputs]:
    opened = LocalOutputs(tmp_path / "outputs", TINY_CACHE)
    await opened.open()
    yield opened
    await opened.aclose()


async def put(outputs: LocalOutputs, name: str, data: bytes) -> None:
    await outputs.write(name, chunks(data, 64_000), size=len(data), sha256=digest(data))


async def collected(stream: AsyncIterator[bytes]) -> list[bytes]:
    return [chunk async for chunk in stream]


@pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=["empty", "small", "large"])
async def test_what_was_written_is_read(outputs: LocalOutputs, tmp_path: Path, data: bytes) -> None:
    await put(outputs, "a.png", data)
    assert await outputs.read("a.png") == data
    assert b"".join(await collected(outputs.stream("a.png"))) == data
    seen = await outputs.stat("a.png")
    assert seen is not None and (seen.filename, seen.size_bytes) == ("a.png", len(data))
    assert (tmp_path / "outputs" / "a.png").read_bytes() == data
    assert names(tmp_path / "outputs") == ["a.png"]


@pytest.mark.parametrize("name", ["small.png", "large.png"])
@pytest.mark.parametrize(("start", "end"), [(0, 10), (4_990, None), (100, 100), (10, 10**9), (CHUNK_BYTES - 1, None)])
async def test_a_part_is_the_slice(outputs: LocalOutputs, name: str, start: int, end: int | None) -> None:
    data = SMALL if name == "small.png" else LARGE
    await put(outputs, name, data)
    for cached in (True, False):
        if not cached:
            await put(outputs, "x.png", SMALL)
            await put(outputs, "y.png", SMALL)
        parts = await collected(outputs.stream(name, start, end))
        assert b"".join(parts) == data[start:end]
        assert all(len(part) <= CHUNK_BYTES for part in parts)


async def test_the_same_file_again_is_the_same_file(outputs: LocalOutputs) -> None:
    await asyncio.gather(*(put(outputs, "a.png", LARGE) for _ in range(4)))
    assert await outputs.read("a.png") == LARGE


async def test_a_file_replaced_is_not_read_from_the_cache(outputs: LocalOutputs) -> None:
    await put(outputs, "a.png", SMALL)
    assert await outputs.read("a.png") == SMALL
    await put(outputs, "a.png", LARGE)
    assert await outputs.read("a.png") == LARGE
    assert await outputs.delete("a.png")
    assert await outputs.read("a.png") is None
    assert not await outputs.delete("a.png")
    await put(outputs, "a.png", SMALL)
    assert await outputs.delete("a.png")
    assert await outputs.read("a.png") is None


@pytest.mark.parametrize(
    ("size", "sha256", "field"),
    [
        (len(SMALL) + 1, digest(SMALL), "chunk"),
        (len(SMALL) - 1, digest(SMALL), "chunk"),
        (len(SMALL), digest(b""), "sha256"),
    ],
)
async def test_other_bytes_than_announced_leave_nothing(
    outputs: LocalOutputs, tmp_path: Path, size: int, sha256: str, field: str
) -> None:
    with pytest.raises(FleetError) as refusal:
        await outputs.write("a.png", chunks(SMALL), size=size, sha256=sha256)
    assert refusal.value.reason == "INVALID_FIELD"
    assert refusal.value.violations[0].field == field
    assert names(tmp_path / "outputs") == []


async def test_an_upload_cut_half_way_leaves_nothing(outputs: LocalOutputs, tmp_path: Path) -> None:
    reached = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield LARGE[: 2 * CHUNK_BYTES]
        reached.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(outputs.write("a.png", slow(), size=len(LARGE), sha256=digest(LARGE)))
    await reached.wait()
    await wait_until(lambda: len(names(tmp_path / "outputs")) == 1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert names(tmp_path / "outputs") == []
    await put(outputs, "a.png", LARGE)
    assert await outputs.read("a.png") == LARGE


async def test_what_a_crash_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    (folder / ".part-0123").write_bytes(b"half")
    (folder / "kept.png").write_bytes(b"whole")
    opened = LocalOutputs(folder, TINY_CACHE)
    await opened.open()
    assert names(folder) == ["kept.png"]
    assert await opened.read("kept.png") == b"whole"
    await opened.aclose()


# Each call that changes the disk, in a child that is killed at its n-th: every crash point of `write`.
KILLED_WRITE = """
import asyncio, hashlib, os, signal, sys
from pathlib import Path
from fleet_server.storage.outputs import LocalOutputs, OutputLimits

folder, point, size, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), 0
data = b"picture" * (size // 7)

def step(event, arguments):
    global count
    if event in ("open", "os.rename", "os.remove", "sync", "write"):
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

def counted(name, event):
    real = getattr(os, name)
    def call(fd, *arguments):
        step(event, ())
        done = real(fd, *arguments)
        step(event, ())
        return done
    setattr(os, name, call)

async def chunks():
    for at in range(0, len(data), 1 << 20):
        yield data[at:at + (1 << 20)]

async def main():
    outputs = LocalOutputs(folder, OutputLimits(reserve_bytes=0))
    await outputs.open()
    counted("fsync", "sync")
    counted("write", "write")
    sys.addaudithook(step)
    await outputs.write("a.png", chunks(), size=len(data), sha256=hashlib.sha256(data).hexdigest())

asyncio.run(main())
sys.stdout.write(str(count))
"""


@pytest.mark.parametrize("size", [700, 2_100_000])
async def test_killed_at_each_step_of_write_a_file_is_whole_or_not_there(tmp_path: Path, size: int) -> None:
    def run(folder: Path, point: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED_WRITE, str(folder), str(point), str(size)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole = await asyncio.to_thread(run, tmp_path / "whole", -1)
    assert whole.returncode == 0, whole.stderr
    points = int(whole.stdout)
    assert points >= 8
    seen = set()
    for point in range(points):
        folder = tmp_path / str(point)
        killed = await asyncio.to_thread(run, folder, point)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        opened = LocalOutputs(folder, TINY_CACHE)
        await opened.open()
        assert names(folder) in ([], ["a.png"])
        seen.add(data := await opened.read("a.png"))
        assert data in (None, b"picture" * (size // 7))
        await opened.aclose()
    assert len(seen) == 2


async def test_a_full_disk_is_said_and_leaves_nothing(
    outputs: LocalOutputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def full(file: int, data: object) -> int:
        if Path(f"/proc/self/fd/{file}").readlink().is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, "no space left on device")
        return real(file, data)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(FleetError) as refusal:
        await put(outputs, "a.png", LARGE)
    assert refusal.value.reason == "DISK_FULL"
    monkeypatch.undo()
    assert names(tmp_path / "outputs") == []
    await put(outputs, "a.png", LARGE)


async def test_the_reserve_of_the_disk_is_left_alone(tmp_path: Path) -> None:
    opened = LocalOutputs(tmp_path / "outputs", OutputLimits(reserve_bytes=1 << 60))
    await opened.open()
    with pytest.raises(FleetError) as refusal:
        await put(opened, "a.png", SMALL)
    assert refusal.value.reason == "DISK_FULL"
    assert refusal.value.retry_after_seconds
    await opened.aclose()


async def test_bytes_and_name_are_synced_before_it_returns(
    outputs: LocalOutputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(file: int) -> None:
        steps.append("folder" if Path(f"/proc/self/fd/{file}").readlink().is_dir() else "file")
        real_sync(file)

    def rename(*args: object, **kwargs: object) -> None:
        steps.append("rename")
        real_rename(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    await put(outputs, "a.png", LARGE)
    assert steps == ["file", "rename", "folder"]


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", ".part-1", "/etc/passwd", "a\0b", "a\n", "x" * 129, "ä.png", "..", "."]
)
async def test_a_name_that_is_none_reaches_nothing(outputs: LocalOutputs, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(b"secret")
    assert await outputs.read(name) is None
    assert await outputs.stat(name) is None
    assert not await outputs.delete(name)
    with pytest.raises(FleetError):
        await collected(outputs.stream(name))
    with pytest.raises(FleetError):
        await put(outputs, name, SMALL)
    assert (tmp_path / "x").read_bytes() == b"secret"


async def test_links_folders_and_pipes_are_not_outputs(outputs: LocalOutputs, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    for name in ("link.png", "folder.png", "pipe.png"):
        assert await outputs.read(name) is None
        assert await outputs.stat(name) is None
        with pytest.raises(FleetError):
            await collected(outputs.stream(name))
    await put(outputs, "link.png", SMALL)
    assert await outputs.read("link.png") == SMALL
    assert (tmp_path / "secret").read_bytes() == b"secret"


async def test_the_cache_is_bounded(outputs: LocalOutputs) -> None:
    for number in range(5):
        await put(outputs, f"{number}.png", SMALL)
    await put(outputs, "large.png", LARGE)
    assert set(outputs._cache) == {"3.png", "4.png"}
    assert outputs._cached_bytes == 2 * len(SMALL)


@given(st.text(max_size=140))
def test_a_name_is_one_plain_segment(name: str) -> None:
    if is_output_name(name):
        assert name == Path(name).name
        assert name.isascii() and name not in {".", ".."} and not name.startswith((".", "-", "_"))
        assert set(name) & set("/\\\0\n ") == set()


def test_ordinary_names_pass() -> None:
    for name in ("a.png", "a..b.png", "0f.webp", "A_b-c.1"):
        assert is_output_name(name)


@pytest.fixture(autouse=True)
def _no_files_left_open() -> Iterator[None]:
    before = len(names(Path("/proc/self/fd")))
    yield
    assert len(names(Path("/proc/self/fd"))) <= before + 8
