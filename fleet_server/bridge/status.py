"""From a gRPC status, as servicers abort with it, to the server's own error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from fleet_server.domain.errors import REASON_CODES, Code, FleetError, Violation

_DETAILS_KEY: Final = "grpc-status-details-bin"
_DEFAULT_REASON: Final = {
    Code.INVALID_ARGUMENT: "INVALID_FIELD",
    Code.UNIMPLEMENTED: "NOT_IMPLEMENTED",
    Code.DEADLINE_EXCEEDED: "TIMEOUT",
    Code.CANCELLED: "CLIENT_CLOSED",
    Code.INTERNAL: "INTERNAL",
    Code.UNKNOWN: "INTERNAL",
}


def error_from_status(code: grpc.StatusCode, details: str, trailers: Iterable[tuple[str, Any]]) -> FleetError:
    """The error of an abort: reason, violations and retry time from `google.rpc.Status` details where there are any.

    Without details the reason is the common one of the code, else the code's name. An abort with OK is INTERNAL.
    """
    mapped = Code.INTERNAL if code is grpc.StatusCode.OK else Code[code.name]
    reason = _DEFAULT_REASON.get(mapped, mapped.name)
    violations: list[Violation] = []
    retry_after: float | None = None
    for key, value in trailers:
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:
            continue
        for detail in status.details:
            info, bad, retry = (
                error_details_pb2.ErrorInfo(),
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
            )
            if detail.Unpack(info):
                reason = info.reason or reason
            elif detail.Unpack(bad):
                violations.extend(Violation(item.field, item.description) for item in bad.field_violations)
            elif detail.Unpack(retry):
                retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return FleetError(
        reason,
        details or mapped.name.lower().replace("_", " "),
        code=mapped if REASON_CODES.get(reason) is not mapped else None,
        violations=violations,
        retry_after_seconds=retry_after,
    )
