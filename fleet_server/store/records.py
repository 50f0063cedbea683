"""What the store hands out and takes in, and how a job's hash is spelled.

Hash fields are two letters, since a million jobs carry them; `FIELDS` is the one table of their names. A field that
has its default is not stored.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, make_dataclass
from dataclasses import fields as fields_of
from functools import lru_cache
from typing import Any

from fleet_server.domain.job import Claim, JobRecord, JobState, Lane, Priority, WaitReason
from fleet_server.store.file_records import OutputRow
from fleet_server.store.node_rows import NodeRow, decode_node

__all__ = [
    "AttemptRow",
    "Claim",
    "ClaimRequest",
    "Completion",
    "Durability",
    "Held",
    "Idempotency",
    "LaneView",
    "NodeRow",
    "Outcome",
    "PageKey",
    "Report",
    "StoredEvent",
    "Submitted",
    "decode_job",
    "decode_node",
]


@dataclass(frozen=True, slots=True)
class Idempotency:
    """Makes a submit or retry repeatable for 24 hours: `key` of `owner` for `method`; `fingerprint` is a hash of the
    content.
    """

    owner: str
    method: str
    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Submitted:
    """The jobs of one submit, in order; `replayed` if an earlier call with the same idempotency key made them.

    `positions` are 1 for the next in its cluster, None for a job not in line.
    """

    job_ids: tuple[str, ...]
    positions: tuple[int | None, ...]
    replayed: bool


@dataclass(frozen=True, slots=True)
class PageKey:
    """The last row of a page: the next page holds what is older than (`time_ms`, `member`). Stable under inserts."""

    time_ms: int
    member: str


@dataclass(frozen=True, slots=True)
class LaneView:
    """A lane as dispatch sees it. Times are Unix ms; `head_effective_ms` is the best head's enqueue time less its
    boost.

    `head_*` are None where nothing waits (lanes with running jobs alone, listed only on request). A mixed lane has
    `lane.mixed_cluster()` style id ("mixed:<cluster>") and no job type: look at its jobs with `JobStore.peek` and
    claim by id.

    What is paused does not count for `head_*` while something else may go; `paused`: nothing of the lane may go now (of
    a mixed lane only pauses without a type are judged). `head_owner` is whose turn it is at the head's priority and
    `head_owner_lag` how many jobs more than the least served owner in line in the cluster they were given, see
    `JobStore.claim`; 0 where nobody else waits. `high_waiting`: a `high` job is in line, be it the head or not.
    """

    lane: Lane
    waiting: int
    running: int
    head_priority: Priority | None
    head_effective_ms: int | None
    oldest_enqueued_ms: int | None
    paused: bool = False
    head_owner: str = ""
    head_owner_lag: float = 0.0
    high_waiting: bool = False

    @property
    def mixed(self) -> bool:
        """Whether this is a cluster's overflow lane, whose jobs differ in what they need."""
        return self.lane.lane_id.startswith(MIXED_PREFIX)


MIXED_PREFIX = "mixed:"
"""Begins the id of a cluster's overflow lane, used once 512 lanes exist."""


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """One wish for work. `token` is 128 random bits in hex, minted by the caller: the same token gives the same claim.

    `job_id` picks that very job of the lane (for mixed lanes); "" takes the lane's next. `avoid` passes by, among the
    first 8 in line, jobs that this node failed or lost less than 30 s ago: for when another node could run them.
    """

    lane_id: str
    node_id: str
    session: str
    token: str
    lease_ms: int
    job_id: str = ""
    avoid: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """What a heartbeat says of one attempt; None leaves the stored value."""

    job_id: str
    token: str
    progress: int | None = None
    step: int | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Success of one attempt, see `JobStore.complete`. `result` is an encoded fleet.v1.JobResult."""

    job_id: str
    token: str
    result: bytes
    outputs: Sequence[OutputRow] = ()
    load_ms: int | None = None
    run_ms: int | None = None
    upload_ms: int | None = None


class Outcome(enum.StrEnum):
    """What a report from an agent came to; each of the three ends the agent's spool entry."""

    OK = "ok"
    ALREADY = "already"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Completion:
    """The outcome of complete or fail, and the job as it is now (None: unknown or purged). `outcome` compares equal
    to a str.
    """

    outcome: Outcome
    fields: Sequence[bytes] | bytes | None = None

    @property
    def record(self) -> JobRecord | None:
        """Read when it is asked for."""
        return None if self.fields is None else decode_job(pairs(self.fields))


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """An attempt that the store itself ended (lease lost, overdue): what a fleet.v1.JobAttempt says of it."""

    generation: int
    attempt: int
    node_id: str
    started_ms: int | None
    ended_ms: int
    error: bytes


AttemptEncoder = Callable[[AttemptRow], bytes]


SEPARATOR = b"\x1e"
"""Between the fields and values that a script joined."""
_JOINED = 6


