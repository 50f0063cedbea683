"""Jobs, claims and clocks for the store's tests."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from fleet.v1 import types_pb2
from uuid_utils import uuid7

from fleet_server.domain.job import Claim, Lane, NewJob, Priority
from fleet_server.store import ClaimRequest, ReapErrors, Store

START_MS = 1_763_805_600_000
LANE = Lane("lane-a", "vision", "image_gen", "sketch")
LEASE_MS = 30_000


def error(reason: str) -> bytes:
    """An encoded JobError."""
    encoded: bytes = types_pb2.JobError(detail=reason.lower(), reason=reason).SerializeToString()
    return encoded


ERRORS = ReapErrors(
    lost=error("NODE_LOST"), poison=error("POISON"), timeout=error("TIMEOUT"), ttl=error("QUEUE_TTL_EXPIRED")
)


class ManualClock:
    """Unix ms that move only when told."""

    def __init__(self) -> None:
        self.now = START_MS

    def __call__(self) -> int:
        return self.now

    def tick(self, ms: int) -> int:
        self.now += ms
        return self.now


def new_job(job_id: str = "", **changes: Any) -> NewJob:
    """A valid job; any field of NewJob may be given."""
    values: dict[str, Any] = {
        "job_id": job_id or str(uuid7()),
        "spec": b"spec",
        "lane": LANE,
        "priority": Priority.NORMAL,
        "owner": "",
        "max_retries": 3,
        "timeout_ms": 60_000,
        "queue_ttl_ms": 86_400_000,
    }
    return NewJob(**{**values, **changes})


def token() -> str:
    return secrets.token_hex(16)


def wish(
    node_id: str = "agx0", *, lane: Lane = LANE, session: str = "", attempt: str = "", job_id: str = ""
) -> ClaimRequest:
    """A claim request with a token of its own."""
    return ClaimRequest(lane.lane_id, node_id, session or f"{node_id}-s1", attempt or token(), LEASE_MS, job_id)


async def submit(store: Store, **changes: Any) -> str:
    """One job accepted; its id."""
    return (await store.jobs.submit([new_job(**changes)])).job_ids[0]


async def claim(store: Store, node_id: str = "agx0", **changes: Any) -> Claim:
    """One job claimed, which must be there."""
    (claimed,) = await store.jobs.claim([wish(node_id, **changes)])
    assert claimed is not None
    return claimed


async def running(store: Store, node_id: str = "agx0", **changes: Any) -> Claim:
    """A fresh job, claimed and started."""
    await submit(store, **changes)
    claimed = await claim(store, node_id)
    assert await store.jobs.started(claimed.job.job_id, claimed.token) is not None
    return claimed


async def drain(store: Store, *, lane: Lane = LANE, most: int = 1000) -> list[str]:
    """Claims until nothing waits in the lane; the ids in order."""
    order: list[str] = []
    while len(order) < most:
        (claimed,) = await store.jobs.claim([wish(lane=lane)])
        if claimed is None:
            break
        order.append(claimed.job.job_id)
    return order


async def kinds(store: Store) -> list[str]:
    """The events so far: "type state version" of jobs."""
    events, _ = await store.events.read("0")
    return [f"{event.type} {event.fields['st'].decode()} {event.fields['ve'].decode()}" for event in events]


def reasons(errors: Sequence[bytes]) -> list[str]:
    """The reasons of encoded JobErrors."""
    return [types_pb2.JobError.FromString(one).reason for one in errors]
