"""Server-sent events as they come off the wire."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from fleet_client import ApiError
from fleet_client.events import EventReader
from hypothesis import given
from hypothesis import strategies as st

WIRE = (
    b": hello\n\n"
    b'id: 1-0\ndata: {"id": "1-0", "text": "first"}\n\n'
    b":\n\n"
    b'data: {"text":\ndata:  "two lines"}\n\n'
    b'data:{"text": "no space"}\r\n\r\n'
    b'data: {"text":\r\ndata: "two again"}\r\n\r\n'
    b'retry: 100\ndata: {"text": "carriage returns"}\r\r'
)
TEXTS = ["first", "two lines", "no space", "two again", "carriage returns"]


def read(*chunks: bytes) -> list[dict[str, Any]]:
    reader = EventReader()
    return [event for chunk in (*chunks, b"\n") for event in reader.feed(chunk)]


@given(st.lists(st.integers(0, len(WIRE)), max_size=8))
def test_events_are_the_same_wherever_the_chunks_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(WIRE)]
    chunks = [WIRE[start:end] for start, end in itertools.pairwise(edges)]
    assert [event["text"] for event in read(*chunks)] == TEXTS


def test_line_separators_of_unicode_end_no_line() -> None:
    text = "a\u2028b\x85c\x0bd\u2029e"
    data = json.dumps({"text": text}, ensure_ascii=False).encode()
    assert read(b"data: " + data + b"\n\n") == [{"text": text}]


def test_an_unfinished_event_is_none() -> None:
    assert list(EventReader().feed(b'data: {"text": "half"}\n')) == []


@pytest.mark.parametrize(
    ("code", "status"), [("UNAVAILABLE", 503), ("DEADLINE_EXCEEDED", 504), ("NOT_FOUND", 404), ("WHATEVER", 500)]
)
def test_an_error_event_is_raised(code: str, status: int) -> None:
    error = {"detail": "gone", "code": code, "reason": "SOME_REASON", "request_id": "r1", "violations": []}
    with pytest.raises(ApiError, match="gone") as raised:
        read(b"event: error\ndata: " + json.dumps(error).encode() + b"\n\n")
    assert (raised.value.status, raised.value.reason, raised.value.request_id) == (status, "SOME_REASON", "r1")


def test_the_kind_of_an_event_ends_with_it() -> None:
    assert read(b'event: error\n\ndata: {"text": "no error"}\n\n') == [{"text": "no error"}]


def test_a_carriage_return_at_the_end_of_a_chunk_may_be_half_of_a_line_end() -> None:
    assert read(b'data: {"text":\r', b"\ndata: 1}\r", b"\n\r", b"\n") == [{"text": 1}]
