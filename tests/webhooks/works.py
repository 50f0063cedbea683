"""Jobs that end with callbacks, and senders of them, on a real store."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import redis
from fleet.v1 import types_pb2

from fleet_server.domain.job import JobRecord, Lane, NewJob
from fleet_server.domain.webhook import RetryPlan
from fleet_server.domain.webhook_signature import Secret, SecretBook
from fleet_server.protojson import JsonCodec
from fleet_server.services.callbacks import CallbackRules
from fleet_server.services.jobs import job_message
from fleet_server.services.webhook_hosts import HostLimits
from fleet_server.services.webhook_names import Names, SystemNames
from fleet_server.services.webhook_post import Poster, PostSettings
from fleet_server.services.webhook_sender import SenderSettings, WebhookSender
from fleet_server.store import ClaimRequest, HookRow, Store
from tests.store.making import new_job

LANE = Lane("lane-w", "vision", "image_gen", "sketch")
SECRET = Secret(b"0123456789abcdef0123456789abcdef")
BOOK = SecretBook((SECRET,))
LOOPBACK = CallbackRules(loopback=True)
QUICK = RetryPlan((20, 40, 60, 80, 100, 100, 100, 100, 100, 100))
CODEC = JsonCodec()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


async def message(record: JobRecord) -> types_pb2.Job:
    """The Job as events show it."""
    return job_message(record, types_pb2.JobSpec.FromString(record.spec))


@dataclass
class Works:
    """One store with an agent that ends jobs as told."""

    store: Store
    url: str
    namespace: str

    def cut_connections(self) -> int:
        """Cuts all connections to the store but the one that asks; how many."""
        client: Any = redis.Redis.from_url(self.url, protocol=2)
        try:
            return int(client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"))
        finally:
            client.close()

    def job(self, url: str, **changes: Any) -> NewJob:
        """A picture whose end is told to `url`."""
        spec = types_pb2.JobSpec(
            job_type=types_pb2.JOB_TYPE_IMAGE_GEN,
            priority=types_pb2.JOB_PRIORITY_NORMAL,
            target_cluster="vision",
            target_model="sketch",
            callback_url=url,
        )
        return new_job(spec=spec.SerializeToString(), lane=LANE, **changes)

    async def submit(self, *urls: str) -> list[str]:
        """Queued jobs, one for each receiver; at most 1,000."""
        jobs = [self.job(url) for url in urls]
        await self.store.jobs.submit(jobs, callbacks=[job.job_id for job in jobs])
        return [job.job_id for job in jobs]

    async def end(self, count: int = 1, *, result: types_pb2.JobResult | None = None, reason: str = "") -> list[str]:
        """Takes the next jobs of the lane to their end; their ids."""
        wishes = [ClaimRequest(LANE.lane_id, "agx0", "agx0-s1", secrets.token_hex(16), 30_000) for _ in range(count)]
        claims = [claim for claim in await self.store.jobs.claim(wishes) if claim is not None]
        assert len(claims) == count

        async def one(job_id: str, token: str) -> str:
            await self.store.jobs.started(job_id, token)
            if reason:
                error = types_pb2.JobError(detail="it broke", code="INTERNAL", reason=reason).SerializeToString()
                attempt = types_pb2.JobAttempt(generation=1, attempt=1, node_id="agx0").SerializeToString()
                await self.store.jobs.fail(job_id, token, error=error, attempt=attempt, retryable=False)
            else:
                made = (result or types_pb2.JobResult()).SerializeToString()
                await self.store.jobs.complete(job_id, token, result=made)
            return job_id

        return list(await asyncio.gather(*(one(claim.job.job_id, claim.token) for claim in claims)))

    async def ended(self, *urls: str, **how: Any) -> list[str]:
        """Jobs that ended, one for each receiver."""
        ids = await self.submit(*urls)
        await self.end(len(ids), **how)
        return ids

    async def row(self, job_id: str, generation: int = 1) -> HookRow:
        """A callback as it stands."""
        return (await self.store.webhooks.get_many(job_id, [generation]))[0]

    async def tries(self, job_id: str, generation: int = 1) -> list[types_pb2.DeliveryAttempt]:
        """Its log."""
        return list(types_pb2.Delivery.FromString((await self.row(job_id, generation)).log).attempts)

    def sender(
        self,
        store: Store | None = None,
        *,
        rules: CallbackRules = LOOPBACK,
        names: Names | None = None,
        book: SecretBook = BOOK,
        plan: RetryPlan = QUICK,
        limits: HostLimits | None = None,
        seconds: float = 30.0,
        lease_seconds: float = 90.0,
        poll_seconds: float = 0.05,
    ) -> WebhookSender:
        """A sender that does not run yet."""
        used = store or self.store
        poster = Poster(
            rules,
            names or SystemNames(),
            clock=now_ms,
            settings=PostSettings(seconds=seconds, connect_seconds=seconds / 3),
        )
        return WebhookSender(
            used,
            message,
            CODEC,
            poster,
            book,
            clock=now_ms,
            draw=lambda: 0.0,
            settings=SenderSettings(
                plan=plan,
                limits=limits or HostLimits(defer_seconds=0.5),
                seconds=seconds,
                lease_seconds=lease_seconds,
                poll_seconds=poll_seconds,
            ),
        )

    @asynccontextmanager
    async def sending(self, *senders: WebhookSender, **options: Any) -> AsyncIterator[Sequence[WebhookSender]]:
        """Senders that run until the context ends; one with `options` where none is given."""
        made = senders or (self.sender(**options),)
        tasks = [asyncio.create_task(sender.run()) for sender in made]
        try:
            yield made
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results), results
