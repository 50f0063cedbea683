"""What every refusal looks like."""

from __future__ import annotations

from typing import Any

import httpx


def refused(response: httpx.Response, status: int, reason: str, field: str | None = None) -> dict[str, Any]:
    """The error body, of the one shape."""
    body: dict[str, Any] = response.json()
    assert response.status_code == status, body
    assert set(body) == {"detail", "code", "reason", "request_id", "violations"}
    assert body["reason"] == reason, body
    assert body["request_id"] == response.headers["x-request-id"]
    if field is not None:
        assert body["detail"].startswith(f"{field}: "), body["detail"]
    return body
