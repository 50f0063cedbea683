"""Sync, cleanup and move: truthful sums, nothing removed unproven, and whatever stops them, the next run goes on."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fleet.v1 import fleet_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.sweep_calls import SweepCalls
from fleet_server.services.sweep_tally import Tally
from fleet_server.storage.buckets import OUTPUTS
from fleet_server.store import Store
from tests.outputs.world import HERE, World, now_ms, put_rows, row_of, running, until_synced, world_on
from tests.s3.embedded import EmbeddedProcess
from tests.waiting import wait_until

HOUR_MS = 3_600_000


class Crash(Exception):  # noqa: N818 - no error of ours
    """Ends a sweep as the end of its process would."""


async def test_a_sync_copies_what_is_not_there_and_says_so(world: World) -> None:
    rows = [await world.add(engine=engine) for engine in ("sketch", "comfyui")]
    rows.append(await world.add(engine="comfyui", job_type=types_pb2.JOB_TYPE_VIDEO_GEN))
    sweep = await world.sweeps.sync()
    assert (sweep.operation, sweep.scanned, sweep.uploaded, sweep.skipped, sweep.failed) == ("sync", 3, 3, 0, 0)
    assert sweep.uploaded_bytes == sum(row.size_bytes for row in rows)
    assert set(sweep.filenames) == {row.filename for row in rows} and not sweep.failures
    assert sweep.end_time.ToMilliseconds() >= sweep.start_time.ToMilliseconds() > 0
    for row in rows:
        assert await world.object(row) == (world.folder / "outputs" / row.filename).read_bytes()
    prefixes = [row.object_key.rpartition("/")[0] for row in rows]
    assert prefixes == ["", "comfyui", "animatediff"]
    again = await world.sweeps.sync()
    assert (again.scanned, again.uploaded, again.skipped, again.failed) == (3, 0, 3, 0)
    assert world.told[-1].progress == 100 and all(one.operation == "sync" for one in world.told)
    stats = await world.sweeps.stats()
    size = sum(row.size_bytes for row in rows)
    assert (stats.local.files, stats.s3.files, stats.unsynced.files) == (3, 3, 0)
    assert (stats.local.size_bytes, stats.s3.size_bytes, stats.unsynced.size_bytes) == (size, size, 0)
    assert stats.last_sync == again and stats.disk_free_bytes > 0 and not stats.failures


async def test_a_synced_tree_of_ten_thousand_files_costs_no_request(world: World) -> None:
    """12 are allowed; the state of each file is in the index."""
    rows = [row_of(f"{n:032x}.png", 9, "00", at_ms=n) for n in range(10_000)]
    await put_rows(world.store, rows, synced=True)
    asked: list[Any] = []
    pool = world.s3._minio._http
    send = pool.urlopen

    def counted(*args: Any, **more: Any) -> Any:
        asked.append(args)
        return send(*args, **more)

    pool.urlopen = counted  # type: ignore[method-assign]
    sweep = await world.sweeps.sync()
    assert (sweep.scanned, sweep.skipped, sweep.uploaded, sweep.failed) == (10_000, 10_000, 0, 0)
    assert len(asked) <= 12, asked


async def test_cleanup_removes_old_files_that_the_bucket_has(world: World) -> None:
    old, young, unsynced = await world.add(age_ms=25 * HOUR_MS), await world.add(age_ms=23 * HOUR_MS), None
    await world.sweeps.sync()
    unsynced = await world.add(age_ms=26 * HOUR_MS)
    dry = await world.sweeps.cleanup(24, dry_run=True)
    assert (dry.dry_run, dry.scanned, dry.deleted, dry.skipped) == (True, 2, 1, 1)
    assert list(dry.filenames) == [old.filename] and world.on_disk(old)
    sweep = await world.sweeps.cleanup(24, dry_run=False)
    assert (sweep.scanned, sweep.deleted, sweep.skipped, sweep.failed) == (2, 1, 1, 0)
    assert (sweep.deleted_bytes, list(sweep.filenames)) == (old.size_bytes, [old.filename])
    assert not world.on_disk(old) and world.on_disk(young) and world.on_disk(unsynced)
    assert not (await world.row(old)).local and (await world.row(old)).synced
    assert (await world.sweeps.cleanup(24, dry_run=False)).deleted == 0


async def test_move_leaves_nothing_on_the_disk_that_the_bucket_has(world: World) -> None:
    rows = [await world.add() for _ in range(3)]
    (world.folder / "outputs" / rows[2].filename).write_bytes(b"spoiled!!")
    sweep = await world.sweeps.move()
    assert (sweep.operation, sweep.scanned, sweep.uploaded, sweep.deleted, sweep.failed) == ("move", 3, 2, 2, 1)
    assert [failure.filename for failure in sweep.failures] == [rows[2].filename]
    assert [world.on_disk(row) for row in rows] == [False, False, True]
    assert [await world.object(row) is not None for row in rows] == [True, True, False]


@pytest.mark.parametrize("harm", ["other bytes", "forged metadata", "missing", "shorter"])
async def test_a_copy_that_is_not_proven_keeps_the_local_file(world: World, harm: str) -> None:
    row = await world.add(b"the true picture", age_ms=HOUR_MS)
    await world.sweeps.sync()
    if harm == "missing":
        await world.s3.delete(OUTPUTS, row.object_key)
    else:
        spoiled = b"short" if harm == "shorter" else b"the fals picture"
        metadata = {"sha256": hashlib.sha256(b"the true picture").hexdigest()} if harm == "forged metadata" else {}
        await world.s3.put(OUTPUTS, row.object_key, spoiled, metadata=metadata)
    for sweep in (await world.sweeps.cleanup(0.01, dry_run=True), await world.sweeps.cleanup(0.01, dry_run=False)):
        assert (sweep.scanned, sweep.deleted, sweep.failed) == (1, 0, 1)
        assert sweep.failures[0].reason == "CHECKSUM_MISMATCH" and world.on_disk(row)
    # It is copied again, and then may go.
    assert (await world.sweeps.sync()).uploaded == 1
    assert await world.object(row) == b"the true picture"
    assert (await world.sweeps.cleanup(0.01, dry_run=False)).deleted == 1 and not world.on_disk(row)


async def test_a_spoiled_local_file_never_goes_over_a_good_copy(world: World) -> None:
    row = await world.add(b"good bytes")
    await world.sweeps.sync()
    path = world.folder / "outputs" / row.filename
    path.write_bytes(b"evil bytes")
    await world.store.syncs.unsynced_again(row.filename)
    sweep = await world.sweeps.sync()
    assert (sweep.uploaded, sweep.failed, sweep.failures[0].reason) == (0, 1, "CHECKSUM_MISMATCH")
    assert await world.object(row) == b"good bytes"
    # Where the copy is proven by reading it back, the spoiled file may go.
    await world.store.syncs.synced(row.filename, row.object_key)
    assert (await world.sweeps.move()).deleted == 1 and await world.object(row) == b"good bytes"


@pytest.mark.parametrize("step", ["synced", "cleaned", "delete"])
async def test_a_run_that_dies_at_any_step_is_made_good_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Just before a step, as at a crash; then a new process does the same again."""
    rows = [await world.add() for _ in range(3)]

    async def dies(*_: object) -> bool:
        raise Crash

    target = world.filing.local if step == "delete" else world.store.syncs
    with monkeypatch.context() as patch:
        patch.setattr(type(target), step, dies)
        with pytest.raises(ExceptionGroup) as caught:
            await _moved(world)
        assert caught.group_contains(Crash)
    for row in rows:
        assert world.on_disk(row) or await world.object(row) is not None
    sweep = await _moved(world)
    assert sweep.failed == 0
    for row in rows:
        now = await world.row(row)
        assert not world.on_disk(row) and now.synced and not now.local
        assert hashlib.sha256(await world.object(row) or b"").hexdigest()
    local, bucket, waiting = await world.store.syncs.counts(HERE)
    assert (local.files, bucket.files, waiting.files) == (0, 3, 0)


