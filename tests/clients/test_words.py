"""Numbers and states as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from fleet_client.cli.words import age, percent, place, plain, rate, seconds, shortened, size, state
from rich.console import Console

from tests.clients.serving import job


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "-"),
        (0, "0 ms"),
        (0.0421, "42 ms"),
        (0.31, "0.3 s"),
        (9.94, "9.9 s"),
        (14.4, "14 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (86_400, "1 d"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations(value: float | None, words: str) -> None:
    assert seconds(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (1_489_220, "1.5 MB"), (34_359_738_368, "34 GB"),
     (2.5e12, "2.5 TB")],
)  # fmt: skip
def test_sizes(value: float | None, words: str) -> None:
    assert size(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(None, "-"), (2.0, "2.0/s"), (0.4, "24.0/min"), (0.001, "3.6/h"), (0, "0.00/h")]
)
def test_rates(value: float | None, words: str) -> None:
    assert rate(value) == words


def test_ages() -> None:
    now = datetime(2026, 11, 22, 10, 0, 30, tzinfo=UTC)
    assert age("2026-11-22T10:00:00.120Z", now) == "30 s"
    assert age("2026-11-22T09:00:30Z", now) == "1 h"
    assert age("2026-11-22T10:00:31Z", now) == "0 s"
    assert age(None, now) == "-"


def test_percent() -> None:
    assert (percent(None), percent(49.6)) == ("-", "50 %")


def test_what_would_steer_a_terminal_is_taken_out() -> None:
    assert plain("a\x1b]0;title\x07b\x9b2Jc\u202ed\ne\tf") == "a]0;titleb2Jcd e f"
    assert plain("schön 🦊 漢字") == "schön 🦊 漢字"


def test_long_texts_are_cut_where_they_show_it() -> None:
    assert shortened("a beautiful sunset", 8) == "a beaut…"
    assert shortened("short", 8) == "short"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"status": "running"}, "running on agx0"),
        ({"status": "running", "node_id": None}, "running"),
        ({"status": "queued", "queue_position": 3}, "queued, place 3"),
        ({"status": "queued"}, "queued"),
        ({"status": "queued", "wait_reason": "PAUSED"}, "waiting: the queue is paused"),
        ({"status": "queued", "wait_reason": "SOMETHING_NEW"}, "waiting: SOMETHING_NEW"),
        ({"status": "failed"}, "failed"),
    ],
)
def test_where_a_job_is(fields: dict[str, object], words: str) -> None:
    assert place(job(**fields)) == words  # type: ignore[arg-type]


def test_a_state_has_its_reason() -> None:
    assert state("queued", "NO_NODE").plain == "queued (NO_NODE)"
    assert state("online", None).plain == "online"
    assert Console().get_style(state("failed").style) == Console().get_style("red")
