"""The search index: it follows the store, is made again when it has lost it, and costs the same at any size."""

from __future__ import annotations

import random
import sqlite3
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from fleet.v1 import types_pb2, vision_pb2

from fleet_server.services.pages import token_of
from fleet_server.store import OutputRow, PageKey, Store
from fleet_server.store.keys import NAMES
from tests.outputs.world import World, put_rows, row_of, world_on
from tests.services.calls.desk import asked
from tests.store.conftest import Server

PROMPTS = ("A stormy Sea, at night", "sea and sky", "Ein Haus über dem Meer", "naïve café 東京 snake_case 3d", "")


def rows_of(count: int) -> list[OutputRow]:
    draw = random.Random(3)
    return [
        row_of(
            f"{draw.getrandbits(128):032x}.png",
            5,
            "00",
            at_ms=1_000_000 + number // 3,
            prompt=draw.choice(PROMPTS),
            model=draw.choice(("sketch", "other")),
            node_id=draw.choice(("agx0", "agx1")),
            job_id=f"job-{number // 2}",
            content_type=draw.choice(("image/png", "video/mp4", "text/plain")),
        )
        for number in range(count)
    ]


async def shown(world: World, limit: int = 1_000, **fields: Any) -> list[str]:
    found, token = [], ""
    while True:
        images, token = await world.filing.gallery.list(
            asked(vision_pb2.ListGalleryRequest, limit=limit, page_token=token, **fields)
        )
        found += [image.filename for image in images]
        if not token:
            return found


def words(text: str) -> set[str]:
    kept = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in text.casefold())
    return set(kept.split())


FILTERS: list[tuple[dict[str, Any], Callable[[types_pb2.Output], bool]]] = [
    ({}, lambda one: True),
    ({"model": "other"}, lambda one: one.metadata.model == "other"),
    ({"node_id": "agx1"}, lambda one: one.node_id == "agx1"),
    ({"job_id": "job-7"}, lambda one: one.job_id == "job-7"),
    ({"prompt": "SEA"}, lambda one: "sea" in words(one.metadata.prompt)),
    ({"prompt": "sea night"}, lambda one: {"sea", "night"} <= words(one.metadata.prompt)),
    ({"prompt": "über, 3D: snake_case"}, lambda one: {"über", "3d", "snake_case"} <= words(one.metadata.prompt)),
    ({"prompt": "ÜBER"}, lambda one: "über" in words(one.metadata.prompt)),
    ({"prompt": "snake"}, lambda one: False),
    ({"prompt": 'sea" OR "sky'}, lambda one: {"sea", "or", "sky"} <= words(one.metadata.prompt)),
    ({"prompt": "model:736b65746368"}, lambda one: False),
    ({"prompt": "東京", "node_id": "agx0", "model": "sketch"},
     lambda one: "東京" in words(one.metadata.prompt) and one.node_id == "agx0" and one.metadata.model == "sketch"),
    ({"created_after": "1970-01-01T00:16:40.010Z"}, lambda one: one.create_time.ToMilliseconds() >= 1_000_010),
    ({"created_before": "1970-01-01T00:16:40.010Z"}, lambda one: one.create_time.ToMilliseconds() < 1_000_010),
]  # fmt: skip


async def test_each_filter_finds_what_it_says(store: Store, tmp_path: Path) -> None:
    rows = rows_of(150)
    async with world_on(store, tmp_path, None) as world:
        await put_rows(store, rows)
        records = [types_pb2.Output.FromString(row.record) for row in rows]
        for fields, fits in FILTERS:
            expected = {one.filename for one in records if fits(one) and not one.content_type.startswith("text/")}
            found = await shown(world, **fields)
            assert set(found) == expected and len(found) == len(expected), fields
            assert await shown(world, limit=7, **fields) == found, fields
        times = {one.filename: one.create_time.ToMilliseconds() for one in records}
        found = await shown(world)
        assert [times[name] for name in found] == sorted((times[name] for name in found), reverse=True)


async def test_pages_hold_while_outputs_come_and_go(store: Store, tmp_path: Path) -> None:
    rows = [row for row in rows_of(60) if b"text/plain" not in row.record]
    async with world_on(store, tmp_path, None) as world:
        await put_rows(store, rows)
        first, token = await world.filing.gallery.list(asked(vision_pb2.ListGalleryRequest, limit=10))
        late = row_of("f" * 32 + ".png", 5, "00", at_ms=9_000_000)
        await put_rows(store, [late])
        # The very row that the token names goes too.
        await world.filing.gallery.delete(first[-1].filename)
        rest: list[str] = []
        while token:
            images, token = await world.filing.gallery.list(
                asked(vision_pb2.ListGalleryRequest, limit=10, page_token=token)
            )
            rest += [image.filename for image in images]
        assert len(rest) == len(set(rest)) and not set(rest) & {late.filename, *(one.filename for one in first)}
        assert set(rest) | {one.filename for one in first} == {row.filename for row in rows}


async def test_what_was_stored_is_found_at_once_by_every_server(store: Store, tmp_path: Path) -> None:
    async with world_on(store, tmp_path / "a", None) as one, world_on(store, tmp_path / "b", None) as two:
        row = await one.add(prompt="alpha")
        assert await shown(two, prompt="alpha") == [row.filename]
        await two.filing.gallery.star(row.filename, True)
        assert await shown(one, starred=True) == [row.filename]
        await one.filing.gallery.delete(row.filename)
        assert await shown(two) == []


