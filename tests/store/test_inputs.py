"""Inputs stay as long as a job that has not ended names them, and then their time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fleet_server.store import Idempotency, InputRow, Store
from fleet_server.store.job_submit import MAX_ALONG
from tests.store.making import ERRORS, ManualClock, claim, error, new_job, submit

HOUR = 3_600_000


@pytest.fixture
def clock() -> ManualClock:
    """Set to the server's time: keys expire by that."""
    clock = ManualClock()
    clock.now = time.time_ns() // 1_000_000
    return clock


class Inputs:
    """Rows of inputs, each good for a minute, as the server has them."""

    def __init__(self, store: Store, raw: Any, namespace: str, clock: ManualClock) -> None:
        self._store, self._raw, self._namespace, self._clock = store, raw, namespace, clock

    async def put(self, *names: str) -> None:
        for name in names:
            row = InputRow(name, "a.png", "image/png", 5, "ff", "here", "", self._clock.now + 60_000)
            await self._store.inputs.put(row)

    def left(self, name: str) -> int:
        """Milliseconds until it forgets itself; -1: it does not."""
        found: int = self._raw.pttl(f"{{{self._namespace}}}:in:{name}")
        return found

    async def jobs(self, name: str) -> int:
        row = await self._store.inputs.get(name)
        assert row is not None
        assert (self.left(name) == -1) == (row.jobs > 0)
        return row.jobs


@pytest.fixture
def inputs(store: Store, raw: Any, namespace: str, clock: ManualClock) -> Inputs:
    return Inputs(store, raw, namespace, clock)


@pytest.mark.parametrize("how", ["complete", "fail", "cancel", "expire"])
async def test_an_input_stays_until_each_end_of_its_job(
    store: Store, clock: ManualClock, inputs: Inputs, how: str
) -> None:
    await inputs.put("a", "b", "c")
    job_id = await submit(store, inputs=("a", "b", "gone"), max_retries=1)
    assert [await inputs.jobs(name) for name in "abc"] == [1, 1, 0] and 0 < inputs.left("c") <= 60_000
    if how == "cancel":
        await store.jobs.cancel(job_id)
    elif how == "expire":
        clock.tick(86_400_001)
        await store.jobs.reap(ERRORS)
        clock.now = time.time_ns() // 1_000_000
    else:
        first = await claim(store)
        await store.jobs.started(job_id, first.token)
        await store.jobs.fail(job_id, first.token, error=error("BAD"), attempt=b"a", retryable=True)
        assert await inputs.jobs("a") == 1
        last = await claim(store)
        await store.jobs.started(job_id, last.token)
        if how == "complete":
            await store.jobs.complete(job_id, last.token, result=b"r")
        else:
            await store.jobs.fail(job_id, last.token, error=error("BAD"), attempt=b"a", retryable=True)
    # Kept for a retry.
    assert [await inputs.jobs(name) for name in "ab"] == [0, 0] and inputs.left("a") > HOUR - 60_000
    assert await store.inputs.get("gone") is None
    if how in {"fail", "expire"}:
        await store.jobs.retry(job_id)
        assert await inputs.jobs("b") == 1
        await store.jobs.cancel(job_id)
        assert await inputs.jobs("b") == 0


async def test_an_input_of_several_jobs_stays_until_the_last_ends(store: Store, inputs: Inputs) -> None:
    await inputs.put("a")
    key = Idempotency("", "CreateJob", "k", "f")
    job = new_job(inputs=("a",))
    for _ in range(2):
        await store.jobs.submit([job], idempotency=key)
    await store.jobs.submit([job])
    parent = await submit(store)
    waits = await submit(store, after=(parent,), inputs=("a",))
    group = new_job(child_job_ids=("g1", "g2"), inputs=("a",))
    children = [new_job(name, group_job_id=group.job_id, inputs=("a",)) for name in group.child_job_ids]
    await store.jobs.submit([group, *children])
    many = [new_job(inputs=("a",)) for _ in range(MAX_ALONG + 1)]
    await store.jobs.submit(many)
    assert await inputs.jobs("a") == 1 + 1 + 3 + len(many)
    # It is for its own keepers to change while it stays.
    await inputs.put("a")
    assert await inputs.jobs("a") == 5 + len(many)
    for one in many:
        await store.jobs.cancel(one.job_id)
    await store.jobs.cancel(parent)
    assert (await store.jobs.get(waits)).state == "cancelled"  # type: ignore[union-attr]
    await store.jobs.cancel("g1")
    assert await inputs.jobs("a") == 3
    await store.jobs.cancel(group.job_id)
    assert await inputs.jobs("a") == 1
    await store.jobs.cancel(job.job_id)
    assert await inputs.jobs("a") == 0


async def test_what_a_job_names_is_not_over(store: Store, clock: ManualClock, inputs: Inputs) -> None:
    await inputs.put("a", "b")
    job_id = await submit(store, inputs=("a",))
    later = clock.now + 2 * HOUR
    assert not await store.inputs.over("b", clock.now)
    assert [await store.inputs.over(name, later) for name in ("a", "b", "never")] == [False, True, True]
    assert await store.inputs.get("b") is None and not await store.inputs.moved("b", "inputs/b")
    assert await store.inputs.moved("a", "inputs/a")
    row = await store.inputs.get("a")
    assert row is not None and (row.key, row.jobs, inputs.left("a")) == ("inputs/a", 1, -1)
    await store.jobs.cancel(job_id)
    assert not await store.inputs.over("a", clock.now)
    assert await store.inputs.over("a", later) and await store.inputs.get("a") is None
