"""A multipart body with one file part is that file, however it is cut; anything else is refused."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, AsyncIterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_server.bridge.multipart import FilePart, is_multipart
from fleet_server.domain.errors import FleetError
from tests.bridge.library import Library, bridge_of, check_error, client_of

TYPE = "multipart/form-data; boundary=XX"


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(bridge_of(Library())) as opened:
        yield opened


def part(data: bytes, disposition: str = 'form-data; name="file"; filename="a.wav"', more: str = "") -> bytes:
    return f"--XX\r\nContent-Disposition: {disposition}\r\n{more}\r\n".encode() + data + b"\r\n"


WHOLE = part(b"--X\r\n-\r\n--XY", more="content-type: audio/wav\r\n") + b"--XX--\r\n"


async def chunks_of(part: FilePart, *pieces: bytes) -> list[bytes]:
    async def body() -> AsyncGenerator[bytes, None]:
        for piece in pieces:
            yield piece

    return [chunk async for chunk in part.chunks(body())]


@given(st.lists(st.integers(0, len(WHOLE)), max_size=6))
async def test_it_may_be_cut_anywhere(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(WHOLE)]
    found = FilePart(TYPE.encode())
    pieces = [WHOLE[a:b] for a, b in itertools.pairwise(places)]
    assert b"".join(await chunks_of(found, *pieces)) == b"--X\r\n-\r\n--XY"
    assert (found.filename, found.content_type) == ("a.wav", b"audio/wav")


@given(st.binary(max_size=300))
async def test_no_body_breaks_it(data: bytes) -> None:
    try:
        await chunks_of(FilePart(TYPE.encode()), data)
    except FleetError as error:
        assert error.reason == "INVALID_FIELD"


async def test_an_empty_file_is_one_empty_chunk() -> None:
    assert await chunks_of(FilePart(TYPE.encode()), part(b"") + b"--XX--") == [b""]


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('form-data; name="f"; filename="a b.png"', "a b.png"),
        ('form-data; name="f"; filename="naïve 東.png"', "naïve 東.png"),
        ('form-data; name="f"; filename=""', ""),
        ('form-data; filename="../../etc/passwd"', "../../etc/passwd"),
    ],
)
async def test_names_come_as_they_are(disposition: str, name: str) -> None:
    found = FilePart(TYPE.encode())
    await chunks_of(found, part(b"x", disposition) + b"--XX--")
    assert found.filename == name


@pytest.mark.parametrize(
    "body",
    [
        part(b"a") + part(b"b") + b"--XX--",
        part(b"a", 'form-data; name="note"') + b"--XX--",
        part(b"a", 'form-data; name="note"') + part(b"b") + b"--XX--",
        b"--XX--",
        b"",
        b"no parts at all",
        part(b"a"),
        part(b"a")[:-4],
        b"--XX\r\nContent-Disposition: form-data; filename=x\r\n",
        b"--XX\r\n" + b"a: b\r\n" * 20 + b"\r\nx\r\n--XX--",
        b"--XX\r\nname: " + b"x" * 9_000 + b"\r\n\r\nx\r\n--XX--",
    ],
)
async def test_what_is_not_one_file_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    reply = await client.post("/v1/upload/x", content=body, headers={"content-type": TYPE})
    check_error(reply, 400, "INVALID_FIELD")
    assert reply.json()["detail"].startswith("body: ")


@pytest.mark.parametrize("header", ["multipart/form-data", "multipart/form-data; boundary=", f"{TYPE}{'x' * 70}"])
async def test_a_boundary_is_needed(client: httpx.AsyncClient, header: str) -> None:
    check_error(
        await client.post("/v1/upload/x", content=WHOLE, headers={"content-type": header}), 400, "INVALID_FIELD"
    )


async def test_the_file_stands_for_the_body(client: httpx.AsyncClient) -> None:
    files = {"file": ("talk.wav", b"x" * 300_000, "audio/wav")}
    reply = (await client.post("/v1/upload/x", files=files)).json()
    assert (reply["note"], reply["content_type"], reply["size_bytes"]) == ("talk.wav", "audio/wav", 300_000)
    reply = (await client.post("/v1/upload/x?note=mine", files=files)).json()
    assert reply["note"] == "mine", "what the query says counts"
    too_large = {"file": ("a", b"x" * 1_000_000)}
    check_error(await client.post("/v1/upload/x", files=too_large), 413, "BODY_TOO_LARGE")
    # A call whose contract does not say so takes the bytes as they came.
    reply_raw = await client.post("/v1/whole", content=WHOLE, headers={"content-type": TYPE})
    assert reply_raw.content == WHOLE


def test_only_this_media_type_counts() -> None:
    assert is_multipart(b"Multipart/Form-Data; boundary=x") and is_multipart(b"multipart/form-data")
    assert not is_multipart(None) and not is_multipart(b"multipart/mixed; boundary=x") and not is_multipart(b"")
