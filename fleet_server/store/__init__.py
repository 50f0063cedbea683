"""Everything durable but files: jobs, leases, nodes, events and the index of outputs, in Valkey or Redis.

Each change of more than one key is one Lua script, checked before its first write and safe to repeat with the same
arguments.
"""

from fleet_server.domain.job import Claim, JobRecord, JobState, Lane, NewJob, Pause, PauseKey, Priority, WaitReason
from fleet_server.store.doors import DoorStore
from fleet_server.store.events import EventStore
from fleet_server.store.file_records import (
    InputRow,
    Leaving,
    OutputChanges,
    OutputCounts,
    OutputFailure,
    OutputRow,
)
from fleet_server.store.inputs import InputStore
from fleet_server.store.jobs import JobStore
from fleet_server.store.nodes import NodeStore
from fleet_server.store.outputs import OutputStore
from fleet_server.store.pauses import PauseStore
from fleet_server.store.reaping import ReapErrors, ReapResult, ReapWatch
from fleet_server.store.records import (
    AttemptRow,
    ClaimRequest,
    Completion,
    Durability,
    Held,
    Idempotency,
    LaneView,
    NodeRow,
    Outcome,
    PageKey,
    Report,
    StoredEvent,
    Submitted,
    decode_job,
    decode_node,
)
from fleet_server.store.replies import ReplyStore
from fleet_server.store.store import Store, open_store
from fleet_server.store.swarm import SwarmStore
from fleet_server.store.sync import SyncStore
from fleet_server.store.webhooks import HookClaims, HookRow, WebhookStore, ends_with_callback

__all__ = [
    "AttemptRow",
    "Claim",
    "ClaimRequest",
    "Completion",
    "DoorStore",
    "Durability",
    "EventStore",
    "Held",
    "HookClaims",
    "HookRow",
    "Idempotency",
    "InputRow",
    "InputStore",
    "JobRecord",
    "JobState",
    "JobStore",
    "Lane",
    "LaneView",
    "Leaving",
    "NewJob",
    "NodeRow",
    "NodeStore",
    "Outcome",
    "OutputChanges",
    "OutputCounts",
    "OutputFailure",
    "OutputRow",
    "OutputStore",
    "PageKey",
    "Pause",
    "PauseKey",
    "PauseStore",
    "Priority",
    "ReapErrors",
    "ReapResult",
    "ReapWatch",
    "ReplyStore",
    "Report",
    "Store",
    "StoredEvent",
    "Submitted",
    "SwarmStore",
    "SyncStore",
    "WaitReason",
    "WebhookStore",
    "decode_job",
    "decode_node",
    "ends_with_callback",
    "open_store",
]