class StoredEvent:
    """One entry of the event stream. `type` is job_update, job_complete, node_update..., or `gap`: events were lost.

    A gap has fields `since` (the last id that was delivered) and `oldest_id`; read on from there with
    `EventStore.read`. What most readers pass by is read when it is asked for.
    """

    __slots__ = ("_fields", "_flat", "_job", "_raw", "id", "time_ms", "type")

    def __init__(self, event_id: str, time_ms: int, kind: str, fields: Mapping[str, bytes] | None = None) -> None:
        self.id = event_id
        self.time_ms = time_ms
        self.type = kind
        self._flat: Sequence[bytes] = ()
        self._raw: Mapping[bytes, bytes] | None = None
        self._fields = fields
        self._job: JobRecord | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StoredEvent):
            return NotImplemented
        return (self.id, self.time_ms, self.type, self.fields) == (other.id, other.time_ms, other.type, other.fields)

    def __hash__(self) -> int:
        return hash(self.id)

    @classmethod
    def of(cls, event_id: bytes, flat: Sequence[bytes]) -> StoredEvent:
        """An entry of the stream: it begins with its type and time."""
        event = cls(event_id.decode(), int(flat[3]), flat[1].decode())
        event._flat = flat
        return event

    @property
    def raw(self) -> Mapping[bytes, bytes]:
        """The fields of an entry as the store has them; of a job's they may be joined (see lib/jobs.lua)."""
        if self._raw is None:
            flat = self._flat
            rest = flat[5].split(SEPARATOR) if len(flat) == _JOINED and flat[4] == b"_j" else flat[4:]
            self._raw = dict(zip(rest[::2], rest[1::2], strict=True))
        return self._raw

    @property
    def fields(self) -> Mapping[str, bytes]:
        if self._fields is None:
            self._fields = {name.decode(): value for name, value in self.raw.items()}
        return self._fields

    @property
    def job(self) -> JobRecord:
        """The job of a job_update or job_complete, as it was."""
        if self._job is None:
            self._job = decode_job(self.fields)
        return self._job


@dataclass(frozen=True, slots=True)
class Durability:
    """What the store promises: `mode` is "fsync" or "best-effort", `detail` says why and what to set.

    `run_id` changes when the store restarted or failed over (no reaping for 60 s then).
    """

    mode: str
    detail: str
    run_id: str
    uptime_seconds: int
    server: str


def _text(value: bytes) -> str:
    return value.decode()


FIELDS: Mapping[str, tuple[str, Callable[[bytes], Any]]] = {
    "mo": ("model", _text),
    "ow": ("owner", _text),
    "st": ("state", {state.value.encode(): state for state in JobState}.__getitem__),
    "wr": ("wait_reason", {reason.value.encode(): reason for reason in WaitReason}.__getitem__),
    "ge": ("generation", int),
    "ve": ("version", int),
    "at": ("attempt", int),
    "lo": ("losses", int),
    "en": ("enqueued_ms", int),
    "up": ("updated_ms", int),
    "sa": ("started_ms", int),
    "ee": ("ended_ms", int),
    "tk": ("token", _text),
    "lt": ("last_token", _text),
    "no": ("node_id", _text),
    "se": ("session", _text),
    "pg": ("progress", int),
    "sp": ("step", int),
    "ss": ("steps", int),
    "lm": ("load_ms", int),
    "rm": ("run_ms", int),
    "um": ("upload_ms", int),
    "er": ("error", bytes),
    "rs": ("reason", _text),
    "gj": ("group_job_id", _text),
    "kn": ("children", int),
    "xc": ("exclusive", lambda v: v == b"1"),
    "wa": ("waits", int),
    "av": ("avoid_node", _text),
    "au": ("avoid_until_ms", int),
}
"""Hash field -> JobRecord attribute and how it is read. `ki` and `li` hold what hardly ever changes, see `_kind`.
Further fields, of the scripts alone, are in lib/jobs.lua.
"""


_DEFAULTS: Mapping[str, Any] = {"wait_reason": WaitReason.NONE, "model": "", "owner": "", "attempt": 0, "losses": 0}


@lru_cache(maxsize=1_024)
def _kind(kind: bytes) -> Mapping[str, Any]:
    job_type, priority, cluster, lane_id = kind.decode().split("\0", 3)
    known = {"job_type": job_type, "priority": Priority(priority), "cluster": cluster, "lane_id": lane_id}
    return {**_DEFAULTS, **known}


# A frozen dataclass takes four times as long to make, and records are what a busy server makes most of. A draft has the
# very same slots, and becomes a record when they are filled.
_Draft: Any = make_dataclass(
    "_Draft",
    [
        (one.name, one.type, field(default=one.default)) if one.default is not MISSING else (one.name, one.type)
        for one in fields_of(JobRecord)
    ],
    slots=True,
    eq=False,
)


def pairs(flat: Sequence[bytes] | bytes) -> dict[str, bytes]:
    """A flat field, value, ... reply as a dict, also one whose parts come joined."""
    if isinstance(flat, bytes):
        flat = flat.split(SEPARATOR)
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}


def decode_job(
    fields: Mapping[str, bytes],
    *,
    job_id: str = "",
    spec: bytes = b"",
    result: bytes = b"",
    attempts: tuple[bytes, ...] = (),
) -> JobRecord:
    """The record of a job event's fields (or of a job's hash, with `job_id`). An event has no spec, result and
    attempts.
    """
    values = dict(_kind(fields["ki"]))
    max_retries, timeout, queue_ttl, created, schedule, _ = fields["li"].split(b"\0", 5)
    for short, value in fields.items():
        known = FIELDS.get(short)
        if known is not None:
            values[known[0]] = known[1](value)
    record: JobRecord = _Draft(
        job_id=job_id or fields["id"].decode(),
        spec=spec,
        result=result,
        attempts=attempts,
        max_retries=int(max_retries),
        timeout_ms=int(timeout),
        queue_ttl_ms=int(queue_ttl),
        created_ms=int(created),
        schedule_ms=int(schedule) if schedule else None,
        **values,
    )
    record.__class__ = JobRecord
    return record
