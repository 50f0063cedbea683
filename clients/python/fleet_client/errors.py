"""What the client raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field and what it must be."""

    field: str
    description: str


class FleetError(Exception):
    """Anything that went wrong with a call."""


class ConnectionFailedError(FleetError):
    """The server could not be reached, or the connection broke."""


class ApiError(FleetError):
    """The server refused a call. `str` is its `detail`; `reason` is the stable word to decide on."""

    def __init__(self, status: int, body: dict[str, Any], retry_after_seconds: float | None) -> None:
        self.status = status
        self.detail = str(body.get("detail", f"HTTP status {status}"))
        self.code = str(body.get("code", ""))
        self.reason = str(body.get("reason", ""))
        self.request_id = str(body.get("request_id", ""))
        self.violations = tuple(Violation(v["field"], v["description"]) for v in body.get("violations", ()))
        self.retry_after_seconds = retry_after_seconds
        super().__init__(self.detail)


class JobFailedError(FleetError):
    """A job ended without a result: it failed or was cancelled. `job` is the job as it ended."""

    def __init__(self, job: dict[str, Any]) -> None:
        error = job.get("error") or {}
        self.job = job
        self.reason = str(error.get("reason", job["status"].upper()))
        super().__init__(error.get("detail") or f"job {job['job_id']} was {job['status']}")


def check(response: httpx.Response) -> httpx.Response:
    """The response, if it is a success; its body must have been read. Raises ApiError."""
    if response.is_success:
        return response
    try:
        body = response.json()
    except ValueError:
        body = {"detail": response.text[:500] or response.reason_phrase}
    after = response.headers.get("retry-after", "")
    raise ApiError(response.status_code, body, float(after) if after.isdigit() else None)
