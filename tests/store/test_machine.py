"""Random lives of jobs on a real server, compared with a pure model step by step.

`FLEET_MACHINE_STEPS` (of one life) and `FLEET_MACHINE_RUNS` raise the defaults; they are read at import, before the
session takes FLEET_* away.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobState, Priority, WaitReason
from fleet_server.store import Held, decode_job, open_store
from tests.store.audit import audit
from tests.store.conftest import Server
from tests.store.making import ERRORS, LEASE_MS, ManualClock, error, new_job, wish
from tests.store.model import BACKOFF_MS, MARGIN_MS, Model, ModelJob

STEPS = int(os.environ.get("FLEET_MACHINE_STEPS", "30"))
RUNS = int(os.environ.get("FLEET_MACHINE_RUNS", "10"))

_runs = itertools.count(1)
_picks = st.integers(0, 1_000_000)


class Jobs(RuleBasedStateMachine):
    """One lane of jobs; tokens old and new are tried on all of them."""

    server: Server

    def __init__(self) -> None:
        super().__init__()
        self.namespace = f"machine{next(_runs)}"
        self.runner = asyncio.Runner()
        self.clock = ManualClock()
        self.store = self.run(self._open())
        self.model = Model()
        self.tokens: list[tuple[str, str]] = []
        self.numbers = itertools.count(1)

    async def _open(self) -> Any:
        return open_store(self.server.url, namespace=self.namespace, clock=self.clock)

    def run(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        self.run(self.check_events())
        self.run(self.store.aclose())
        self.runner.close()
        client = self.server.client()
        audit(client, self.namespace)
        client.close()

    async def check_events(self) -> None:
        """One job_complete for each end, versions rising, none twice."""
        events, _ = await self.store.events.read("0", 100_000)
        ends: dict[str, int] = {}
        versions: dict[str, int] = {}
        for event in events:
            record = decode_job(event.fields)
            assert record.version > versions.get(record.job_id, 0)
            versions[record.job_id] = record.version
            assert (event.type == "job_complete") == record.state.ended
            ends[record.job_id] = ends.get(record.job_id, 0) + record.state.ended
        assert ends == {job_id: job.ended for job_id, job in self.model.jobs.items()}

    def pick(self, number: int) -> tuple[str, str] | None:
        """One of the attempts so far, the newest more often."""
        recent = self.tokens[-4:] if number % 3 else self.tokens
        return recent[number % len(recent)] if recent else None

    @rule(
        priority=st.sampled_from(Priority),
        owner=st.sampled_from(["", "alice", "bob"]),
        max_retries=st.integers(0, 2),
        later=st.sampled_from([None, None, 2_000]),
        ttl=st.sampled_from([5_000, 10_000_000]),
        many=st.sampled_from([1, 1, 3]),
    )
    def submit(self, priority: Priority, owner: str, max_retries: int, later: int | None, ttl: int, many: int) -> None:
        now = self.clock.now
        due = None if later is None else now + later
        jobs = []
        for _ in range(many):
            job_id = f"job-{next(self.numbers):06d}"
            jobs.append(
                new_job(
                    job_id,
                    priority=priority,
                    owner=owner,
                    max_retries=max_retries,
                    timeout_ms=20_000,
                    queue_ttl_ms=ttl,
                    schedule_ms=due,
                )
            )
            self.model.jobs[job_id] = ModelJob(
                job_id,
                priority,
                owner,
                max_retries,
                20_000,
                ttl,
                due or now,
                due,
                wait_reason=WaitReason.SCHEDULED if due else WaitReason.NONE,
            )
        assert not self.run(self.store.jobs.submit(jobs)).replayed

    @rule(node=st.sampled_from(["n1", "n2"]))
    def claim(self, node: str) -> None:
        request = wish(node)
        (claimed,) = self.run(self.store.jobs.claim([request]))
        if claimed is None:
            assert not any(job.in_line for job in self.model.jobs.values())
            return
        job_id = claimed.job.job_id
        assert self.model.may_claim(job_id), job_id
        self.model.claimed(job_id, node, request.token, self.clock.now)
        self.tokens.append((job_id, request.token))
        assert self.run(self.store.jobs.claim([request])) == [claimed]

    def on_attempt(self, number: int, act: Callable[[str, str], None]) -> None:
        chosen = self.pick(number)
        if chosen is not None:
            act(*chosen)

    @rule(number=_picks)
    def start(self, number: int) -> None:
        def act(job_id: str, token: str) -> None:
            got = self.run(self.store.jobs.started(job_id, token))
            assert (got is not None) == self.model.started(job_id, token, self.clock.now)

        self.on_attempt(number, act)

    @rule(number=_picks)
    def renew(self, number: int) -> None:
        def act(job_id: str, token: str) -> None:
            dropped = self.run(self.store.jobs.renew([Held(job_id, token, 50)], LEASE_MS))
            assert (dropped == []) == self.model.renew(job_id, token, self.clock.now)

        self.on_attempt(number, act)

    @rule(number=_picks)
    def complete(self, number: int) -> None:
        def act(job_id: str, token: str) -> None:
            got = self.run(self.store.jobs.complete(job_id, token, result=b"r"))
            assert got.outcome == self.model.complete(job_id, token)

        self.on_attempt(number, act)

    @rule(number=_picks, retryable=st.booleans(), backoff=st.sampled_from([0, 1_500]))
    def fail(self, number: int, retryable: bool, backoff: int) -> None:
        def act(job_id: str, token: str) -> None:
            got = self.run(
                self.store.jobs.fail(
                    job_id, token, error=error("X"), attempt=b"a", retryable=retryable, backoff_ms=backoff
                )
            )
            assert got.outcome == self.model.fail(job_id, token, retryable, backoff, self.clock.now)

        self.on_attempt(number, act)

    @rule(number=_picks)
    def release(self, number: int) -> None:
        def act(job_id: str, token: str) -> None:
            assert self.run(self.store.jobs.release(job_id, token)) == self.model.release(job_id, token)

        self.on_attempt(number, act)

    def _try(self, coroutine: Any) -> bool:
        try:
            self.run(coroutine)
        except FleetError as refused:
            assert refused.reason in {"JOB_ENDED", "JOB_NOT_FAILED"}
            return False
        return True

    @rule(number=_picks)
    def cancel(self, number: int) -> None:
        if self.model.jobs and number % 3 == 0:
            job_id = list(self.model.jobs)[number % len(self.model.jobs)]
            assert self._try(self.store.jobs.cancel(job_id)) == self.model.cancel(job_id)

    @rule(number=_picks)
    def retry(self, number: int) -> None:
        failed = [job_id for job_id, job in self.model.jobs.items() if job.state is JobState.FAILED]
        chosen = failed or list(self.model.jobs)
        if chosen:
            job_id = chosen[number % len(chosen)]
            assert self._try(self.store.jobs.retry(job_id)) == self.model.retry(job_id, self.clock.now)

    @rule(ms=st.sampled_from([1, 1_000, 5_000, LEASE_MS, 700_000]), reap=st.booleans())
    def wait(self, ms: int, reap: bool) -> None:
        self.clock.tick(ms)
        if reap:
            self.run(self.store.jobs.reap(ERRORS, margin_ms=MARGIN_MS, backoff_ms=BACKOFF_MS))
            self.model.reap(self.clock.now)

    @invariant()
    def same(self) -> None:
        records = self.run(self.store.jobs.get_many(list(self.model.jobs)))
        for record, job in zip(records, self.model.jobs.values(), strict=True):
            assert record is not None
            got = (record.state, record.wait_reason, record.generation, record.attempt, record.losses, record.token)
            assert got == (job.state, job.wait_reason, job.generation, job.attempt, job.losses, job.token)
            assert (record.enqueued_ms, record.last_token) == (job.enqueued_ms, job.last_token)
            assert job.attempt - job.losses <= job.max_retries + 1


@pytest.mark.timeout(60 + STEPS * RUNS // 10)
def test_random_lives_match_the_model(plain_server: Server) -> None:
    """About 300 steps by default; the environment can raise both numbers."""
    Jobs.server = plain_server
    run_state_machine_as_test(
        Jobs,
        settings=settings(
            max_examples=RUNS,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


async def test_a_long_random_walk_keeps_every_index(plain_server: Server, namespace: str) -> None:
    """Concurrent random steps, no model: whatever was interleaved, the indexes agree with the jobs afterwards."""
    clock = ManualClock()
    async with open_store(plain_server.url, namespace=namespace, clock=clock) as store:
        ids: list[str] = []
        tokens: list[tuple[str, str]] = []

        async def actor(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(60):
                kind = rng.randrange(9)
                if kind == 0 or not ids:
                    jobs = [new_job(priority=rng.choice(list(Priority)), owner=rng.choice("ab")) for _ in range(2)]
                    ids.extend((await store.jobs.submit(jobs)).job_ids)
                elif kind <= 2:
                    request = wish(rng.choice(["n1", "n2"]))
                    (claimed,) = await store.jobs.claim([request])
                    if claimed is not None:
                        tokens.append((claimed.job.job_id, claimed.token))
                elif kind == 3:
                    clock.tick(rng.choice([0, 1000, LEASE_MS]))
                    await store.jobs.reap(ERRORS, limit=3)
                elif kind == 4:
                    await store.jobs.lose_session("n1", "n1-s1", error=ERRORS.lost)
                elif kind == 5 and rng.random() < 0.3:
                    try:
                        await store.jobs.cancel(rng.choice(ids))
                    except FleetError as refused:
                        assert refused.reason == "JOB_ENDED"
                elif tokens:
                    job_id, token = rng.choice(tokens[-6:])
                    if kind == 6:
                        await store.jobs.complete(job_id, token, result=b"")
                    elif kind == 7:
                        await store.jobs.started(job_id, token)
                    else:
                        await store.jobs.fail(
                            job_id, token, error=b"e", attempt=b"a", retryable=True, backoff_ms=rng.choice([0, 500])
                        )

        await asyncio.gather(*(actor(seed) for seed in range(8)))
        assert len(ids) > 50
        events, _ = await store.events.read("0", 100_000)
        ends = [event.fields["id"] for event in events if event.type == "job_complete"]
        assert len(ends) == len(set(ends))
    client = plain_server.client()
    audit(client, namespace)
    client.close()
