"""Pages: newest first, stable while jobs come and move."""

from __future__ import annotations

from fleet_server.domain.job import JobState
from fleet_server.store import OutputRow, PageKey, Store
from tests.store.making import START_MS, ManualClock, claim, new_job, submit


async def pages(store: Store, limit: int, *states: JobState) -> list[list[str]]:
    found: list[list[str]] = []
    before: PageKey | None = None
    while True:
        records, before = await store.jobs.list(states=states, before=before, limit=limit)
        found.append([record.job_id for record in records])
        if before is None:
            return found


async def test_newest_first_over_all_states(store: Store, clock: ManualClock) -> None:
    ids = []
    for _ in range(9):
        ids.append(await submit(store))
        clock.tick(1)
    await store.jobs.cancel(ids[4])
    await claim(store)
    got = await pages(store, 4)
    assert [job_id for page in got for job_id in page] == ids[::-1]
    assert await pages(store, 100) == [ids[::-1]]
    assert await pages(store, 100, JobState.CANCELLED) == [[ids[4]]]
    assert await pages(store, 2, JobState.RUNNING, JobState.CANCELLED) == [[ids[4], ids[0]]]
    assert await pages(store, 5, JobState.FAILED) == [[]]


async def test_a_batch_of_one_millisecond_pages_without_loss(store: Store) -> None:
    """Ties in time are ordered by id, through any page size."""
    jobs = [new_job() for _ in range(130)]
    await store.jobs.submit(jobs)
    wanted = sorted((job.job_id for job in jobs), reverse=True)
    for limit in (7, 64, 130):
        assert [job_id for page in await pages(store, limit) for job_id in page] == wanted


async def test_pages_are_stable_under_inserts_and_moves(store: Store, clock: ManualClock) -> None:
    jobs = [new_job() for _ in range(30)]
    await store.jobs.submit(jobs)
    wanted = sorted((job.job_id for job in jobs), reverse=True)
    seen: list[str] = []
    before: PageKey | None = None
    while True:
        records, before = await store.jobs.list(before=before, limit=4)
        seen += [record.job_id for record in records]
        if before is None:
            break
        clock.tick(1)
        await store.jobs.submit([new_job(), new_job()])
        moved = before.member
        await store.jobs.cancel(moved)
    assert seen == wanted


async def test_a_page_begins_after_a_job_that_is_gone(store: Store, clock: ManualClock) -> None:
    ids = []
    for _ in range(4):
        ids.append(await submit(store))
        clock.tick(1)
    records, before = await store.jobs.list(limit=2)
    assert before is not None
    await store.jobs.cancel(before.member)
    clock.tick(10)
    await store.jobs.purge(keep_ms=1)
    rest, _ = await store.jobs.list(before=before, limit=10)
    assert [record.job_id for record in [*records, *rest]] == ids[::-1]


async def test_bounds_in_time_are_exclusive(store: Store, clock: ManualClock) -> None:
    ids = []
    for _ in range(5):
        ids.append(await submit(store))
        clock.tick(10)
    records, following = await store.jobs.list(created_after_ms=START_MS, created_before_ms=START_MS + 40, limit=2)
    assert [record.job_id for record in records] == [ids[3], ids[2]]
    rest, _ = await store.jobs.list(
        created_after_ms=START_MS, created_before_ms=START_MS + 40, limit=2, before=following
    )
    assert [record.job_id for record in rest] == [ids[1]]


async def test_outputs_page_newest_first(store: Store, clock: ManualClock) -> None:
    rows = [OutputRow(f"comfyui/{i}.png", f"job-{i % 2}", START_MS + i // 2, i, b"r%d" % i) for i in range(7)]
    for row in rows:
        await store.outputs.put(row)
    first, before = await store.outputs.list(limit=4)
    rest, end = await store.outputs.list(limit=4, before=before)
    assert [row.filename for row in [*first, *rest]] == [row.filename for row in rows[::-1]]
    assert end is None
    assert await store.outputs.by_job("job-1") == [rows[1], rows[3], rows[5]]


async def test_one_output(store: Store) -> None:
    row = OutputRow("a.png", "job", START_MS, 5, b"\x00record")
    assert await store.outputs.get("a.png") is None
    assert await store.outputs.update("a.png", b"x") is None
    await store.outputs.put(row)
    await store.outputs.put(row)
    assert await store.outputs.get("a.png") == row
    changed = await store.outputs.update("a.png", b"starred")
    assert changed == OutputRow("a.png", "job", START_MS, 5, b"starred")
    assert await store.outputs.delete("a.png") == changed
    assert await store.outputs.delete("a.png") is None
    assert await store.outputs.by_job("job") == []
    assert await store.outputs.list() == ([], None)
