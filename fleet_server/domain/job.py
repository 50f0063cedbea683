"""What a job is to the server: its states, its record in the store and what may follow what. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class JobState(enum.StrEnum):
    """The five states; the last three are ends. `queued` again between automatic retries."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in ENDED


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class Priority(enum.StrEnum):
    """Priorities in the order in which heads are compared."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


BOOST_MS = {Priority.HIGH: 600_000, Priority.NORMAL: 0, Priority.LOW: -600_000}
"""How much older a waiting job of each priority counts when the heads of a lane are compared."""


class WaitReason(enum.StrEnum):
    """Why a queued job is not in line. Stored ones; PAUSED and NO_NODE are judged when read."""

    NONE = ""
    DEPENDENCY = "DEPENDENCY"
    SCHEDULED = "SCHEDULED"
    BACKOFF = "BACKOFF"
    PAUSED = "PAUSED"
    NO_NODE = "NO_NODE"


@dataclass(frozen=True, slots=True)
class Lane:
    """What jobs must share to wait in one line: the same nodes can run all of them equally well.

    `lane_id` is derived from the other fields (services.lanes), stable over restarts and replicas. `model` is the
    resolved model's name or "". `labels` are sorted (name, value) pairs.
    """

    lane_id: str
    cluster: str
    job_type: str
    model: str = ""
    loras: tuple[str, ...] = ()
    node_id: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    vram_class: int = 0


@dataclass(frozen=True, slots=True)
class NewJob:
    """A validated job on its way into the store. `spec` is an encoded fleet.v1.JobSpec, immutable from here on."""

    job_id: str
    spec: bytes
    lane: Lane
    priority: Priority
    owner: str
    max_retries: int
    timeout_ms: int
    queue_ttl_ms: int
    schedule_ms: int | None = None
    """Not before this time (Unix ms); None: now."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job as the store holds it at one `version`. Times are Unix milliseconds, None where not yet.

    `result` and `error` are encoded fleet.v1.JobResult and fleet.v1.JobError, `attempts` encoded fleet.v1.JobAttempt,
    the latest 20. They are read with the job itself, not in events' snapshots, except `error`.
    """

    job_id: str
    state: JobState
    wait_reason: WaitReason
    job_type: str
    priority: Priority
    cluster: str
    lane_id: str
    model: str
    owner: str
    generation: int
    version: int
    attempt: int
    losses: int
    max_retries: int
    timeout_ms: int
    queue_ttl_ms: int
    created_ms: int
    enqueued_ms: int
    updated_ms: int
    schedule_ms: int | None = None
    started_ms: int | None = None
    ended_ms: int | None = None
    token: str = ""
    last_token: str = ""
    node_id: str = ""
    session: str = ""
    progress: int = 0
    step: int | None = None
    steps: int | None = None
    load_ms: int | None = None
    run_ms: int | None = None
    upload_ms: int | None = None
    error: bytes = b""
    spec: bytes = b""
    result: bytes = b""
    attempts: tuple[bytes, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Claim:
    """A job given to a node's session: the record just claimed, with its spec."""

    job: JobRecord
    token: str
