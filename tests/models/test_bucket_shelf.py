"""The list of the buckets' models, from a real S3 server that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.services.bucket_shelf import BucketShelf, ShelfSettings
from fleet_server.services.object_reads import ObjectReads
from fleet_server.storage.buckets import LORAS, MODELS
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import S3Config, S3Limits
from tests.models.making import header_of, model_bytes
from tests.s3.embedded import ACCESS, SECRET, EmbeddedProcess
from tests.waiting import wait_until


class Counted(S3Store):
    """Counts what is read of objects."""

    reads = 0
    read_bytes = 0

    async def stream(self, bucket: str, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes]:
        self.reads += 1
        async with contextlib.aclosing(super().stream(bucket, key, start, end)) as chunks:
            async for chunk in chunks:
                self.read_bytes += len(chunk)
                yield chunk


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedProcess]:
    with EmbeddedProcess(tmp_path_factory.mktemp("s3") / "data") as process:
        yield process


@pytest.fixture
async def s3(process: EmbeddedProcess) -> AsyncIterator[Counted]:
    """Empty buckets of models."""
    store = Counted(S3Config(process.endpoint, ACCESS, SECRET), S3Limits(check_seconds=0.2, recheck_seconds=0.05))
    await store.open()
    async with asyncio.timeout(50):
        await store.wait_well()
    for bucket in (MODELS, LORAS):
        for one in await store.list(bucket):
            await store.delete(bucket, one.key)
    store.reads = store.read_bytes = 0
    yield store
    await store.aclose()


@pytest.fixture
def shelf(s3: Counted, tmp_path: Path) -> BucketShelf:
    return BucketShelf(s3, tmp_path / "models.json", ShelfSettings(refresh_seconds=0.05))


async def test_headers_are_read_once_and_nothing_else(s3: Counted, shelf: BucketShelf) -> None:
    await s3.put(MODELS, "sub/a.safetensors", model_bytes(2 << 20), metadata={"sha256": "ab" * 32})
    await s3.put(LORAS, "b.safetensors", model_bytes(1000, trigger_words="ink, brush"))
    await s3.put(MODELS, "notes.txt", b"x")
    await shelf.refresh()
    one, two = shelf.find("checkpoint", "sub/a.safetensors"), shelf.find("lora", "b.safetensors")
    assert one is not None and two is not None and shelf.find("checkpoint", "notes.txt") is None
    assert (one.architecture, one.sha256, one.size_bytes > 2 << 20) == ("sketch", "ab" * 32, True)
    assert (two.trigger_words, two.sha256) == (("ink", "brush"), "")
    assert s3.reads == 2 and s3.read_bytes < 600_000
    await shelf.refresh()
    assert s3.reads == 2
    await s3.put(LORAS, "b.safetensors", model_bytes(1000, architecture="sdxl"))
    await shelf.refresh()
    changed = shelf.find("lora", "b.safetensors")
    assert changed is not None and changed.architecture == "sdxl" and changed.etag != two.etag
    assert s3.reads == 3
    await s3.delete(LORAS, "b.safetensors")
    await shelf.refresh()
    assert shelf.find("lora", "b.safetensors") is None


async def test_a_long_header_takes_a_second_read(s3: Counted, shelf: BucketShelf) -> None:
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    tensors = {f"model.diffusion_model.double_blocks.{number}": entry for number in range(6_000)}
    await s3.put(MODELS, "long.safetensors", header_of(tensors=tensors) + b"\0")
    await shelf.refresh()
    file = shelf.find("checkpoint", "long.safetensors")
    assert file is not None and file.architecture == "flux"
    assert s3.reads == 2


async def test_what_is_no_model_is_left_out_and_not_read_again(s3: Counted, shelf: BucketShelf) -> None:
    await s3.put(MODELS, "bad.safetensors", b"<html>" * 1000)
    await s3.put(MODELS, "cut.safetensors", model_bytes(1000)[:-1])
    await s3.put(MODELS, "tiny.safetensors", b"x")
    await s3.put(MODELS, "a b/&.safetensors", model_bytes(10))
    await shelf.refresh()
    assert shelf.files("checkpoint") == {}
    reads = s3.reads
    await shelf.refresh()
    assert s3.reads == reads
    await s3.put(MODELS, "bad.safetensors", model_bytes(1000))
    await shelf.refresh()
    assert set(shelf.files("checkpoint")) == {"bad.safetensors"}


async def test_more_than_a_page_is_listed(s3: Counted, tmp_path: Path) -> None:
    shelf = BucketShelf(s3, tmp_path / "models.json", ShelfSettings(page=5))
    small = model_bytes(1)
    await asyncio.gather(*(s3.put(LORAS, f"{number:04}.safetensors", small) for number in range(21)))
    await shelf.refresh()
    assert len(shelf.files("lora")) == 21


async def test_a_name_that_is_asked_for_is_looked_for_at_once(s3: Counted, shelf: BucketShelf) -> None:
    assert await shelf.look_up("a.safetensors") is None
    await s3.put(MODELS, "a.safetensors", model_bytes(10))
    found = await shelf.look_up("a.safetensors")
    assert found is not None
    before = shelf.refreshes
    await shelf.look_up("a.safetensors")
    assert shelf.refreshes == before
    await asyncio.gather(*(shelf.look_up("none") for _ in range(20)))
    assert shelf.refreshes <= before + 2, "they look together"


async def test_it_is_refreshed_by_itself_and_outlives_s3_and_a_restart(
    process: EmbeddedProcess, s3: Counted, shelf: BucketShelf, tmp_path: Path
) -> None:
    told: list[int] = []
    shelf.subscribe(lambda: told.append(1))
    task = asyncio.create_task(shelf.run())
    try:
        await s3.put(MODELS, "a.safetensors", model_bytes(10))
        await wait_until(lambda: shelf.find("checkpoint", "a.safetensors"))
        assert told == [1]
        process.stop()
        await wait_until(lambda: not s3.status[0])
        assert shelf.find("checkpoint", "a.safetensors") is not None
        with pytest.raises(FleetError, match="S3") as refused:
            await shelf.look_up("b.safetensors")
        assert refused.value.reason == "S3_UNAVAILABLE"
        again = BucketShelf(s3, tmp_path / "models.json", ShelfSettings(refresh_seconds=0.05))
        other = asyncio.create_task(again.run())
        await wait_until(lambda: again.find("checkpoint", "a.safetensors"))
        other.cancel()
        process.start()
        await s3.wait_well()
        await s3.put(MODELS, "b.safetensors", model_bytes(10))
        await wait_until(lambda: shelf.find("checkpoint", "b.safetensors"))
    finally:
        task.cancel()
        process.start() if not s3.status[0] else None


async def test_an_unreadable_list_is_left_out(s3: Counted, shelf: BucketShelf, tmp_path: Path) -> None:
    (tmp_path / "models.json").write_text('[{"name": 1}]')
    task = asyncio.create_task(shelf.run())
    await wait_until(lambda: shelf.refreshes)
    assert shelf.empty
    task.cancel()


async def test_a_read_from_the_beginning_tells_the_hash(s3: Counted, shelf: BucketShelf) -> None:
    data = model_bytes(3 << 20)
    stored = await s3.put(MODELS, "a.safetensors", data)
    await shelf.refresh()
    reads, stat = ObjectReads(s3, shelf), await s3.stat(MODELS, "a.safetensors")
    assert stat is not None and reads.sha256(stat) == ""
    got = b"".join([chunk async for chunk in reads.stream(stat, 1000, stat.etag)])
    assert got == data[1000:] and reads.sha256(stat) == ""
    s3.reads = 0
    got = b"".join([chunk async for chunk in reads.stream(stat, 0, stat.etag)])
    assert got == data and reads.sha256(stat) == stored.sha256 and s3.reads == 1
    file = shelf.find("checkpoint", "a.safetensors")
    assert file is not None and file.sha256 == stored.sha256


async def test_an_object_that_is_replaced_while_it_is_read_is_told(s3: Counted, shelf: BucketShelf) -> None:
    await s3.put(MODELS, "a.safetensors", model_bytes(3 << 20))
    await shelf.refresh()
    reads, stat = ObjectReads(s3, shelf), await s3.stat(MODELS, "a.safetensors")
    assert stat is not None
    with pytest.raises(FleetError, match="another version"):
        async for _ in reads.stream(stat, 0, stat.etag):
            await s3.put(MODELS, "a.safetensors", model_bytes(3 << 20, seed=2))
    assert reads.sha256(stat) == ""


async def test_blame_ends(s3: Counted, tmp_path: Path) -> None:
    now = 0.0
    shelf = BucketShelf(s3, tmp_path / "models.json", clock=lambda: now)
    await s3.put(MODELS, "a.safetensors", model_bytes(10))
    file = await shelf.look_up("a.safetensors")
    assert file is not None
    shelf.blame("agx0", file, "no room", 5)
    assert shelf.trouble("agx0", "checkpoint", "a.safetensors") == "no room"
    assert shelf.trouble("agx1", "checkpoint", "a.safetensors") is None
    now = 6.0
    assert shelf.trouble("agx0", "checkpoint", "a.safetensors") is None


async def test_a_name_that_was_missed_is_there_for_the_next_try(s3: Counted, tmp_path: Path) -> None:
    shelf = BucketShelf(s3, tmp_path / "models.json", ShelfSettings(refresh_seconds=1_000, least_seconds=0.01))
    task = asyncio.create_task(shelf.run())
    await wait_until(lambda: shelf.refreshes)
    await s3.put(MODELS, "a.safetensors", model_bytes(10))
    assert shelf.find("checkpoint", "a.safetensors") is None
    shelf.missed()
    await wait_until(lambda: shelf.find("checkpoint", "a.safetensors"))
    task.cancel()
