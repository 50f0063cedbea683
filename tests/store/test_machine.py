"""Random lives of jobs against the model, on a real server.

`FLEET_STATE_STEPS` is how many steps all lives together have; it is read at import, before the session takes FLEET_*
away.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobRecord, JobState, NewJob, PauseKey, Priority
from fleet_server.store import Held, Report, decode_job, open_store
from fleet_server.store.keys import NAMES
from tests.store.audit import audit, clear
from tests.store.conftest import Server
from tests.store.making import ERRORS, LEASE_MS, ManualClock, error, new_job, wish
from tests.store.model import BACKOFF_MS, MARGIN_MS, Model, ModelJob

STEPS = int(os.environ.get("FLEET_STATE_STEPS", "3000"))
PHASES = [Phase.generate, Phase.shrink] if "FLEET_STATE_STEPS" in os.environ else [Phase.generate]
"""Shrinking takes minutes, more than a test has; the same seed fails in the long form too, where it is given them."""
LIFE_STEPS = 50
LIVES = 5
PARTS = -(-STEPS // (LIFE_STEPS * LIVES))
"""Tests, each of so many lives of so many steps, with a seed of its own."""

WHOLE_STEPS = 10
"""So often records are read as servers read them; between, what is compared of all jobs comes as one text."""
_LOOK = """
local out = {}
for n = 1, #ARGV do
  local st, wr, ge, at, lo, tk, en, lt, av, wa, rs = unpack(redis.call('HMGET', KEYS[1] .. ARGV[n], 'st', 'wr', 'ge',
    'at', 'lo', 'tk', 'en', 'lt', 'av', 'wa', 'rs'))
  out[n] = table.concat({ARGV[n], st or '', wr or '', ge or '', at or '0', lo or '0', tk or '', en or '', lt or '',
    av or '', wa or '0', (rs or '') ~= '' and 'R' or ''}, ' ')
