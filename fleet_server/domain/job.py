"""What a job is to the server: its states, its record in the store and what may follow what. Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from fleet_server.domain.comfy import Need, weights_of


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
    needs: tuple[Need, ...] = ()
    """What a graph needs of the node's ComfyUI; () for all other work."""
    engine: str = ""
    """The one engine that a free payload names; "" where any will do that runs the type."""

    @property
    def chief_model(self) -> str:
        """The model that its jobs have in memory, of a graph's the first; "" where they have none."""
        if self.model or not self.needs:
            return self.model
        return next(iter(weights_of(self.needs)[0]), "")


@dataclass(frozen=True, slots=True)
class PauseKey:
    """Which queued jobs are held back: those that match every field that is set; None matches any."""

    cluster: str | None = None
    job_type: str | None = None
    priority: Priority | None = None

    def holds(self, cluster: str, job_type: str, priority: Priority) -> bool:
        """Whether a job of these may not start."""
        return (
            self.cluster in {None, cluster}
            and self.job_type in {None, job_type}
            and (self.priority is None or self.priority is priority)
        )


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause in force since `created_ms` (Unix ms)."""

    key: PauseKey
    created_ms: int


def paused(pauses: Iterable[Pause], cluster: str, job_type: str, priority: Priority) -> bool:
    """Whether any of the pauses holds back jobs of this cluster, type and priority."""
    return any(pause.key.holds(cluster, job_type, priority) for pause in pauses)


def pauses_lane(pauses: Iterable[Pause], cluster: str, job_type: str) -> frozenset[Priority]:
    """The priorities of a lane that are held back. A mixed lane has no type (""): only pauses of any type hold it."""
    held = list(pauses)
    return frozenset(priority for priority in Priority if paused(held, cluster, job_type, priority))


@dataclass(frozen=True, slots=True)
class NewJob:
    """A validated job on its way into the store. `spec` is an encoded fleet.v1.JobSpec, immutable from here on.

    One with `child_job_ids` is a group: never in line, never leased. Its children come in the same submit and name it
    in `group_job_id`; they also wait for what the group waits for (`after`, `schedule_ms`).
    """

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
    after: tuple[str, ...] = ()
    """Jobs that must succeed first, at most 64; one that failed or was cancelled cancels this one."""
    group_job_id: str = ""
    child_job_ids: tuple[str, ...] = ()
    exclusive: bool = False
    """Attempts never overlap: a lost one is given back only when its lease has surely ended on its node."""
    inputs: tuple[str, ...] = ()
    """Ids of the uploaded inputs that it names, which stay until it has ended."""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job as the store holds it at one `version`. Times are Unix milliseconds, None where not yet.

    `result` and `error` are encoded fleet.v1.JobResult and fleet.v1.JobError, `attempts` encoded fleet.v1.JobAttempt,
    the latest 20. They are read with the job itself, not in events' snapshots, except `error`. `reason` is the error's
    reason, short. `waits` counts the jobs of `after` that have not succeeded yet (wait_reason DEPENDENCY while any).
    `avoid_node` failed or lost the job and is better not given it before `avoid_until_ms`.

    A group has `children` > 0: queued until the first of them starts, running until the last one ends.
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
    reason: str = ""
    group_job_id: str = ""
    children: int = 0
    exclusive: bool = False
    waits: int = 0
    avoid_node: str = ""
    avoid_until_ms: int = 0
    spec: bytes = b""
    result: bytes = b""
    attempts: tuple[bytes, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Claim:
    """A job given to a node's session: the record just claimed, with its spec."""

    job: JobRecord
    token: str
