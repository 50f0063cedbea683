"""Bringing files: once, resumed, whole, within the budget."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from fleet_agent.inputs import Downloader
from fleet_agent.model_downloads import DownloadError, DownloadSettings, ModelDownloads
from fleet_agent.model_shelf import FileKey, ModelShelf, Source
from tests.models.making import model_bytes, put
from tests.models.serving import CHUNK, FileServer
from tests.waiting import wait_until

DATA = model_bytes(3 << 20)
SHA256 = hashlib.sha256(DATA).hexdigest()
REFERENCE = "s3://fleet-models/a.safetensors"
SOURCE = Source("checkpoint", "a.safetensors", REFERENCE, len(DATA), SHA256, "e1")
QUICK = DownloadSettings(floor_bytes=0, patience_seconds=50, first_pause_seconds=0.01, longest_pause_seconds=0.05)


@dataclass
class Node:
    """An agent's side of it."""

    folder: Path
    server: FileServer
    downloader: Downloader | None
    in_use: set[FileKey] = field(default_factory=set)
    forgotten: list[FileKey] = field(default_factory=list)
    arrived: list[tuple[Path, str]] = field(default_factory=list)
    downloads: ModelDownloads = field(init=False)

    def begin(self, settings: DownloadSettings) -> None:
        self.downloads = ModelDownloads(
            ModelShelf(self.folder, sync_bytes=1 << 20),
            settings,
            downloader=lambda: self.downloader,
            in_use=lambda: self.in_use,
            forget=self.forgotten.append,
            arrived=self._arrive,
        )

    async def _arrive(self, path: Path, sha256: str) -> None:
        self.arrived.append((path, sha256))

    async def bring(self, source: Source = SOURCE) -> str:
        task = self.downloads.begin(source).task
        assert task is not None
        return await asyncio.shield(task)

    @property
    def target(self) -> Path:
        return self.folder / "checkpoints" / "a.safetensors"