end
return table.concat(out, '\\n')
"""

_runs = itertools.count(1)
_picks = st.integers(0, 1_000_000)
_ends = st.tuples(
    st.sampled_from(["n1", "n2", "n3"]),
    st.sampled_from(["succeeds", "succeeds", "succeeds", "fails", "fails for good", "is lost", "is started"]),
)
_PAUSES = [
    PauseKey(),
    PauseKey(priority=Priority.HIGH),
    PauseKey("vision", "image_gen", Priority.LOW),
    PauseKey("audio"),
]


class Jobs(RuleBasedStateMachine):
    """One lane of jobs; tokens old and new are tried on all of them."""

    server: Server

    def __init__(self) -> None:
        super().__init__()
        self.namespace = f"machine{next(_runs)}"
        self.runner = asyncio.Runner()
        self.loop = self.runner.get_loop()
        self.client = self.server.client()
        self.looks = 0
        self.clock = ManualClock()
        self.store = self.run(self._open())
        self.model = Model()
        self.tokens: list[tuple[str, str]] = []
        self.numbers = itertools.count(1)

    async def _open(self) -> Any:
        return open_store(self.server.url, namespace=self.namespace, clock=self.clock)

    def run(self, coroutine: Any) -> Any:
        # (A runner's own `run` looks after signals each time, which takes longer than a step of the store.)
        return self.loop.run_until_complete(coroutine)

    def teardown(self) -> None:
        self.same_records()
        self.run(self.check_events())
        self.run(self.store.aclose())
        self.runner.close()
        audit(self.client, self.namespace)
        clear(self.client, self.namespace)
        self.client.close()

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

    def some_jobs(self, number: int, many: int) -> tuple[str, ...]:
        """Up to so many of the jobs so far, recent ones more often."""
        known = list(self.model.jobs)[-12:]
        picked = [known[(number >> (4 * n)) % len(known)] for n in range(many)] if known else []
        return tuple(dict.fromkeys(picked))

    def new(self, **changes: Any) -> NewJob:
        return new_job(f"job-{next(self.numbers):06d}", timeout_ms=20_000, **changes)

    def modelled(self, job: NewJob) -> ModelJob:
        return ModelJob(
            job.job_id,
            job.priority,
            job.owner,
            job.max_retries,
            job.timeout_ms,
            job.queue_ttl_ms,
            self.clock.now,
            job.schedule_ms,
            job.after,
            job.group_job_id,
            job.child_job_ids,
            job.exclusive,
        )

    @rule(
        priority=st.sampled_from(Priority),
        owner=st.sampled_from(["", "alice", "bob"]),
        max_retries=st.integers(0, 2),
        later=st.sampled_from([None, None, 2_000]),
        ttl=st.sampled_from([5_000, 10_000_000, 10_000_000]),
        many=st.sampled_from([1, 1, 1, 3]),
        size=st.sampled_from([0, 0, 0, 2, 3]),
        parents=st.sampled_from([0, 0, 1, 2]),
        number=_picks,
        clear=st.booleans(),
        exclusive=st.sampled_from([False, False, True]),
    )
    def submit(
        self, later: int | None, ttl: int, many: int, size: int, parents: int, number: int, clear: bool, **changes: Any
    ) -> None:
        """A batch; with `size` its last one is a group. Later ones may wait for earlier ones."""
        if clear:
            self.resume([*_PAUSES])
        due = None if later is None else self.clock.now + later
        values = {**changes, "schedule_ms": due, "queue_ttl_ms": ttl, "after": self.some_jobs(number, parents)}
        jobs = [self.new(**values) for _ in range(many - bool(size))]
        if jobs and number % 2:
            values["after"] = (*values["after"], jobs[0].job_id)
        if size:
            group = self.new(**values)
            children = [self.new(**{**values, "after": ()}, group_job_id=group.job_id) for _ in range(size)]
            jobs += [replace(group, child_job_ids=tuple(child.job_id for child in children)), *children]
        submitted = self.run(self.store.jobs.submit(jobs))
        assert submitted.job_ids == tuple(job.job_id for job in jobs if not job.group_job_id)
        self.model.submit([self.modelled(job) for job in jobs], self.clock.now)

    @rule(node=st.sampled_from(["n1", "n2"]), many=st.sampled_from([1, 1, 2, 4]))
    @precondition(lambda self: self.model.jobs)
    def claim(self, node: str, many: int) -> None:
        requests = [wish(node) for _ in range(many)]
        claims = self.run(self.store.jobs.claim(requests))
        for request, claimed in zip(requests, claims, strict=True):
            if claimed is None:
                assert not self.model.may_go()
                continue
            assert self.model.may_claim(claimed.job.job_id), claimed.job.job_id
            self.given(claimed.job, node, request.token)
        assert [again for again in self.run(self.store.jobs.claim(requests)) if again] == [one for one in claims if one]

    @rule(node=st.sampled_from(["n1", "n2"]))
    @precondition(lambda self: any(job.avoid_node for job in self.model.jobs.values()))
    def claim_elsewhere(self, node: str) -> None:
        """With `avoid`: nothing that this node failed or lost of late."""
        request = replace(wish(node), avoid=True)
        (claimed,) = self.run(self.store.jobs.claim([request]))
        free = [job for job in self.model.may_go() if not job.avoids(node, self.clock.now)]
        if claimed is None:
            assert not free or len(self.model.may_go()) > 8
            return
        assert claimed.job.job_id in {job.job_id for job in free}
        self.given(claimed.job, node, request.token)

    def given(self, job: JobRecord, node: str, token: str) -> None:
        self.model.claimed(job.job_id, node, token, self.clock.now)
        self.tokens.append((job.job_id, token))

    def on_attempt(self, number: int, act: Callable[[str, str], None]) -> None:
        chosen = self.pick(number)
        if chosen is not None:
            act(*chosen)

    @rule(ends=st.lists(_ends, min_size=1, max_size=6))
    @precondition(lambda self: self.model.may_go())
    def run_some(self, ends: list[tuple[str, str]]) -> None:
        """Jobs claimed and started, and mostly ended: so that lives get far."""
        for node, how in ends:
            if self.model.may_go():
                self.run_one(node, how)

    def run_one(self, node: str, how: str) -> None:
        self.claim(node, 1)
        job_id, token = self.tokens[-1]
        now = self.clock.now
        assert self.run(self.store.jobs.started(job_id, token)) is not None
        assert self.model.started(job_id, token, now)
        if how == "succeeds":
            got = self.run(self.store.jobs.complete(job_id, token, result=b"r"))
            assert got.outcome == self.model.complete(job_id, token, now) == "ok"
        elif how.startswith("fails"):
            retryable = how == "fails"
            got = self.run(self.store.jobs.fail(job_id, token, error=error("X"), attempt=b"a", retryable=retryable))
            assert got.outcome == self.model.fail(job_id, token, retryable, 0, now) == "ok"
        elif how == "is lost":
            self.wait(LEASE_MS, True)

    @rule(number=_picks)
    @precondition(lambda self: self.tokens)
    def start(self, number: int) -> None:
        def act(job_id: str, token: str) -> None:
            got = self.run(self.store.jobs.started(job_id, token))
            assert (got is not None) == self.model.started(job_id, token, self.clock.now)

        self.on_attempt(number, act)

    @precondition(lambda self: self.tokens)
    @rule(number=_picks, percent=st.integers(0, 100))
    def progress(self, number: int, percent: int) -> None:
        def act(job_id: str, token: str) -> None:
            dropped = self.run(self.store.jobs.renew([Held(job_id, token, percent)], LEASE_MS))
            assert (dropped == []) == self.model.renew(job_id, token, self.clock.now)

        self.on_attempt(number, act)

    @precondition(lambda self: self.tokens)
    @rule(numbers=st.lists(_picks, min_size=1, max_size=3))
    def complete(self, numbers: list[int]) -> None:
        chosen = [one for number in numbers if (one := self.pick(number))]
        done = self.run(self.store.jobs.complete_many([Report(job_id, token, b"r") for job_id, token in chosen]))
        for (job_id, token), got in zip(chosen, done, strict=True):
            assert got.outcome == self.model.complete(job_id, token, self.clock.now)

    @precondition(lambda self: self.tokens)
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

    @precondition(lambda self: self.tokens)
    @rule(number=_picks, stopped=st.booleans())
    def release(self, number: int, stopped: bool) -> None:
        def act(job_id: str, token: str) -> None:
            got = self.run(self.store.jobs.release(job_id, token, stopped=stopped))
            assert got == self.model.release(job_id, token, stopped)

        self.on_attempt(number, act)

    def _try(self, coroutine: Any) -> bool:
        try:
            self.run(coroutine)
        except FleetError as refused:
            assert refused.reason in {"JOB_ENDED", "JOB_NOT_FAILED"}
            return False
        return True

    @precondition(lambda self: self.model.jobs)
    @rule(number=_picks)
    def cancel(self, number: int) -> None:
        job_id = list(self.model.jobs)[number % len(self.model.jobs)]
        if number % 4 == 0:
            assert self._try(self.store.jobs.cancel(job_id)) == self.model.cancel(job_id, self.clock.now)

    @precondition(lambda self: self.model.jobs)
    @rule(number=_picks)
    def retry(self, number: int) -> None:
        failed = [job_id for job_id, job in self.model.jobs.items() if job.state is JobState.FAILED]
        chosen = failed or list(self.model.jobs)
        if chosen:
            job_id = chosen[number % len(chosen)]
            assert self._try(self.store.jobs.retry(job_id)) == self.model.retry(job_id, self.clock.now)

    @precondition(lambda self: any(job.state is JobState.FAILED for job in self.model.jobs.values()))
    @rule(number=_picks)
    def redrive(self, number: int) -> None:
        """All of a page of the dead list, said twice."""
        page, _ = self.run(self.store.jobs.list_dead(limit=1 + number % 4, reason="X" if number % 2 else None))
        ids = [record.job_id for record in page]
        done = self.run(self.store.jobs.retry_many(ids, operation=f"op-{number}-{self.clock.now}-{len(self.tokens)}"))
        assert [isinstance(one, JobRecord) for one in done] == [
            self.model.retry(job_id, self.clock.now) for job_id in ids
        ]

    @precondition(lambda self: self.model.may_go())
    @rule(key=st.sampled_from(_PAUSES))
    def pause(self, key: PauseKey) -> None:
        self.model.pauses.add(key)
        in_force = self.run(self.store.pauses.pause(key))
        assert {one.key for one in in_force} == self.model.pauses

    @precondition(lambda self: self.model.pauses)
    @rule(keys=st.lists(st.sampled_from(_PAUSES), min_size=2, max_size=4))
    def resume(self, keys: list[PauseKey]) -> None:
        for key in keys:
            known = key in self.model.pauses
            try:
                in_force = self.run(self.store.pauses.resume(key))
                assert known and {one.key for one in in_force} == self.model.pauses - {key}
            except FleetError as refused:
                assert refused.reason == "PAUSE_NOT_FOUND" and not known
            self.model.pauses.discard(key)

    @precondition(lambda self: self.tokens)
    @rule(node=st.sampled_from(["n1", "n2"]))
    def boot(self, node: str) -> None:
        """The node's agent began anew."""
        self.run(self.store.jobs.lose_session(node, f"{node}-s1", error=ERRORS.lost, error_poison=ERRORS.poison))
        self.model.lose_session(node, self.clock.now)

    @precondition(lambda self: self.model.jobs)
    @rule(ms=st.sampled_from([1, 1_000, 5_000, LEASE_MS, 700_000]), reap=st.booleans())
    def wait(self, ms: int, reap: bool) -> None:
        self.clock.tick(ms)
        if reap:
            result = self.run(self.store.jobs.reap(ERRORS, margin_ms=MARGIN_MS, backoff_ms=BACKOFF_MS))
            assert not result.more
            self.model.reap(self.clock.now)

    @invariant()
    def same(self) -> None:
        """All jobs are what the model says, after each step."""
        jobs, self.looks = self.model.jobs, self.looks + 1
        found = self.client.eval(_LOOK, 1, f"{{{self.namespace}}}:{NAMES['job']}", *jobs).decode()
        wanted = "\n".join(map(_line, jobs.values()))
        if self.looks % WHOLE_STEPS == 0 or found != wanted:
            self.same_records()
            assert found == wanted

    def same_records(self) -> None:
        records = self.run(self.store.jobs.get_many(list(self.model.jobs)))
        for record, job in zip(records, self.model.jobs.values(), strict=True):
            assert record is not None
            got = (record.state, record.wait_reason, record.generation, record.attempt, record.losses, record.token)
            want = (job.state, job.wait_reason, job.generation, job.attempt, job.losses, job.token)
            assert got == want, (job, record)
            assert (record.enqueued_ms, record.last_token) == (job.enqueued_ms, job.last_token), job
            assert record.avoid_node == job.avoid_node, job
            assert record.waits == (len(job.unmet) if job.waits_for_others else 0), job
            assert job.attempt - job.losses <= job.max_retries + 1
            assert (record.reason != "") == (job.state is JobState.FAILED)


def _line(job: ModelJob) -> str:
    """A job as `_LOOK` says it."""
    waits, reason = len(job.unmet) if job.waits_for_others else 0, "R" if job.state is JobState.FAILED else ""
    return (
        f"{job.job_id} {job.state.value} {job.wait_reason.value} {job.generation} {job.attempt} {job.losses} "
        f"{job.token} {job.enqueued_ms} {job.last_token} {job.avoid_node} {waits} {reason}"
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_random_lives_match_the_model(quick_server: Server, part: int) -> None:
    """250 steps a part, with the same ones every time."""
    lives = seed(part)(type(f"Jobs{part}", (Jobs,), {"server": quick_server}))
    run_state_machine_as_test(
        lives,
        settings=settings(
            max_examples=LIVES,
            stateful_step_count=LIFE_STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=PHASES,
        ),
    )
