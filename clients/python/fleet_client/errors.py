"""What the client raises: FleetError, and under it one class for each thing that a caller may want to tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

_STATUS_OF_CODE = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 409,
    "OUT_OF_RANGE": 416,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field and what it must be."""

    field: str
    description: str


class FleetError(Exception):
    """Anything that went wrong with a call."""


class SettingError(FleetError):
    """The address or the key of the client is no address or no key; nothing was sent."""


class ConnectionFailedError(FleetError):
    """The server could not be reached, did not answer in time, or the connection broke."""


class WaitTimeoutError(FleetError):
    """A job had not ended in time; it goes on."""


class ApiError(FleetError):
    """The server refused a call. `str` is its `detail`; `reason` is the stable word to decide on.

    `retry_after_seconds` is set where the server said when to come again.
    """

    def __init__(self, status: int, body: Mapping[str, Any], retry_after_seconds: float | None = None) -> None:
        self.status = status
        self.detail = str(body.get("detail") or f"HTTP status {status}")
        self.code = str(body.get("code") or "")
        self.reason = str(body.get("reason") or "")
        self.request_id = str(body.get("request_id") or "")
        self.violations = tuple(
            Violation(str(one.get("field", "")), str(one.get("description", "")))
            for one in body.get("violations") or ()
            if isinstance(one, dict)
        )
        self.retry_after_seconds = retry_after_seconds
        super().__init__(self.detail)


class JobFailedError(FleetError):
    """A job ended without a result: it failed or was cancelled. `job` is the job as it ended, `reason` the word for it:
    that of the job's error, or CANCELLED."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        error = job.get("error") or {}
        self.job = dict(job)
        self.reason = str(error.get("reason") or str(job["status"]).upper())
        super().__init__(error.get("detail") or f"job {job['job_id']} was {job['status']}")


def check(response: httpx.Response) -> httpx.Response:
    """The response, if it is a success; its body must have been read. Raises ApiError."""
    if response.is_success:
        return response
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        body = {"detail": f"HTTP status {response.status_code}: {response.text[:200] or response.reason_phrase}"}
    after = response.headers.get("retry-after", "")
    raise ApiError(response.status_code, body, float(after) if after.isdigit() else None)


def error_of_event(body: Mapping[str, Any]) -> ApiError:
    """The error that ended a stream after its head was sent; its status follows from its code."""
    return ApiError(_STATUS_OF_CODE.get(str(body.get("code")), 500), body)


def unreachable(base_url: str, error: httpx.TransportError) -> ConnectionFailedError:
    """What the person sees of a broken connection."""
    # Whoever has such an error has its library.
    import httpx

    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return ConnectionFailedError(f"{base_url} cannot be reached: {error or 'no answer'}")
    if isinstance(error, httpx.TimeoutException):
        return ConnectionFailedError(f"{base_url} did not answer in time")
    return ConnectionFailedError(f"the connection to {base_url} broke: {error or type(error).__name__}")
