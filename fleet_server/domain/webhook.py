"""One callback of one end of a job: its ids, and when it is tried again. Pure."""

from __future__ import annotations

import enum
import hashlib
import re
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus

SCHEDULE_SECONDS = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""Waits after the first failure, the second and so on; after one more the callback is given up."""

_GENERATION_BITS = 48


class DeliveryState(enum.StrEnum):
    """Where a callback stands; the last two are ends, until somebody asks for it again."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RetryPlan:
    """`waits_ms` after each failure; `jitter` spreads each by that share, up alone. A receiver's Retry-After counts up
    to `longest_ms`.
    """

    waits_ms: tuple[int, ...] = tuple(int(seconds * 1000) for seconds in SCHEDULE_SECONDS)
    jitter: float = 0.1
    longest_ms: int = 86_400_000


@dataclass(frozen=True, slots=True)
class Answer:
    """What a try came to. `status` is None where no HTTP answer came; `retry_after_ms` is what the receiver asked for.

    `detail` is for people: it holds nothing that the receiver chose, and no address.
    """

    status: int | None
    detail: str
    retry_after_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from a try; `wait_ms` is set exactly while pending."""

    state: DeliveryState
    wait_ms: int | None = None


def judge(answer: Answer, tries: int, plan: RetryPlan, draw: float) -> Verdict:
    """What follows from the answer to try number `tries` (from 1); `draw` is random, 0 to 1.

    Any 2xx is a delivery, 410 the end; every other answer, redirects included, and silence are tried again.
    """
    if answer.status is not None and 200 <= answer.status < 300:
        return Verdict(DeliveryState.DELIVERED)
    if answer.status == HTTPStatus.GONE or tries > len(plan.waits_ms):
        return Verdict(DeliveryState.FAILED)
    wait = int(plan.waits_ms[tries - 1] * (1 + plan.jitter * draw))
    asked = answer.retry_after_ms
    if asked is not None and answer.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        wait = max(wait, min(asked, plan.longest_ms))
    return Verdict(DeliveryState.PENDING, wait)


def retry_after_ms(value: str, now_ms: int) -> int | None:
    """A Retry-After header, in seconds or as a date, as milliseconds from now; None where it says nothing usable."""
    text = value.strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text) * 1000
    try:
        at = parsedate_to_datetime(text)
        # "-0000" makes a naive time; HTTP dates are GMT.
        seconds = (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError, IndexError):
        return None
    return max(0, int(seconds * 1000) - now_ms)


def status_line(status: int) -> str:
    """The status with its standard words, never the receiver's."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def webhook_id(job_id: str, generation: int) -> str:
    """The id that a receiver tells repetitions by: the same at every try."""
    return f"{job_id}.{generation}"


def split_webhook_id(value: str) -> tuple[str, int]:
    """The job and the generation of a webhook id."""
    job_id, _, generation = value.rpartition(".")
    return job_id, int(generation)


def delivery_id(job_id: str, generation: int, created_ms: int) -> str:
    """The id of a callback, shaped as a UUID of version 7 and always the same; its last digits are the generation."""
    mark = int.from_bytes(hashlib.sha256(f"{job_id}.{generation}".encode()).digest()[:4])
    value = created_ms << 80 | 0x7 << 76 | (mark >> 20) << 64 | 0b10 << 62 | (mark & 0x3FFF) << 48
    digits = f"{value | generation:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def generation_of(delivery: str) -> int | None:
    """The generation inside a delivery id; None for what cannot be one. Compare the whole id before believing it."""
    if not re.fullmatch(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", delivery):
        return None
    return int(delivery[24:], 16) or None
