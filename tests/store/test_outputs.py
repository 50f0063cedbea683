"""The index of outputs: where files are, what waits to be copied, what a deletion leaves to do."""

from __future__ import annotations

import random
import time
from typing import Any

from fleet_server.store import InputRow, OutputCounts, OutputRow, Store
from tests.store.making import START_MS

HOMES = ("here", "there")


def row(number: int, home: str = "here", **more: Any) -> OutputRow:
    return OutputRow(f"{number:04}.png", "job", START_MS + number // 3, 100 + number, b"r", home=home, **more)


async def check(store: Store, rows: dict[str, OutputRow]) -> None:
    """The book of copies says what the rows say."""
    for name in rows:
        assert await store.outputs.get(name) == rows[name]
    for home in HOMES:
        mine = [one for one in rows.values() if one.home == home]
        local = [one for one in mine if one.local]
        found, _ = await store.syncs.local(home)
        assert found == [one.filename for one in sorted(local, key=lambda one: (one.created_ms, one.filename))]
        waiting, _ = await store.syncs.unsynced(home)
        assert set(waiting) == {one.filename for one in mine if not one.synced}
        synced = [one for one in rows.values() if one.synced]
        unsynced = [one for one in rows.values() if not one.synced]
        assert await store.syncs.counts(home) == (counts(local), counts(synced), counts(unsynced))


def counts(rows: list[OutputRow]) -> OutputCounts:
    return OutputCounts(len(rows), sum(one.size_bytes for one in rows))


async def test_counts_and_lists_follow_every_change(store: Store) -> None:
    """Many random steps, each also said twice; after each the book is compared with a model of it."""
    draw = random.Random(5)
    rows: dict[str, OutputRow] = {}
    for number in range(12):
        one = row(number, HOMES[number % 2])
        rows[one.filename] = one
        await store.outputs.put(one)
    for _ in range(150):
        name = draw.choice(list(rows)) if rows else ""
        old = rows[name]
        what = draw.choice(("synced", "spoiled", "cleaned", "starred", "failed", "put", "put", "delete"))
        for _again in range(2):
            if what == "synced":
                assert await store.syncs.synced(name, f"k/{name}")
                rows[name] = changed(rows[name], synced=True, key=old.key if old.synced else f"k/{name}")
            elif what == "spoiled":
                done = await store.syncs.unsynced_again(name)
                assert done == (rows[name].synced and rows[name].local)
                rows[name] = changed(rows[name], synced=rows[name].synced and not done)
            elif what == "cleaned":
                assert await store.syncs.cleaned(name) == old.synced
                rows[name] = changed(rows[name], local=old.local and not old.synced)
            elif what == "starred":
                assert await store.outputs.star(name, not old.starred)
                rows[name] = changed(old, starred=not old.starred)
            elif what == "failed":
                assert bool(await store.syncs.failed(name, "S3_UNAVAILABLE", "gone")) == (not old.synced)
            elif what == "put":
                await store.outputs.put(old)
            elif len(rows) > 3:
                was = await store.outputs.delete(name)
                assert was == rows.pop(name, None)
        await check(store, rows)
    failing = {one.filename for one in await store.syncs.failures()}
    assert failing <= {name for name, one in rows.items() if not one.synced}


def changed(one: OutputRow, **fields: Any) -> OutputRow:
    return OutputRow(**{**{name: getattr(one, name) for name in OutputRow.__slots__}, **fields})


async def test_changes_are_told_in_order_and_once(store: Store) -> None:
    for number in range(5):
        await store.outputs.put(row(number))
    first = await store.outputs.changes(0, 3, epoch="e1")
    assert (first.epoch, first.newest, [name for name, _, _ in first.rows]) == (
        "e1", 5, ["0000.png", "0001.png", "0002.png"]
    )  # fmt: skip
    await store.outputs.delete("0001.png")
    await store.syncs.synced("0003.png", "0003.png")
    rest = await store.outputs.changes(first.rows[-1][1], 10, epoch="e2")
    assert rest.epoch == "e1"
    assert [(name, one is not None) for name, _, one in rest.rows] == [
        ("0004.png", True), ("0001.png", False), ("0003.png", True)
    ]  # fmt: skip
    assert (await store.outputs.changes(rest.newest, 10, epoch="e1")).rows == ()


async def test_a_deletion_remembers_what_is_left_to_remove(store: Store) -> None:
    for number in range(3):
        await store.outputs.put(row(number))
    await store.syncs.synced("0000.png", "comfyui/0000.png")
    await store.outputs.delete("0000.png")
    await store.outputs.delete("0001.png")
    await store.outputs.delete("0002.png", in_bucket=True)
    found = {one.filename: (one.places, one.home, one.key) for one in await store.syncs.leaving()}
    assert found == {
        "0000.png": ("LST", "here", "comfyui/0000.png"),
        "0001.png": ("LT", "here", ""),
        "0002.png": ("LST", "here", ""),
    }
    assert await store.syncs.gone("0000.png", "LT") == "S"
    assert await store.syncs.gone("0000.png", "S") == ""
    assert await store.syncs.gone("0000.png", "S") == ""
    assert await store.syncs.leaving_of("0000.png") is None
    # An upload that was under way ends after the deletion: its object must go.
    assert not await store.syncs.synced("0001.png", "0001.png")
    assert not await store.syncs.synced("0000.png", "x/0000.png")
    one, other = await store.syncs.leaving_of("0001.png"), await store.syncs.leaving_of("0000.png")
    assert one is not None and (one.places, one.home, one.key) == ("LTS", "here", "0001.png")
    assert other is not None and (other.places, other.key) == ("S", "x/0000.png")


async def test_files_of_a_server_are_paged_oldest_first(store: Store) -> None:
    for number in range(10):
        await store.outputs.put(row(number))
    found: list[str] = []
    after = None
    while True:
        names, after = await store.syncs.local("here", after=after, limit=2, before_ms=START_MS + 3)
        found += names
        if after is None:
            break
    assert found == [f"{number:04}.png" for number in range(9)]


async def test_rows_of_an_older_version_are_taken_in(store: Store, raw: Any, namespace: str) -> None:
    key = f"{{{namespace}}}:o:old.png"
    raw.hset(key, mapping={"j": "", "c": START_MS, "s": 9, "r": b"r"})
    raw.zadd(f"{{{namespace}}}:outs", {"old.png": START_MS})
    assert await store.syncs.adopt("here", ["old.png", "never.png"]) == 1
    assert await store.syncs.adopt("there", ["old.png"]) == 0
    await check(store, {"old.png": OutputRow("old.png", "", START_MS, 9, b"r", home="here")})


async def test_an_input_is_forgotten_in_time(store: Store, raw: Any, namespace: str) -> None:

    one = InputRow("a", "talk.wav", "audio/wav", 5, "ff", "here", "", time.time_ns() // 1_000_000 + 60_000)
    await store.inputs.put(one)
    assert await store.inputs.get("a") == one
    assert await store.inputs.get("b") is None
    assert 0 < raw.pttl(f"{{{namespace}}}:in:a") <= 60_000
