"""Numbers and states as people read them. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from fleet_client.calls import Json

_COLOURS = {
    "succeeded": "green",
    "online": "green",
    "ok": "green",
    "running": "cyan",
    "queued": "yellow",
    "degraded": "yellow",
    "disconnected": "yellow",
    "failed": "red",
    "down": "red",
    "unavailable": "red",
    "cancelled": "bright_black",
}


def plain(text: object) -> str:
    """Text of others, safe for a terminal: without control characters, which could move its cursor or retitle it."""
    return "".join(
        " " if letter in "\t\n\r" else letter for letter in str(text) if letter.isprintable() or letter in "\t\n\r"
    )


def shortened(text: object, width: int) -> str:
    """At most `width` characters of it."""
    whole = plain(text)
    return whole if len(whole) <= width else whole[: width - 1] + "…"


def state(word: str, more: str | None = None) -> Text:
    """A status in its colour, with a reason behind it."""
    text = Text(plain(word), style=_COLOURS.get(word, ""))
    return text.append(f" ({plain(more)})", style="not bold") if more else text


def seconds(value: float | None) -> str:
    """A duration: 40 ms, 0.2 s, 14 s, 3 min 20 s, 2 h 5 min, 6 d 1 h."""
    if value is None:
        return "-"
    if value < 0.1:
        return f"{value * 1000:.0f} ms"
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s".removesuffix(" 0 s")
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min".removesuffix(" 0 min")
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h".removesuffix(" 0 h")


def age(time: str | None, now: datetime | None = None) -> str:
    """How long ago an RFC 3339 time was, in whole seconds at least."""
    if time is None:
        return "-"
    passed = round(((now or datetime.now(UTC)) - datetime.fromisoformat(time)).total_seconds())
    return f"{max(0, passed)} s" if passed < 60 else seconds(passed)


def size(value: float | None) -> str:
    """Bytes: 412 B, 1.5 MB, 64 GB."""
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def percent(value: float | None) -> str:
    """43 %."""
    return "-" if value is None else f"{value:.0f} %"


def rate(value: float | None) -> str:
    """Events a second, a minute or an hour, whichever is easy to read."""
    if value is None:
        return "-"
    for factor, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if value * factor >= 1:
            return f"{value * factor:.1f}/{unit}"
    return f"{value * 3600:.2f}/h"


def place(job: Json) -> str:
    """Where a job is on its way."""
    if job["status"] == "running":
        # A group has no node of its own: its images run where they run.
        return f"running on {plain(job['node_id'])}" if job["node_id"] else "running"
    if job["status"] != "queued":
        return str(job["status"])
    if job["wait_reason"]:
        return f"waiting: {_WAITS.get(job['wait_reason'], plain(job['wait_reason']))}"
    return f"queued, place {job['queue_position']}" if job["queue_position"] else "queued"


_WAITS = {
    "DEPENDENCY": "for other jobs",
    "SCHEDULED": "for its time",
    "BACKOFF": "a moment before the next attempt",
    "PAUSED": "the queue is paused",
    "NO_NODE": "no node could run it (see `fleet nodes list`)",
}
