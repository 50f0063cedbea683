"""The log of a callback's tries, as the store keeps it: an encoded Delivery that has attempts alone."""

from __future__ import annotations

from fleet.v1 import types_pb2

from fleet_server.domain.webhook import Answer

KEPT_TRIES = 50


def with_try(log: bytes, answer: Answer, started_ms: int, seconds: float) -> bytes:
    """The log with one try more; the newest 50 are kept."""
    delivery = types_pb2.Delivery.FromString(log)
    attempt = delivery.attempts.add(status_code=answer.status, duration_seconds=round(seconds, 3), detail=answer.detail)
    attempt.time.FromMilliseconds(started_ms)
    del delivery.attempts[:-KEPT_TRIES]
    return delivery.SerializeToString()