@pytest.mark.parametrize("harm", ["spoiled", "missing", "another store", "of another version", "too far behind"])
async def test_an_index_that_is_of_no_use_is_made_again(
    store: Store, tmp_path: Path, valkey: Server, harm: str
) -> None:
    rows = [row for row in rows_of(20) if b"text/plain" not in row.record]
    async with world_on(store, tmp_path, None) as world:
        await put_rows(store, rows)
        assert len(await shown(world)) == len(rows)
    path = tmp_path / "gallery.sqlite"
    client: Any = redis.Redis(unix_socket_path=str(valkey.path), protocol=2)
    totals = f"{store.outputs._room.keys.prefix}{NAMES['output_totals']}"
    if harm == "spoiled":
        path.write_bytes(b"no database" * 1000)
        path.with_name("gallery.sqlite-wal").unlink(missing_ok=True)
    elif harm == "missing":
        path.unlink()
    elif harm == "another store":
        client.hset(totals, "epoch", "another")
        with sqlite3.connect(path) as db:
            db.executescript("DELETE FROM words; DELETE FROM rows")
    elif harm == "of another version":
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 99")
    else:
        # Deletions have been forgotten that this index never heard of.
        client.hset(
            totals,
            "floor",
            len(rows) + 5,
        )
        client.hset(totals, "changes", len(rows) + 9)
        with sqlite3.connect(path) as db:
            db.executescript("DELETE FROM words; DELETE FROM rows")
    client.close()
    async with world_on(store, tmp_path, None) as world:
        assert set(await shown(world)) == {row.filename for row in rows}


async def test_only_the_newest_deletions_are_remembered(store: Store, valkey: Server) -> None:
    """So that the store does not grow with what is gone."""
    await store.outputs.put(row_of("kept.png", 1, "00", at_ms=1))
    rows = [row_of(f"{n}.png", 1, "00", at_ms=n) for n in range(3)]
    await put_rows(store, rows)
    for row in rows:
        await store.outputs.delete(row.filename)
    client: Any = redis.Redis(unix_socket_path=str(valkey.path), protocol=2)
    prefix = store.outputs._room.keys.prefix
    old = {f"old{n}": n - 20_000 for n in range(9_997)}
    for name in ("output_tombstones", "output_changes"):
        client.zadd(prefix + NAMES[name], old)
    await store.outputs.delete("kept.png")
    assert client.zcard(prefix + NAMES["output_tombstones"]) == 10_000
    assert client.zscore(prefix + NAMES["output_changes"], "old0") is None
    assert (await store.outputs.changes(0, 10, epoch="e")).floor == -20_000
    client.close()


def commands(client: Any) -> int:
    """Commands that the server has run so far, those of scripts included."""
    return sum(one["calls"] for name, one in client.info("commandstats").items() if name != "cmdstat_info")


async def test_a_page_costs_as_many_commands_at_10_000_outputs_as_at_100(
    store: Store, tmp_path: Path, valkey: Server
) -> None:
    client: Any = redis.Redis(unix_socket_path=str(valkey.path), protocol=2)
    costs: list[list[int]] = []
    async with world_on(store, tmp_path, None) as world:
        for size in (100, 10_000):
            have = len(await shown(world))
            rows = [
                row_of(f"{n:032x}.png", 5, "00", at_ms=n, prompt=f"sea {n % 10}", node_id=f"agx{n % 2}")
                for n in range(have, size)
            ]
            await put_rows(store, rows)
            await shown(world)
            costs.append([])
            for fields in ({}, {"model": "sketch"}, {"node_id": "agx1"}, {"prompt": "sea 3"}, {"starred": False},
                           {"prompt": "nowhere"}, {"created_after": "1970-01-01T00:00:00.050Z"}):  # fmt: skip
                before = commands(client)
                await world.filing.gallery.list(asked(vision_pb2.ListGalleryRequest, limit=10, **fields))
                costs[-1].append(commands(client) - before)
    client.close()
    assert costs[0] == costs[1] and max(costs[0]) <= 6, costs


async def test_times_and_places_beyond_all_outputs_are_no_trouble(store: Store, tmp_path: Path) -> None:
    async with world_on(store, tmp_path, None) as world:
        await put_rows(store, [row_of("a.png", 5, "00", at_ms=77)])
        assert await shown(world, created_before="9999-12-31T23:59:59Z") == ["a.png"]
        assert await shown(world, created_after="9999-12-31T23:59:59Z") == []
        request = asked(vision_pb2.ListGalleryRequest)
        request.page_token = token_of(request, PageKey((1 << 53) - 1, "b.png"))
        assert len((await world.filing.gallery.list(request))[0]) == 1


async def test_two_of_one_moment_and_one_checksum_are_both_there(store: Store, tmp_path: Path) -> None:
    """Ids are made of time and a short checksum of the name: names that share it step aside."""
    seen: dict[int, str] = {}
    for number in range(1 << 16):
        name = f"{number:032x}.png"
        twin = seen.setdefault(zlib.crc32(name.encode()) & 0xFFFFF, name)
        if twin != name:
            break
    else:
        raise AssertionError("no two names share a checksum")
    async with world_on(store, tmp_path, None) as world:
        await put_rows(store, [row_of(one, 5, "00", at_ms=77) for one in (name, twin)])
        assert set(await shown(world)) == {name, twin}
        assert set(await shown(world, limit=1)) == {name, twin}
