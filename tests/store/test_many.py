"""Many claims, starts and ends in few steps of the store; each stands alone, and all may be said again."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import replace
from random import Random
from typing import Any

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobState, Priority
from fleet_server.store import Idempotency, OutputRow, Report, Store, Submitted, open_store
from tests.store.audit import audit, clear
from tests.store.conftest import Server
from tests.store.making import LANE, ManualClock, claim, new_job, running, submit, token, wish


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


async def test_a_step_of_many_claims_gives_what_one_by_one_would(
    store: Store, server: Server, clock: ManualClock
) -> None:
    """Lines of one owner, lines of several, priorities, dependants, avoided jobs: the same jobs in the same order."""
    draw = Random(11)
    async with open_store(server.url, namespace="twin", clock=clock) as twin:
        for _ in range(25):
            for _ in range(draw.randrange(12)):
                owner = draw.choice(["", "", "", "ann"])
                priority = draw.choice([Priority.NORMAL] * 8 + [Priority.HIGH, Priority.LOW])
                after = await _any_job(store) if draw.random() < 0.1 else ()
                job = new_job(owner=owner, priority=priority, after=after)
                await store.jobs.submit([job])
                await twin.jobs.submit([job])
                clock.tick(draw.randrange(3))
            requests = [replace(wish("n1"), avoid=draw.random() < 0.2)] * draw.randrange(1, 7)
            requests = [replace(request, token=token()) for request in requests]
            together = await store.jobs.claim(requests)
            single = [(await twin.jobs.claim([request]))[0] for request in requests]
            assert together == single
            for claimed in filter(None, together):
                for one in (store, twin):
                    if draw_of(claimed.token) < 3:
                        await one.jobs.fail(
                            claimed.job.job_id, claimed.token, error=b"broken", attempt=b"", retryable=True
                        )
                    elif draw_of(claimed.token) < 12:
                        await one.jobs.complete(claimed.job.job_id, claimed.token, result=b"")
        assert await store.jobs.counts() == await twin.jobs.counts()
        assert await store.jobs.lanes() == await twin.jobs.lanes()
    with closing(server.client()) as client:
        audit(client, "twin")
        clear(client, "twin")


def draw_of(attempt: str) -> int:
    """0 to 15, by the token."""
    return int(attempt[0], 16)


async def _any_job(store: Store) -> tuple[str, ...]:
    records, _ = await store.jobs.list(limit=1)
    return tuple(record.job_id for record in records if record.state is not JobState.CANCELLED)


async def test_submits_that_come_together_stand_alone(store: Store, raw: Any) -> None:
    taken = await submit(store, spec=b"first")
    key = Idempotency("a", "m", "k", "print")
    before = scripts_run(raw)
    calls = [store.jobs.submit([new_job(owner=f"o{n % 3}", priority=list(Priority)[n % 3])]) for n in range(20)]
    keyed = [store.jobs.submit([new_job()], idempotency=key) for _ in range(2)]
    wrong = [
        store.jobs.submit([new_job()], idempotency=replace(key, fingerprint="other")),
        store.jobs.submit([new_job(taken, spec=b"second")]),
        store.jobs.submit([new_job(after=("nobody",))]),
    ]
    done = await asyncio.gather(*calls, *keyed, *wrong, return_exceptions=True)
    assert scripts_run(raw) - before <= 4
    accepted = [one for one in done if isinstance(one, Submitted)]
    assert len(accepted) == 22
    assert all(one.positions[0] in range(1, 23) for one in accepted)
    assert [one.replayed for one in accepted] == [False] * 21 + [True]
    assert accepted[21].job_ids == accepted[20].job_ids
    assert [one.reason for one in done if isinstance(one, FleetError)] == [
        "IDEMPOTENCY_KEY_REUSED",
        "INVALID_FIELD",
        "JOB_NOT_FOUND",
    ]
    assert (await store.jobs.counts())[JobState.QUEUED] == 22


async def test_a_full_queue_refuses_those_beyond_its_limit(store: Store) -> None:
    done = await asyncio.gather(*(store.jobs.submit([new_job()], limit=3) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(one, Submitted) for one in done) == 3
    assert (await store.jobs.counts())[JobState.QUEUED] == 3


async def test_a_run_that_was_over_before_its_start_was_told(store: Store, clock: ManualClock) -> None:
    job_id = await submit(store)
    clock.tick(1_000)
    claimed = await claim(store)
    clock.tick(50)
    done = await store.jobs.complete(job_id, claimed.token, result=b"", load_ms=10, run_ms=30)
    record = await store.jobs.get(job_id)
    assert record is not None and done.record is not None
    assert record.started_ms == done.record.started_ms == clock.now - 40
    assert record.result == b""
    events, _ = await store.events.read("0")
    assert [event.job.state for event in events] == [JobState.QUEUED, JobState.SUCCEEDED]
    assert await store.jobs.started(job_id, claimed.token) is None


async def test_the_group_of_such_a_run_has_begun(store: Store) -> None:
    children = [new_job(group_job_id="g") for _ in range(2)]
    group = new_job("g", child_job_ids=tuple(child.job_id for child in children))
    await store.jobs.submit([group, *children])
    first = await claim(store)
    await store.jobs.complete(first.job.job_id, first.token, result=b"")
    begun = await store.jobs.get("g")
    assert begun is not None and begun.state is JobState.RUNNING and begun.started_ms is not None
    second = await claim(store)
    await store.jobs.complete(second.job.job_id, second.token, result=b"")
    ended = await store.jobs.get("g")
    assert ended is not None and ended.state is JobState.SUCCEEDED
