"""Frames over a blocking and an asyncio stream."""

from __future__ import annotations

import asyncio
import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_agent import frames

MESSAGES = st.dictionaries(
    st.text(max_size=20), st.none() | st.integers(-(2**53), 2**53) | st.text(max_size=200) | st.booleans(), max_size=6
)


async def received(data: bytes) -> list[tuple[frames.Message, bytes]]:
    stream = asyncio.StreamReader()
    stream.feed_data(data)
    stream.feed_eof()
    found = []
    while (frame := await frames.receive(stream)) is not None:
        found.append(frame)
    return found


@given(st.lists(st.tuples(MESSAGES, st.binary(max_size=300)), max_size=4))
def test_what_goes_in_comes_out(sent: list[tuple[frames.Message, bytes]]) -> None:
    data = b"".join(frames.encode(message, blob) for message, blob in sent)
    stream = io.BytesIO(data)
    read = []
    while (frame := frames.read(stream)) is not None:
        read.append(frame)
    assert read == sent
    assert asyncio.run(received(data)) == sent


@given(st.integers(0, 60))
def test_a_frame_cut_short_is_the_end(length: int) -> None:
    whole = frames.encode({"event": "progress", "step": 1}, b"blob of a picture")
    cut = whole[: min(length, len(whole) - 1)]
    assert frames.read(io.BytesIO(cut)) is None
    assert asyncio.run(received(cut)) == []
    assert asyncio.run(received(whole + cut)) == [({"event": "progress", "step": 1}, b"blob of a picture")]


async def test_the_largest_text_passes_and_a_larger_one_is_refused_by_the_writer() -> None:
    message = {"text": "x" * (frames.MAX_JSON_BYTES - len('{"text":""}'))}
    assert await received(frames.encode(message)) == [(message, b"")]
    with pytest.raises(frames.BadFrameError, match="at most 16,777,216"):
        frames.encode({"text": message["text"] + "x"})
    assert len(frames.encode({}, bytes(frames.MAX_BLOB_BYTES))) > frames.MAX_BLOB_BYTES
    with pytest.raises(frames.BadFrameError, match="1,048,577 bytes"):
        frames.encode({}, bytes(frames.MAX_BLOB_BYTES + 1))


@pytest.mark.parametrize("value", ["\udc80", {1: 2}, 2**70, object()], ids=["surrogate", "key", "integer", "object"])
def test_what_json_cannot_say_is_refused_by_the_writer(value: object) -> None:
    with pytest.raises(frames.BadFrameError, match="JSON"):
        frames.encode({"value": value})


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">II", frames.MAX_JSON_BYTES + 1, 0),
        struct.pack(">II", 2, frames.MAX_BLOB_BYTES + 1) + b"{}",
        struct.pack(">II", 4, 0) + b"oops",
        struct.pack(">II", 2, 0) + b"[]",
        b"Traceback (most recent call last)",
    ],
    ids=["json", "blob", "no json", "no object", "no frame"],
)
async def test_nonsense_is_refused_by_the_reader(data: bytes) -> None:
    with pytest.raises(frames.BadFrameError):
        frames.read(io.BytesIO(data))
    with pytest.raises(frames.BadFrameError):
        await received(data)


def test_frames_are_taken_out_of_bytes_however_they_come() -> None:
    sent: list[tuple[frames.Message, bytes]] = [
        ({"event": "started"}, b""),
        ({"event": "preview", "text": "x" * 300}, b"\0picture"),
        ({"n": 1}, b""),
    ]
    stream = b"".join(frames.encode(*frame) for frame in sent)
    for size in (1, 7, 64, len(stream)):
        parts, found = frames.Parts(), []
        for at in range(0, len(stream), size):
            parts.feed(stream[at : at + size])
            while (frame := parts.next()) is not None:
                found.append(frame)
        assert found == sent
    parts.feed(b"\xff" * 8)
    with pytest.raises(frames.BadFrameError):
        parts.next()
