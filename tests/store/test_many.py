"""Many claims, starts and ends in few steps of the store; each stands alone, and all may be said again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fleet_server.domain.job import JobState, Priority
from fleet_server.store import OutputRow, Report, Store
from tests.store.conftest import Server
from tests.store.making import LANE, ManualClock, claim, running, submit, token, wish


async def test_claims_of_one_node_come_in_order(store: Store, clock: ManualClock) -> None:
    ids = []
    for _ in range(40):
        ids.append(await submit(store))
        clock.tick(1)
    requests = [wish() for _ in range(45)]
    claims = await store.jobs.claim(requests)
    assert [claimed and claimed.job.job_id for claimed in claims] == [*ids, *[None] * 5]
    assert [claimed.token for claimed in claims if claimed] == [request.token for request in requests[:40]]
    assert await store.jobs.claim(requests) == claims
    assert len(await store.jobs.held_by("agx0")) == 40


async def test_claims_of_many_nodes_and_lanes_do_not_mix(store: Store) -> None:
    other = replace(LANE, lane_id="lane-b")
    first, second = await submit(store), await submit(store, lane=other)
    chosen = await submit(store)
    claims = await store.jobs.claim(
        [wish("n1"), wish("n2", lane=other), wish("n1", job_id=chosen), wish("n1", job_id=chosen), wish("n2")]
    )
    assert [claimed and (claimed.job.node_id, claimed.job.job_id) for claimed in claims] == [
        ("n1", first),
        ("n2", second),
        ("n1", chosen),
        None,
        None,
    ]


async def test_a_claim_under_way_again_takes_only_what_is_missing(store: Store) -> None:
    for _ in range(3):
        await submit(store)
    kept, fresh = token(), token()
    (first,) = await store.jobs.claim([wish(attempt=kept)])
    again = await store.jobs.claim([wish(attempt=kept), wish(attempt=fresh)])
    assert again[0] == first
    assert again[1] is not None and again[1].token == fresh
    assert (await store.jobs.counts())[JobState.RUNNING] == 2


async def test_the_every_second_rule_holds_within_a_step(store: Store, clock: ManualClock) -> None:
    normals = [await submit(store) for _ in range(4)]
    clock.tick(700_000)
    highs = [await submit(store, priority=Priority.HIGH) for _ in range(4)]
    claims = await store.jobs.claim([wish() for _ in range(3)])
    (last,) = await store.jobs.claim([wish()])
    order = [claimed.job.job_id for claimed in (*claims, last) if claimed]
    assert [job_id in highs for job_id in order] == [True, False, True, False]
    assert set(order) <= {*normals, *highs}


async def test_starts_in_one_step(store: Store) -> None:
    for _ in range(20):
        await submit(store)
    claims = [claimed for claimed in await store.jobs.claim([wish() for _ in range(20)]) if claimed]
    pairs = [(claimed.job.job_id, claimed.token) for claimed in claims]
    pairs[3] = (pairs[3][0], token())
    pairs[7] = ("unknown", token())
    records = await store.jobs.started_many(pairs)
    assert [number for number, record in enumerate(records) if record is None] == [3, 7]
    assert all(record.started_ms is not None for record in records if record)
    assert await store.jobs.started_many(pairs) == records
    assert await store.jobs.started_many([]) == []


async def test_ends_in_one_step(store: Store, clock: ManualClock) -> None:
    reports = []
    for number in range(20):
        claimed = await running(store)
        job_id = claimed.job.job_id
        rows = [OutputRow(f"{number}-{n}.png", job_id, clock.now, 7, b"row") for n in range(number % 3)]
        reports.append(Report(job_id, claimed.token, b"r%d" % number, rows, load_ms=number, upload_ms=2))
    strange = replace(reports[4], token=token(), outputs=[])
    gone = Report("unknown", token(), b"")
    done = await store.jobs.complete_many([*reports[:4], strange, gone, *reports[4:]])
    assert [one.outcome.value for one in done] == ["ok"] * 4 + ["refused"] * 2 + ["ok"] * 16
    assert done[4].record is not None and done[5].record is None
    for number, report in enumerate(reports):
        record = await store.jobs.get(report.job_id)
        assert record is not None
        assert (record.state, record.result) == (JobState.SUCCEEDED, b"r%d" % number)
        assert (record.load_ms, record.run_ms, record.upload_ms) == (number, None, 2)
        assert await store.outputs.by_job(report.job_id) == list(report.outputs)
    again = await store.jobs.complete_many(reports)
    assert {one.outcome.value for one in again} == {"already"}
    assert await store.jobs.complete_many([]) == []


async def test_large_results_are_parted(store: Store) -> None:
    reports = []
    for _ in range(5):
        claimed = await running(store)
        reports.append(Report(claimed.job.job_id, claimed.token, b"x" * 100_000))
    assert {one.outcome.value for one in await store.jobs.complete_many(reports)} == {"ok"}


def scripts_run(raw: Any) -> int:
    """EVALSHA calls that the server has seen."""
    calls: int = raw.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]
    return calls


async def test_a_node_with_many_slots_takes_few_steps(store: Store, server: Server, raw: Any) -> None:
    ids = [await submit(store) for _ in range(16)]
    before = scripts_run(raw)
    claims = [claimed for claimed in await store.jobs.claim([wish() for _ in range(16)]) if claimed]
    await store.jobs.started_many([(claimed.job.job_id, claimed.token) for claimed in claims])
    await store.jobs.complete_many([Report(claimed.job.job_id, claimed.token, b"") for claimed in claims])
    assert scripts_run(raw) - before == 3
    assert {claimed.job.job_id for claimed in claims} == set(ids)
    assert await store.jobs.claim([wish()]) == [None]
    await submit(store)
    await claim(store)


async def test_claims_and_lanes_in_one_go(store: Store) -> None:
    ids = [await submit(store) for _ in range(3)]
    claims, lanes = await store.jobs.claim_and_look([wish(), wish()])
    assert [claimed and claimed.job.job_id for claimed in claims] == ids[:2]
    assert [(view.waiting, view.running) for view in lanes] == [(1, 2)]
    assert (await store.jobs.claim_and_look([]))[0] == []