async def test_a_store_that_goes_away_is_said_and_loses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [await world.add() for _ in range(3)]

    async def away(*_: object) -> bool:
        raise FleetError("STORE_UNAVAILABLE", "it is away")

    with monkeypatch.context() as patch:
        patch.setattr(world.store.syncs, "synced", away)
        with pytest.raises(FleetError) as caught:
            await world.sweeps.move()
        assert caught.value.reason == "STORE_UNAVAILABLE"
    assert all(world.on_disk(row) for row in rows)
    assert (await world.sweeps.move()).deleted == 3


async def _moved(world: World) -> Any:
    """A move in a task of its own, whose death is not the test's."""
    tally = Tally("move", clock=now_ms)
    if await world.sweeper.sync(tally, last=False):
        await world.sweeper.clean(tally, None)
    return tally.end()


async def test_a_copy_that_the_server_does_not_vouch_for_does_not_count(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = await world.add()
    put = world.s3.put

    async def unproven(*args: Any, **more: Any) -> Any:
        return replace(await put(*args, **more), sha256_verified=False, detail="other bytes than were sent")

    with monkeypatch.context() as patch:
        patch.setattr(world.s3, "put", unproven)
        sweep = await world.sweeps.move()
    assert (sweep.uploaded, sweep.deleted, sweep.failed) == (0, 0, 1)
    assert (sweep.failures[0].reason, sweep.failures[0].detail) == ("CHECKSUM_MISMATCH", "other bytes than were sent")
    assert world.on_disk(row) and not (await world.row(row)).synced
    assert (await world.sweeps.move()).deleted == 1


async def test_files_without_a_disk_are_found_in_the_bucket_or_told(world: World) -> None:
    copied, lost = await world.add(b"copied"), await world.add(b"lost")
    await world.s3.put(OUTPUTS, copied.object_key, b"copied")
    for row in (copied, lost):
        (world.folder / "outputs" / row.filename).unlink()
    sweep = await world.sweeps.sync()
    assert (sweep.uploaded, sweep.failed) == (1, 1)
    assert (sweep.failures[0].filename, sweep.failures[0].reason) == (lost.filename, "OUTPUT_NOT_FOUND")
    assert (await world.row(copied)).synced and not (await world.row(copied)).local
    (failure,) = (await world.sweeps.stats()).failures
    assert (failure.filename, failure.attempts) == (lost.filename, 1)


async def test_with_s3_away_calls_say_so_and_nothing_changes(world: World, s3_server: EmbeddedProcess) -> None:
    row = await world.add()
    s3_server.stop()
    await wait_until(lambda: not world.s3.status[0])
    for call in (world.sweeps.sync(), world.sweeps.move(), world.sweeps.cleanup(1, dry_run=False)):
        with pytest.raises(FleetError) as caught:
            await call
        assert caught.value.reason == "S3_UNAVAILABLE"
    assert world.on_disk(row) and (await world.sweeps.stats()).unsynced.files == 1


async def test_s3_that_goes_away_in_the_middle_ends_the_sync_early(
    world: World, s3_server: EmbeddedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are copied, a few failed with the reason; the rest is not tried, and all of it is when S3 is back."""
    rows = [await world.add() for _ in range(40)]
    put, count = world.s3.put, 0

    async def put_until(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6:
            s3_server.stop()
        return await put(*args, **more)

    monkeypatch.setattr(world.s3, "put", put_until)
    sweep = await world.sweeps.sync()
    assert sweep.uploaded >= 2 and 4 <= sweep.failed < 20
    assert {failure.reason for failure in sweep.failures} == {"S3_UNAVAILABLE"}
    stats = await world.sweeps.stats()
    assert stats.failures[0].reason == "S3_UNAVAILABLE" and stats.unsynced.files == 40 - sweep.uploaded

    async def all_there() -> bool:
        return (await world.sweeps.stats()).s3.files == len(rows)

    world.s3.on_back(world.sweeps.wake)
    # Back it is only once it was seen away.
    await wait_until(lambda: not world.s3.status[0])
    async with running(world.sweeps.run):
        s3_server.start()
        await wait_until(all_there)
    assert not (await world.sweeps.stats()).failures


async def test_a_second_call_joins_the_running_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        await world.add()
    gate, put = asyncio.Event(), world.s3.put

    async def held(*args: Any, **more: Any) -> Any:
        await gate.wait()
        return await put(*args, **more)

    monkeypatch.setattr(world.s3, "put", held)
    first = asyncio.create_task(world.sweeps.sync())
    leaver = asyncio.create_task(world.sweeps.sync())
    other = asyncio.create_task(world.sweeps.cleanup(24, dry_run=True))
    await asyncio.sleep(0)
    leaver.cancel()
    second = asyncio.create_task(world.sweeps.sync())
    await asyncio.sleep(0)
    gate.set()
    assert (await first) is (await second) and (await first).uploaded == 3
    assert (await other).scanned == 0 and leaver.cancelled()


async def test_a_repeated_request_is_answered_alike(world: World) -> None:
    calls = SweepCalls(world.sweeps, world.store.replies)
    await world.add()
    first = await calls.sync(fleet_pb2.SyncOutputsRequest(), owner="", key="k")
    await world.add()
    assert await calls.sync(fleet_pb2.SyncOutputsRequest(), owner="", key="k") == first
    assert (await calls.sync(fleet_pb2.SyncOutputsRequest(), owner="", key="l")).uploaded == 1
    request = fleet_pb2.CleanupOutputsRequest(max_age_hours=1)
    await calls.cleanup(request, owner="", key="c")
    request.dry_run = True
    with pytest.raises(FleetError) as caught:
        await calls.cleanup(request, owner="", key="c")
    assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"


async def test_an_output_deleted_while_it_is_copied_leaves_no_object(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = await world.add()
    put = world.s3.put

    async def deleted_meanwhile(*args: Any, **more: Any) -> Any:
        stored = await put(*args, **more)
        await world.filing.gallery.delete(row.filename)
        await put(OUTPUTS, row.object_key, b"late")
        return stored

    monkeypatch.setattr(world.s3, "put", deleted_meanwhile)
    await world.sweeps.sync()
    (leaving,) = await world.store.syncs.leaving()
    assert (leaving.filename, leaving.places) == (row.filename, "S")

    async def gone() -> bool:
        return not await world.store.syncs.leaving()

    async with running(world.filing.run):
        await wait_until(gone)
    assert await world.object(row) is None


async def test_timed_and_eager_syncs(store: Store, tmp_path: Path, s3_server: EmbeddedProcess) -> None:
    async with world_on(store, tmp_path, s3_server, interval_seconds=0.05, max_age_hours=1) as world:
        row, old = await world.add(), await world.add(age_ms=2 * HOUR_MS)
        async with running(world.sweeps.run):
            await until_synced(world, row)
            await wait_until(lambda: not world.on_disk(old))
        assert world.on_disk(row)
    async with world_on(store, tmp_path, s3_server, eager=True) as world, running(world.sweeps.run):
        row = await world.add()
        world.sweeps.stored()
        await until_synced(world, row)


async def test_off_is_off(store: Store, tmp_path: Path) -> None:
    async with world_on(store, tmp_path, None, interval_seconds=0.01) as world:
        row = await world.add()
        await world.sweeps.run()
        assert world.on_disk(row) and (await world.sweeps.stats()).unsynced.files == 1
