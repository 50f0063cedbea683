"""Each guard of the scripts is taken out once, and the story that needs it must end badly."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobState, Priority
from fleet_server.store import Held, Idempotency, Store
from fleet_server.store.job_submit import MAX_ALONG
from tests.store.conftest import Server
from tests.store.guarding import Guard, play, scripts_without
from tests.store.making import ERRORS, LEASE_MS, ManualClock, claim, drain, new_job, running, submit, token, wish
from tests.store.wider_guards import WIDER_GUARDS


async def state(store: Store, job_id: str) -> JobState:
    record = await store.jobs.get(job_id)
    assert record is not None
    return record.state


async def tokens_are_compared(store: Store, clock: ManualClock) -> None:
    claimed = await running(store)
    job_id = claimed.job.job_id
    assert (await store.jobs.complete(job_id, token(), result=b"x")).outcome == "refused"
    failed = await store.jobs.fail(job_id, token(), error=b"e", attempt=b"", retryable=False)
    assert failed.outcome == "refused"
    assert not await store.jobs.release(job_id, token())
    assert await store.jobs.renew([Held(job_id, "other")], LEASE_MS) == ["other"]
    await submit(store)
    fresh = await claim(store)
    assert await store.jobs.started(fresh.job.job_id, token()) is None
    record = await store.jobs.get(fresh.job.job_id)
    assert record is not None
    assert record.started_ms is None


async def ends_are_for_ever(store: Store, clock: ManualClock) -> None:
    claimed = await running(store)
    job_id = claimed.job.job_id
    await store.jobs.cancel(job_id)
    await store.jobs.cancel(job_id)
    assert (await store.jobs.complete(job_id, claimed.token, result=b"x")).outcome == "refused"
    other = await running(store)
    await store.jobs.complete(other.job.job_id, other.token, result=b"x")
    for refused, reason in ((store.jobs.cancel, "JOB_ENDED"), (store.jobs.retry, "JOB_NOT_FAILED")):
        with pytest.raises(FleetError) as caught:
            await refused(other.job.job_id)
        assert caught.value.reason == reason
    assert (await store.jobs.complete(other.job.job_id, other.token, result=b"y")).outcome == "already"
    record = await store.jobs.get(other.job.job_id)
    assert record is not None
    assert record.result == b"x"
    events, _ = await store.events.read("0")
    assert [event.type for event in events].count("job_complete") == 2


async def a_late_complete_loses_to_a_new_claim(store: Store, clock: ManualClock) -> None:
    claimed = await running(store)
    clock.tick(LEASE_MS)
    await store.jobs.reap(ERRORS)
    await claim(store, "agx1")
    late = await store.jobs.complete(claimed.job.job_id, claimed.token, result=b"old")
    assert late.outcome == "refused"
    await store.jobs.cancel(claimed.job.job_id)
    lost = await running(store)
    clock.tick(LEASE_MS)
    await store.jobs.reap(ERRORS)
    assert (await store.jobs.complete(lost.job.job_id, lost.token, result=b"late")).outcome == "ok"


async def repeats_change_nothing(store: Store, clock: ManualClock) -> None:
    key = Idempotency("a", "m", "k", "print")
    job = new_job()
    await store.jobs.submit([job], idempotency=key)
    await store.jobs.submit([job])
    again = await store.jobs.submit([new_job()], idempotency=key)
    assert again.job_ids == (job.job_id,)
    with pytest.raises(FleetError):
        await store.jobs.submit([new_job()], idempotency=Idempotency("a", "m", "k", "other"))
    assert (await store.jobs.counts())[JobState.QUEUED] == 1
    attempt = token()
    await store.jobs.claim([wish(attempt=attempt)])
    await submit(store)
    (same,) = await store.jobs.claim([wish(attempt=attempt)])
    assert same is not None
    assert same.job.job_id == job.job_id
    first = await store.jobs.started(job.job_id, attempt)
    clock.tick(5)
    assert await store.jobs.started(job.job_id, attempt) == first
    for outcome in ("ok", "already"):
        failed = await store.jobs.fail(job.job_id, attempt, error=b"e", attempt=b"a", retryable=True)
        assert failed.outcome == outcome
    record = await store.jobs.get(job.job_id)
    assert record is not None
    assert len(record.attempts) == 1


async def ids_and_limits_hold(store: Store, clock: ManualClock) -> None:
    job_id = await submit(store, spec=b"one")
    staged = [new_job() for _ in range(MAX_ALONG)]
    for others in ([], [new_job()], staged):
        jobs = [*others, new_job(job_id, spec=b"two")]
        with pytest.raises(FleetError):
            await store.jobs.submit(jobs)
    for jobs in ([new_job()], [new_job(), new_job()]):
        with pytest.raises(FleetError):
            await store.jobs.submit(jobs, limit=1)
    assert (await store.jobs.counts())[JobState.QUEUED] == 1
    pair = [new_job(), new_job()]
    await store.jobs.submit(pair)
    with pytest.raises(FleetError):
        await store.jobs.submit([replace(job, spec=b"two") for job in pair])


async def losses_are_judged(store: Store, clock: ManualClock) -> None:
    job_id = await submit(store)
    for _ in range(3):
        await claim(store, "n1")
        clock.tick(LEASE_MS)
        await store.jobs.reap(ERRORS)
    await lose_in_turn(store, clock, job_id, (("n2", "queued"), ("n1", "queued"), ("n1", "failed")))
    other = await submit(store)
    await lose_in_turn(store, clock, other, (("n1", "queued"), ("n1", "queued"), ("n1", "queued"), ("n2", "failed")))


async def lose_in_turn(store: Store, clock: ManualClock, job_id: str, nodes: tuple[tuple[str, str], ...]) -> None:
    for node_id, expected in nodes:
        claimed = await claim(store, node_id)
        await store.jobs.started(job_id, claimed.token)
        clock.tick(LEASE_MS)
        await store.jobs.reap(ERRORS)
        assert await state(store, job_id) == expected


async def old_sessions_claim_nothing(store: Store, clock: ManualClock) -> None:
    await store.nodes.connect("agx0", session="s1", instance_id="i", info=b"", replica="r")
    await submit(store)
    await claim(store, session="s1")
    await store.nodes.connect("agx0", session="s2", instance_id="i", info=b"", replica="r")
    await submit(store)
    assert await store.jobs.claim([wish(session="s1")]) == [None]
    fresh = await claim(store, session="s2")
    assert not await store.nodes.disconnect("agx0", "s1")
    await store.jobs.lose_session("agx0", "s1", error=b"e")
    assert set(await store.jobs.held_by("agx0")) == {fresh.token}


async def the_line_is_fair(store: Store, clock: ManualClock) -> None:
    normals = [await submit(store) for _ in range(2)]
    clock.tick(700_000)
    high = await submit(store, priority=Priority.HIGH)
    assert (await claim(store)).job.job_id == high
    await submit(store, priority=Priority.HIGH)
    assert (await claim(store)).job.job_id == normals[0]
    await drain(store)
    backlog = {await submit(store, owner="b") for _ in range(6)}
    taken = []
    for _ in range(6):
        await submit(store, owner="a")
        taken.append((await claim(store)).job.job_id in backlog)
    assert 2 <= sum(taken) <= 4


GUARDS = [
    *WIDER_GUARDS,
    Guard(
        "complete",
        "local current = j.st == 'running' and j.tk == token",
        "local current = j.st == 'running'",
        tokens_are_compared,
    ),
    Guard("fail", "if j.st ~= 'running' or j.tk ~= token then", "if j.st ~= 'running' then", tokens_are_compared),
    Guard("release", "if j.st ~= 'running' or j.tk ~= token then", "if j.st ~= 'running' then", tokens_are_compared),
    Guard("renew", "known[1] == 'running' and known[2] == token", "known[1] == 'running'", tokens_are_compared),
    Guard("started", "and j.tk == ARGV[i + 1]", "", tokens_are_compared),
    Guard("cancel", "if j.st == 'cancelled' then", "if false then", ends_are_for_ever),
    Guard("cancel", "if j.st == 'succeeded' or j.st == 'failed' then", "if false then", ends_are_for_ever),
    Guard("complete", "if j.st == 'succeeded' and j.lt == token then", "if false then", ends_are_for_ever),
    Guard("complete", "if not current and not late then", "if false then", ends_are_for_ever),
    Guard("retry", "if j.st ~= 'failed' then", "if false then", ends_are_for_ever),
    Guard(
        "complete",
        "local late = j.st == 'queued' and j.lt == token",
        "local late = false",
        a_late_complete_loses_to_a_new_claim,
    ),
    Guard(
        "complete",
        "local late = j.st == 'queued' and j.lt == token",
        "local late = true",
        a_late_complete_loses_to_a_new_claim,
    ),
    Guard("submit", "if known then", "if false then", repeats_change_nothing),
    Guard(
        "lib/submitted",
        "if string.sub(stored, 1, cut - 1) ~= fingerprint then",
        "if false then",
        repeats_change_nothing,
    ),
    Guard("lib/submitted", "if not stored then", "if true then", repeats_change_nothing),
    Guard("claim", "if mine then", "if false then", repeats_change_nothing),
    Guard("started", "if mine and not j.sa then", "if mine then", repeats_change_nothing),
    Guard("fail", "if j.ft == token then", "if false then", repeats_change_nothing),
    Guard("submit", "if redis.call('GET', KEYS[3 * n - 1]) ~= spec then", "if false then", ids_and_limits_hold),
    Guard("commit", "if there and there ~= specs[2 * n] then", "if false then", ids_and_limits_hold),
    Guard(
        "stage",
        "if redis.call('EXISTS', K.job .. id) == 1 or staged and staged ~= spec then",
        "if false then",
        ids_and_limits_hold,
    ),
    Guard("submit", "if queued >= limit then", "if false then", ids_and_limits_hold),
    Guard("commit", "if queued + size > tonumber(ARGV[3]) then", "if false then", ids_and_limits_hold),
    Guard("lib/attempts", "if not j.cn then", "if false then", losses_are_judged),
    Guard("lib/attempts", "and (several or single) or", "or", losses_are_judged),
    Guard("lib/attempts", "if set.lo >= POISON_LOSSES", "if false", losses_are_judged),
    Guard("claim", " or known[1] and known[1] ~= session", "", old_sessions_claim_nothing),
    Guard("lose_session", "(j.se == session or j.se ~= current)", "true", old_sessions_claim_nothing),
    Guard("node_update", "n.session ~= session", "false", old_sessions_claim_nothing),
    Guard("claim", "local forced = high and not urgent", "local forced = high", the_line_is_fair),
    Guard("claim", "local forced = high and not urgent", "local forced = false", the_line_is_fair),
    Guard("lib/owners", "at = math.max(at, tonumber(rested))", "at = at", the_line_is_fair),
    Guard("lib/ends", "    left[j.ln] = (left[j.ln] or 0) + 1\n", "", ends_are_for_ever),
    Guard("lib/jobs", "    unlist(K.leases, id)\n", "", ends_are_for_ever),
    Guard("lib/lanes", "  unlist(K.waiting .. j.cl, id)\n", "", the_line_is_fair),
]


STORIES = {guard.story.__name__: guard.story for guard in GUARDS}


@pytest.mark.parametrize("story", sorted(STORIES))
async def test_with_all_guards_the_story_ends_well(quick_server: Server, namespace: str, story: str) -> None:
    await play(quick_server, namespace, STORIES[story], scripts_without(None))


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: f"{guard.place}: {guard.text.strip()} -> {guard.without}")
async def test_without_a_guard_it_does_not(quick_server: Server, namespace: str, guard: Guard) -> None:
    scripts = scripts_without(guard)
    with pytest.raises((AssertionError, FleetError, ValueError, pytest.fail.Exception)):
        await play(quick_server, namespace, guard.story, scripts)