Make = Callable[..., Awaitable[Node]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    nodes: list[Node] = []
    server = FileServer({REFERENCE: DATA})
    downloader = await server.start()

    async def one(settings: DownloadSettings = QUICK, folder: str = "models") -> Node:
        node = Node(tmp_path / folder, server, downloader)
        node.begin(settings)
        await node.downloads.open()
        nodes.append(node)
        return node

    yield one
    for node in nodes:
        await node.downloads.aclose()
    await server.stop()


@asynccontextmanager
async def held(node: Node, after: int = 1 << 20) -> AsyncIterator[None]:
    """The server stops after so many bytes until the block ends."""
    node.server.hold_after = after
    node.server.gate.clear()
    yield
    node.server.hold_after = 1 << 62
    node.server.gate.set()


async def test_a_file_comes_whole(make: Make) -> None:
    node = await make()
    assert await node.bring() == "downloaded"
    assert node.target.read_bytes() == DATA
    assert node.arrived == [(node.target, SHA256)]
    assert await node.bring() == "present"
    assert len(node.server.reads) == 1


async def test_however_many_ask_it_is_read_once(make: Make) -> None:
    node = await make()
    assert set(await asyncio.gather(*(node.bring() for _ in range(20)))) == {"downloaded"}
    assert node.server.reads == [(REFERENCE, 0)]


async def test_after_a_cut_it_goes_on_where_it_was(make: Make) -> None:
    node = await make()
    node.server.cuts = [len(DATA) // 2, 5 * CHUNK]
    assert await node.bring() == "downloaded"
    assert node.target.read_bytes() == DATA
    offsets = [offset for _, offset in node.server.reads]
    assert offsets[0] == 0 and offsets == sorted(offsets) and len(offsets) == 3
    assert offsets[1] >= len(DATA) // 2 - CHUNK
    # (What was on its way when the stream was cut may come twice.)
    assert node.server.served <= len(DATA) + 4 * CHUNK


async def test_a_server_that_is_away_is_waited_for(make: Make) -> None:
    node = await make()
    downloader, node.downloader = node.downloader, None
    task = asyncio.create_task(node.bring())
    await asyncio.sleep(0)
    node.server.refusals = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL]
    node.downloader = downloader
    assert await task == "downloaded"


async def test_one_that_stays_away_is_given_up_and_what_is_there_is_kept(make: Make) -> None:
    node = await make(replace(QUICK, patience_seconds=1.5))
    node.server.cuts = [len(DATA) // 2]
    async with held(node):
        task = asyncio.create_task(node.bring())
        await wait_until(lambda: [part for part in (node.folder / ".partial").glob("*.part") if part.stat().st_size])
        # It is away before the cut, so nobody asks it a second time.
        node.downloader = None
    with pytest.raises(DownloadError, match="no byte came for a long time") as refused:
        await task
    assert refused.value.reason == "S3_UNAVAILABLE"
    assert not node.target.exists()
    (part,) = (node.folder / ".partial").glob("*.part")
    assert part.stat().st_size > 0


async def test_a_new_process_goes_on_where_the_old_one_was_killed(make: Make) -> None:
    node = await make()
    async with held(node, 2 << 20):
        task = asyncio.create_task(node.bring())
        await wait_until(lambda: node.server.served >= 2 << 20)
        (part,) = (node.folder / ".partial").glob("*.part")
        await wait_until(lambda: part.stat().st_size >= 2 << 20)
        await node.downloads.aclose()
        await asyncio.gather(task, return_exceptions=True)
        assert not node.target.exists()
    again = await make()
    node.server.reads.clear()
    assert await again.bring() == "downloaded"
    assert again.target.read_bytes() == DATA
    assert again.server.reads[0][1] >= 1 << 20


async def test_spoiled_bytes_are_brought_again_and_then_refused(make: Make) -> None:
    node = await make()
    node.server.files[REFERENCE] = DATA[:-1] + b"\0"
    with pytest.raises(DownloadError, match="do not have the hash") as refused:
        await node.bring()
    assert refused.value.reason == "S3_UNAVAILABLE"
    assert [offset for _, offset in node.server.reads] == [0, 0]
    assert not node.target.exists()
    node.server.files[REFERENCE] = DATA
    assert await node.bring() == "downloaded"


async def test_what_is_no_model_is_not_kept(make: Make) -> None:
    node = await make()
    node.server.files[REFERENCE] = b"<html>" * 500_000
    with pytest.raises(DownloadError, match="is no model file") as refused:
        await node.bring(replace(SOURCE, sha256="", size_bytes=3_000_000))
    assert refused.value.reason == "MODEL_NOT_FOUND"
    assert not node.target.exists() and not list((node.folder / ".partial").iterdir())


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
async def test_another_size_than_was_said_is_refused(make: Make, size: int) -> None:
    node = await make()
    with pytest.raises(DownloadError, match="ask again"):
        await node.bring(replace(SOURCE, size_bytes=size))
    assert not node.target.exists()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        (grpc.StatusCode.FAILED_PRECONDITION, "S3_UNAVAILABLE"),
        (grpc.StatusCode.PERMISSION_DENIED, "S3_UNAVAILABLE"),
    ],
)
async def test_what_will_not_change_is_told_at_once(make: Make, code: grpc.StatusCode, reason: str) -> None:
    node = await make()
    node.server.refusals = [code]
    with pytest.raises(DownloadError) as refused:
        await node.bring()
    assert refused.value.reason == reason and len(node.server.reads) == 1


async def test_a_stream_that_ends_in_an_error_is_not_whole_although_all_bytes_came(make: Make) -> None:
    node = await make()
    # Its last word is that the object was replaced meanwhile.
    node.server.cuts = [len(DATA)]
    assert await node.bring() == "downloaded"
    assert [offset for _, offset in node.server.reads] == [0, len(DATA)]


