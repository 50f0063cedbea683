"""Many at once, no model: whatever was interleaved, the indexes agree with the jobs afterwards."""

from __future__ import annotations

import asyncio
import random

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import Priority
from fleet_server.store import open_store
from tests.store.audit import audit, clear
from tests.store.conftest import Server
from tests.store.making import ERRORS, LEASE_MS, ManualClock, new_job, wish


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
    clear(client, namespace)
    client.close()
