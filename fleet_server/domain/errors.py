"""The one error of the server: a gRPC code, a stable reason and a sentence for people.

`FleetError` is raised everywhere; rpc/ turns it into `google.rpc.Status`, bridge/ into an HTTP reply. The reasons and
their codes are those of the REST contract.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


class Code(enum.Enum):
    """gRPC status codes that we answer with, by their canonical names."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_REASONS: dict[Code, str] = {
    Code.INVALID_ARGUMENT: "INVALID_FIELD UNKNOWN_FIELD MALFORMED_JSON INVALID_PATH INVALID_PAGE_TOKEN "
    "CALLBACK_FORBIDDEN METHOD_NOT_ALLOWED UNSUPPORTED_MEDIA_TYPE",
    Code.UNAUTHENTICATED: "API_KEY_MISSING API_KEY_INVALID",
    Code.PERMISSION_DENIED: "SCOPE_MISSING HOST_FORBIDDEN ORIGIN_FORBIDDEN MOUNT_FORBIDDEN PRIVILEGE_FORBIDDEN",
    Code.NOT_FOUND: "ROUTE_NOT_FOUND JOB_NOT_FOUND NODE_NOT_FOUND CONTAINER_NOT_FOUND IMAGE_NOT_FOUND "
    "SERVICE_NOT_FOUND OUTPUT_NOT_FOUND INPUT_NOT_FOUND MODEL_NOT_FOUND LORA_NOT_FOUND DELIVERY_NOT_FOUND "
    "PAUSE_NOT_FOUND",
    Code.FAILED_PRECONDITION: "JOB_ENDED JOB_NOT_FAILED IDEMPOTENCY_KEY_REUSED NAME_IN_USE PORT_IN_USE "
    "CONTAINER_NOT_RUNNING NODE_ONLINE SERVICE_NOT_REPLICATED NO_PREVIOUS_SPEC NO_RECORD",
    Code.RESOURCE_EXHAUSTED: "HEADERS_TOO_LARGE BODY_TOO_LARGE RATE_LIMITED TOO_MANY_CONNECTIONS",
    Code.OUT_OF_RANGE: "RANGE_NOT_SATISFIABLE",
    Code.INTERNAL: "INTERNAL ENGINE_FAILED OUT_OF_MEMORY",
    Code.UNKNOWN: "OUTCOME_UNKNOWN",
    Code.CANCELLED: "CLIENT_CLOSED",
    Code.UNIMPLEMENTED: "NOT_IMPLEMENTED",
    Code.UNAVAILABLE: "STORE_UNAVAILABLE SHUTTING_DOWN QUEUE_FULL NO_NODE NODE_OFFLINE S3_UNAVAILABLE DISK_FULL "
    "DOCKER_UNAVAILABLE GPU_UNAVAILABLE REGISTRY_UNAVAILABLE NOT_SWARM_MANAGER",
    Code.DEADLINE_EXCEEDED: "TIMEOUT REQUEST_TIMEOUT",
}

REASON_CODES: Mapping[str, Code] = MappingProxyType(
    {reason: code for code, reasons in _REASONS.items() for reason in reasons.split()}
)
"""Every reason that a call can answer with, and its code."""

JOB_REASON_CODES: Mapping[str, Code] = MappingProxyType(
    {
        "QUEUE_TTL_EXPIRED": Code.DEADLINE_EXCEEDED,
        "NODE_LOST": Code.UNAVAILABLE,
        "POISON": Code.INTERNAL,
        "EXIT_NONZERO": Code.UNKNOWN,
    }
)
"""Reasons that only a failed job's `error` has, beside those of calls."""

RETRY_AFTER_SECONDS = 2.0
"""What UNAVAILABLE and rate-limit replies advise where nothing better is known."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field: its path as the caller writes it (`jobs[3].payload.steps`) and what it must be."""

    field: str
    description: str


class FleetError(Exception):
    """A refusal with a stable reason.

    `detail` begins with the field's path where one is at fault and says what to do next. `code` follows from the reason
    unless given (an unknown reason needs one). `retry_after_seconds` is set on every UNAVAILABLE and RATE_LIMITED
    error.
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        code: Code | None = None,
        violations: Sequence[Violation] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.code = code if code is not None else REASON_CODES[reason]
        self.violations = tuple(violations)
        if retry_after_seconds is None and (self.code is Code.UNAVAILABLE or reason == "RATE_LIMITED"):
            retry_after_seconds = RETRY_AFTER_SECONDS
        self.retry_after_seconds = retry_after_seconds

    def __repr__(self) -> str:
        return f"FleetError({self.reason}, {self.detail!r})"


class RangeNotSatisfiableError(FleetError):
    """RANGE_NOT_SATISFIABLE of a file with `size_bytes`."""

    def __init__(self, detail: str, size_bytes: int) -> None:
        super().__init__("RANGE_NOT_SATISFIABLE", detail)
        self.size_bytes = size_bytes


def invalid_field(field: str, description: str, got: object = None) -> FleetError:
    """An INVALID_FIELD error for one field; `got` is shown where given."""
    seen = "" if got is None else f"; got {got}"
    return FleetError("INVALID_FIELD", f"{field}: {description}{seen}", violations=[Violation(field, description)])