async def test_a_file_that_was_put_there_by_hand_is_left_alone(make: Make) -> None:
    node = await make()
    put(node.target, b"mine")
    with pytest.raises(DownloadError, match="put there by hand") as refused:
        await node.bring()
    assert refused.value.reason == "NAME_IN_USE" and node.target.read_bytes() == b"mine"
    put(node.target, DATA)
    assert await node.bring() == "present" and node.server.reads == []


async def test_a_newer_version_takes_the_place_of_one_that_was_brought(make: Make) -> None:
    node = await make()
    await node.bring()
    newer = model_bytes(1 << 20, seed=2)
    node.server.files[REFERENCE] = newer
    source = replace(SOURCE, size_bytes=len(newer), sha256="", etag="e2")
    assert await node.bring(source) == "downloaded"
    assert node.target.read_bytes() == newer


# Room.


async def filled(node: Node, *names: str, brought: bool = True) -> None:
    """Files that were last used in that order, after those that are there."""
    for index, name in enumerate(names, len(list((node.folder / "checkpoints").glob("*.safetensors")))):
        source = Source("checkpoint", f"{name}.safetensors", REFERENCE, len(DATA), SHA256)
        path = node.folder / "checkpoints" / source.name
        if brought:
            await node.bring(source)
        else:
            put(path, DATA)
        os.utime(path, ns=(index * 10**9, path.stat().st_mtime_ns))


def names(node: Node) -> set[str]:
    return {path.stem for path in (node.folder / "checkpoints").glob("*.safetensors")}


async def test_what_was_not_used_for_longest_makes_room(make: Make) -> None:
    node = await make(replace(QUICK, budget_bytes=3 * len(DATA)))
    await filled(node, "x", "y", "z")
    await node.bring()
    assert names(node) == {"a", "y", "z"} and node.forgotten == [("checkpoint", "x.safetensors")]


async def test_what_is_in_use_or_was_put_there_by_hand_stays(make: Make) -> None:
    node = await make(replace(QUICK, budget_bytes=4 * len(DATA)))
    await filled(node, "x", "y")
    await filled(node, "mine", brought=False)
    await filled(node, "z")
    node.in_use.add(("checkpoint", "x.safetensors"))
    await node.bring()
    assert names(node) == {"a", "x", "mine", "z"}
    node.in_use |= {("checkpoint", f"{name}.safetensors") for name in "az"}
    with pytest.raises(DownloadError, match="does not make room") as refused:
        await node.bring(replace(SOURCE, name="b.safetensors"))
    assert refused.value.reason == "DISK_FULL"
    assert names(node) == {"a", "x", "mine", "z"}


async def test_a_setting_allows_files_put_there_by_hand_to_go(make: Make) -> None:
    node = await make(replace(QUICK, budget_bytes=len(DATA), evict_any=True))
    await filled(node, "mine", brought=False)
    await node.bring()
    assert names(node) == {"a"}


async def test_nothing_goes_for_a_file_that_would_not_fit_anyway(make: Make) -> None:
    node = await make(replace(QUICK, budget_bytes=2 * len(DATA)))
    await filled(node, "x", "y")
    big = replace(SOURCE, name="big.safetensors", size_bytes=3 * len(DATA))
    with pytest.raises(DownloadError, match="does not make room"):
        await node.bring(big)
    assert names(node) == {"x", "y"} and node.forgotten == []


async def test_two_that_come_at_once_share_the_budget(make: Make) -> None:
    node = await make(replace(QUICK, budget_bytes=2 * len(DATA) - 1))
    sources = [replace(SOURCE, name=f"{name}.safetensors") for name in "ab"]
    results: list[Any] = await asyncio.gather(*(node.bring(one) for one in sources), return_exceptions=True)
    assert sorted(map(type, results), key=str) == sorted([str, DownloadError], key=str)
    assert len(names(node)) == 1


async def test_a_full_disk_is_said(make: Make) -> None:
    node = await make(replace(QUICK, floor_bytes=1 << 60))
    with pytest.raises(DownloadError, match="are free on the disk") as refused:
        await node.bring()
    assert refused.value.reason == "DISK_FULL" and node.server.reads == []
