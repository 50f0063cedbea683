"""How path, query and body become a request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.bridge.library import Library, bridge_of, check_error, client_of, pb


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
async def client(library: Library) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(bridge_of(library)) as client:
        yield client


def last(library: Library) -> Any:
    return library.requests[-1]


async def test_path_variables_set_fields_also_nested_and_of_text_messages(
    library: Library, client: httpx.AsyncClient
) -> None:
    await client.get("/v1/shelves/top%20one/books/7")
    assert last(library) == pb.GetBookRequest(book_id="7", shelf=pb.Shelf(name="top one"))
    await client.get("/v1/pairs/a/1/b/2:show")
    assert last(library) == pb.NameRequest(name="a/1/b/2")
    await client.get("/v1/times/2026-11-22T10:00:00Z")
    assert last(library).time.ToJsonString() == "2026-11-22T10:00:00Z"
    assert (await client.get("/v1/books/default")).json()["book_id"] == "the default"


async def test_query_parameters_nested_and_repeated(library: Library, client: httpx.AsyncClient) -> None:
    query = "limit=3&tags=a&tags=b+c%26&kinds=novel&kinds=BOOK_KIND_ATLAS&shelf.floor=-1&shelf.name="
    reply = await client.get(f"/v1/books?{query}")
    assert reply.status_code == 200
    kinds = [pb.BOOK_KIND_NOVEL, pb.BOOK_KIND_ATLAS]
    shelf = pb.Shelf(floor=-1)
    assert last(library) == pb.ListBooksRequest(limit=3, tags=["a", "b c&"], kinds=kinds, shelf=shelf)


@pytest.mark.parametrize(
    ("query", "reason", "field"),
    [
        ("nothing=1", "UNKNOWN_FIELD", "nothing"),
        ("shelf.nothing=1", "UNKNOWN_FIELD", "shelf.nothing"),
        ("shelf=1", "UNKNOWN_FIELD", "shelf"),
        ("shelves=1", "UNKNOWN_FIELD", "shelves"),
        ("labels=1", "UNKNOWN_FIELD", "labels"),
        ("limit=x", "INVALID_FIELD", "limit"),
        ("limit=1&limit=2", "INVALID_FIELD", "limit"),
        ("kinds=comic", "INVALID_FIELD", "kinds[0]"),
        ("=1", "UNKNOWN_FIELD", None),
        ("tags=%zz", "INVALID_FIELD", None),
        ("tags=%FF", "INVALID_FIELD", None),
        ("tags=%00", "INVALID_FIELD", None),
        ("&".join(f"tags={index}" for index in range(1001)), "INVALID_FIELD", None),
    ],
)
async def test_a_bad_query_is_400_naming_the_parameter(
    library: Library, client: httpx.AsyncClient, query: str, reason: str, field: str | None
) -> None:
    check_error(await client.get(f"/v1/books?{query}"), 400, reason, field=field)
    assert library.requests == []


async def test_what_the_path_or_the_body_gives_is_no_query_parameter(
    library: Library, client: httpx.AsyncClient
) -> None:
    check_error(await client.get("/v1/books/7?book_id=8"), 400, "UNKNOWN_FIELD", field="book_id")
    reply = await client.patch("/v1/books/7?book.title=x", json={})
    check_error(reply, 400, "UNKNOWN_FIELD", field="book.title")
    assert library.requests == []


async def test_a_whole_body_takes_no_query_parameter_at_all(library: Library, client: httpx.AsyncClient) -> None:
    check_error(await client.post("/v1/books?title=x", json={}), 400, "UNKNOWN_FIELD", field="title")
    check_error(await client.post("/v1/books?x", json={}), 400, "UNKNOWN_FIELD", field="x")
    assert library.requests == []


async def test_a_whole_body_and_the_path_make_one_request(library: Library, client: httpx.AsyncClient) -> None:
    await client.post("/v1/shelves/top/books", json={"title": "t", "shelf": {"floor": 2}, "copies": None})
    assert last(library) == pb.CreateBookRequest(title="t", shelf=pb.Shelf(name="top", floor=2))
    reply = await client.post("/v1/shelves/top/books", json={"shelf": {"name": "bottom"}})
    check_error(reply, 400, "INVALID_FIELD", field="shelf.name")


async def test_a_body_field_takes_the_body_and_the_query_the_rest(library: Library, client: httpx.AsyncClient) -> None:
    await client.patch("/v1/books/7?dry_run=true", json={"title": "t"})
    assert last(library) == pb.UpdateBookRequest(book_id="7", book=pb.Book(title="t"), dry_run=True)
    await client.put("/v1/books/7/tags", json=["a", "b"])
    assert last(library) == pb.TagBookRequest(book_id="7", tags=["a", "b"])
    check_error(await client.patch("/v1/books/7", json={"pages": "1"}), 400, "INVALID_FIELD", field="book.pages")


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/x-www-form-urlencoded"}])
async def test_no_body_counts_as_an_empty_object(
    library: Library, client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    for method, path in (("POST", "/v1/books"), ("PATCH", "/v1/books/7"), ("PUT", "/v1/books/7/tags")):
        assert (await client.request(method, path, headers=headers)).status_code == 200
    assert library.requests[0] == pb.CreateBookRequest()
    assert library.requests[1] == pb.UpdateBookRequest(book_id="7", book=pb.Book())


async def test_a_call_of_query_parameters_needs_neither_body_nor_content_type(
    library: Library, client: httpx.AsyncClient
) -> None:
    assert (await client.post("/v1/books/7:archive?replicas=4&dry_run=true")).status_code == 200
    assert last(library) == pb.ArchiveBookRequest(book_id="7", replicas=4, dry_run=True)
    for empty in ("{}", " { } "):
        reply = await client.post("/v1/books/7:archive", content=empty, headers={"content-type": "application/json"})
        assert reply.status_code == 200


@pytest.mark.parametrize("method", ["POST", "DELETE", "GET"])
@pytest.mark.parametrize(
    ("body", "reason", "field"),
    [
        ('{"replicas": 4}', "UNKNOWN_FIELD", "replicas"),
        ("[]", "INVALID_FIELD", None),
        ("0", "INVALID_FIELD", None),
        ("{", "MALFORMED_JSON", None),
    ],
)
async def test_a_body_where_none_is_taken_is_400(
    client: httpx.AsyncClient, method: str, body: str, reason: str, field: str | None
) -> None:
    path = "/v1/books/7:archive" if method == "POST" else "/v1/books/7"
    reply = await client.request(method, path, content=body, headers={"content-type": "application/json"})
    check_error(reply, 400, reason, field=field)


@pytest.mark.parametrize(
    "media",
    ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"', "application/json;"],
)
async def test_json_is_taken_by_any_of_its_names(client: httpx.AsyncClient, media: str) -> None:
    reply = await client.post("/v1/books", content=b'{"title": "t"}', headers={"content-type": media})
    assert reply.json()["title"] == "t"


@pytest.mark.parametrize(
    "media",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=latin-1",
        "application/jsonx",
    ],
)
@pytest.mark.parametrize("path", ["/v1/books", "/v1/books/7:archive"])
async def test_any_other_media_type_is_415(client: httpx.AsyncClient, path: str, media: str | None) -> None:
    headers = {} if media is None else {"content-type": media}
    check_error(await client.post(path, content=b"{}", headers=headers), 415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize(
    ("body", "reason", "field"),
    [
        (b'{"title": 1}', "INVALID_FIELD", "title"),
        (b'{"nothing": 1}', "UNKNOWN_FIELD", "nothing"),
        (b'{"shelf": {"nothing": 1}}', "UNKNOWN_FIELD", "shelf.nothing"),
        (b'{"title": "a", "title": "b"}', "MALFORMED_JSON", None),
        (b'{"copies": NaN}', "MALFORMED_JSON", None),
        (b"{", "MALFORMED_JSON", None),
        (b"\xff", "MALFORMED_JSON", None),
        (b"[]", "INVALID_FIELD", None),
        (b"null", "INVALID_FIELD", None),
    ],
)
async def test_a_bad_body_is_400_naming_the_field(
    library: Library, client: httpx.AsyncClient, body: bytes, reason: str, field: str | None
) -> None:
    reply = await client.post("/v1/books", content=body, headers={"content-type": "application/json"})
    parsed = check_error(reply, 400, reason)
    assert library.requests == []
    if field is not None:
        assert parsed["violations"][0]["field"] == field


async def test_a_raw_body_is_taken_as_it_is_with_its_media_type(library: Library, client: httpx.AsyncClient) -> None:
    await client.post("/v1/raw/x?note=n", content=b"\x00\xff", headers={"content-type": "audio/wav"})
    assert last(library).file.data == b"\x00\xff"
    assert (last(library).file.content_type, last(library).name, last(library).note) == ("audio/wav", "x", "n")
    reply = await client.post("/v1/whole", content=b"{", headers={"content-type": "text/x"})
    assert (reply.content, reply.headers["content-type"]) == (b"{", "text/x")
    assert (await client.post("/v1/raw/x")).status_code == 200
    assert last(library).file.data == b""
    check_error(await client.post("/v1/raw/x?file.data=n"), 400, "UNKNOWN_FIELD", field="file.data")


async def test_an_upload_is_a_stream_whose_first_message_has_path_and_query(client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b"x" * 1000

    reply = await client.post("/v1/upload/x?note=n", content=chunks(), headers={"content-type": "audio/wav"})
    body = reply.json()
    assert body["messages"] >= 4
    del body["messages"]
    assert body == {"name": "x", "note": "n", "content_type": "audio/wav", "size_bytes": 4000}
    check_error(await client.post("/v1/upload/x?nothing=n"), 400, "UNKNOWN_FIELD", field="nothing")
    too_large = await client.post("/v1/upload/x", content=b"x" * 1_000_001)
    check_error(too_large, 413, "BODY_TOO_LARGE")
