"""FleetError as google.rpc.Status, in the trailers where gRPC clients look for it."""

from __future__ import annotations

import math

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from fleet_server.domain.errors import FleetError

ERROR_DOMAIN = "fleet.v1"
DETAILS_KEY = "grpc-status-details-bin"
_MAX_DETAIL = 2_000
_MAX_VIOLATIONS = 20
_CODES = {code.name: code for code in grpc.StatusCode}


def grpc_code(error: FleetError) -> grpc.StatusCode:
    """The gRPC code of an error."""
    return _CODES[error.code.name]


def rich_status(error: FleetError, request_id: str) -> status_pb2.Status:
    """ErrorInfo, the bad fields and when to try again. Long texts are cut: trailers have a size limit."""
    status = status_pb2.Status(code=error.code.value, message=error.detail[:_MAX_DETAIL])
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata={"request_id": request_id})
    status.details.add().Pack(info)
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations[:_MAX_VIOLATIONS]:
            bad.field_violations.add(field=violation.field[:200], description=violation.description[:200])
        status.details.add().Pack(bad)
    if error.retry_after_seconds is not None:
        whole = math.floor(error.retry_after_seconds)
        nanos = round((error.retry_after_seconds - whole) * 1e9)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=whole, nanos=nanos)))
    return status
