"""Unary calls: replies, headers, errors, request ids, deadlines, special routes."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from google.api import httpbody_pb2
from google.protobuf.message import Message

from fleet_server.bridge import Bridge, BridgeSettings, RouteError, SpecialRoute
from fleet_server.domain.errors import REASON_CODES, Code, FleetError, Violation
from tests.bridge.library import SERVICE, Library, abort_with_details, bridge_of, check_error, client_of, pb
from tests.bridge.raw_http import http_reply


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
async def client(library: Library) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(bridge_of(library)) as client:
        yield client


def failing(error: Exception) -> Any:
    async def fail(request: Any, context: Any) -> Any:
        raise error

    return fail


async def test_a_reply_is_json_with_every_field(client: httpx.AsyncClient) -> None:
    reply = await client.get("/v1/books/7")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["content-length"] == str(len(reply.content))
    assert list(reply.json()) == ["book_id", "title", "pages", "kind", "shelf"]
    assert reply.json()["pages"] is None


async def test_response_body_stands_in_for_the_reply(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/first")).json()["book_id"] == "1"
    assert (await client.get("/v1/titles")).json() == ["a", "b"]


async def test_raw_bytes_go_out_as_they_are_with_metadata_as_headers(client: httpx.AsyncClient) -> None:
    reply = await client.get("/v1/render")
    assert reply.content == b"\x89PNG\x00"
    assert reply.headers["content-type"] == "image/png"
    assert reply.headers["x-seed"] == "1"
    assert reply.headers["content-length"] == "5"  # what the servicer claims is not believed
    raw = {name.lower(): value for name, value in reply.headers.raw}
    assert raw[b"x-filename"] == "é.png".encode("latin-1")
    cover = await client.get("/v1/cover")
    assert (cover.content, cover.headers["content-type"]) == (b"cover", "application/octet-stream")


async def test_metadata_can_set_the_status_but_not_the_connection(library: Library, client: httpx.AsyncClient) -> None:
    async def partial(request: Any, context: Any) -> Any:
        await context.send_initial_metadata(
            (("x-http-status", "206"), ("Connection".lower(), "close"), ("x-request-id", "mine"), ("grpc-x", "y"))
        )
        return httpbody_pb2.HttpBody(data=b"part")

    library.on("Render", partial)
    reply = await client.get("/v1/render", headers={"x-request-id": "given"})
    assert (reply.status_code, reply.content) == (206, b"part")
    assert not {"x-http-status", "connection", "grpc-x"} & set(reply.headers)
    assert reply.headers.get_list("x-request-id") == ["given"]


async def test_not_modified_has_no_body(library: Library, client: httpx.AsyncClient) -> None:
    async def unchanged(request: Any, context: Any) -> Any:
        await context.send_initial_metadata((("x-http-status", "304"), ("etag", '"1"')))
        return httpbody_pb2.HttpBody(data=b"never sent")

    library.on("Render", unchanged)
    reply = await client.get("/v1/render")
    assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", '"1"')
    assert not {"content-type", "content-length"} & set(reply.headers)


@pytest.mark.parametrize("value", ["a\r\nset-cookie: b", "a\x00"])
async def test_a_header_that_would_split_the_reply_is_an_error(
    library: Library, client: httpx.AsyncClient, value: str
) -> None:
    async def split(request: Any, context: Any) -> Any:
        await context.send_initial_metadata((("x-name", value),))
        return httpbody_pb2.HttpBody()

    library.on("Render", split)
    check_error(await client.get("/v1/render"), 500, "INTERNAL")


async def test_head_is_get_without_the_body(client: httpx.AsyncClient) -> None:
    get, head = await client.get("/v1/render"), await client.head("/v1/render")
    assert head.content == b""
    same = {name: value for name, value in get.headers.items() if name != "x-request-id"}
    assert {name: value for name, value in head.headers.items() if name != "x-request-id"} == same
    missing = await client.head("/v1/nothing")
    assert (missing.status_code, missing.content) == (404, b"")


async def test_a_request_id_is_taken_or_minted(library: Library, client: httpx.AsyncClient) -> None:
    given = await client.get("/v1/echo", headers={"x-request-id": "abc~!" * 25})
    assert given.headers["x-request-id"] == "abc~!" * 25
    assert f"x-request-id={'abc~!' * 25}" in given.json()["metadata"]
    for bad in (b"", b"a b", b"a" * 129, "é".encode()):
        minted = (await client.get("/v1/books/7", headers={b"x-request-id": bad})).headers["x-request-id"]
        assert uuid.UUID(minted).version == 7
    assert (await client.get("/nothing")).headers["x-request-id"]


async def test_servicers_see_the_callers_metadata(client: httpx.AsyncClient) -> None:
    headers = [
        ("X-API-Key", "k"),
        ("Authorization", "Bearer t"),
        ("Idempotency-Key", "i"),
        ("Range", "bytes=0-1"),
        ("Cookie", "secret"),
        ("Grpc-Metadata-Color", "red"),
        ("Grpc-Metadata-Fleet-Transport", "grpc"),
        ("Grpc-Metadata-X-Api-Key", "other"),
        ("Grpc-Metadata-Data-Bin", "AQI"),
        ("User-Agent", "test"),
        ("X-Request-Id", "r"),
    ]
    body = (await client.get("/v1/echo", headers=headers)).json()
    assert set(body["metadata"]) - {"accept=*/*"} == {
        "authorization=Bearer t",
        "color=red",
        "data-bin=b'\\x01\\x02'",
        "fleet-transport=rest",
        "idempotency-key=i",
        "range=bytes=0-1",
        "user-agent=test",
        "x-api-key=k",
        "x-request-id=r",
    }
    assert body["peer"] == "ipv4:127.0.0.1:123"


@pytest.mark.parametrize(("value", "seconds"), [("30S", 30), ("2M", 120), ("1H", 3600), ("90000m", 90)])
async def test_grpc_timeout_is_the_deadline(client: httpx.AsyncClient, value: str, seconds: float) -> None:
    reply = await client.get("/v1/echo", headers={"grpc-timeout": value})
    assert seconds / 2 < reply.json()["time_remaining_seconds"] <= seconds
    assert (await client.get("/v1/echo")).json()["time_remaining_seconds"] is None


@pytest.mark.parametrize("value", ["", "30", "30s", "-1S", "123456789S", "1.5S", "S"])
async def test_a_malformed_timeout_is_400(client: httpx.AsyncClient, value: str) -> None:
    body = check_error(await client.get("/v1/echo", headers={"grpc-timeout": value}), 400, "INVALID_FIELD")
    assert body["detail"].startswith("Grpc-Timeout:")


async def test_a_deadline_that_passes_is_504(client: httpx.AsyncClient) -> None:
    check_error(await client.post("/v1/steady", headers={"grpc-timeout": "1m"}), 504, "TIMEOUT")


STATUS = {
    **dict.fromkeys(("INVALID_FIELD", "UNKNOWN_FIELD", "MALFORMED_JSON", "INVALID_PATH", "CALLBACK_FORBIDDEN"), 400),
    **dict.fromkeys(("API_KEY_MISSING", "API_KEY_INVALID"), 401),
    **dict.fromkeys(("SCOPE_MISSING", "HOST_FORBIDDEN", "ORIGIN_FORBIDDEN", "MOUNT_FORBIDDEN"), 403),
    **dict.fromkeys(("ROUTE_NOT_FOUND", "JOB_NOT_FOUND", "OUTPUT_NOT_FOUND"), 404),
    **{"METHOD_NOT_ALLOWED": 405, "REQUEST_TIMEOUT": 408, "BODY_TOO_LARGE": 413, "UNSUPPORTED_MEDIA_TYPE": 415},
    **dict.fromkeys(("JOB_ENDED", "IDEMPOTENCY_KEY_REUSED", "NODE_ONLINE"), 409),
    **{"RANGE_NOT_SATISFIABLE": 416, "RATE_LIMITED": 429, "TOO_MANY_CONNECTIONS": 429, "HEADERS_TOO_LARGE": 431},
    **{"CLIENT_CLOSED": 499, "INTERNAL": 500, "ENGINE_FAILED": 500, "OUTCOME_UNKNOWN": 500, "NOT_IMPLEMENTED": 501},
    **dict.fromkeys(("STORE_UNAVAILABLE", "SHUTTING_DOWN", "QUEUE_FULL", "NO_NODE"), 503),
    "TIMEOUT": 504,
}


@pytest.mark.parametrize(("reason", "status"), STATUS.items())
async def test_each_reason_has_its_status(
    library: Library, client: httpx.AsyncClient, reason: str, status: int
) -> None:
    violations = [Violation("a.b", "must be \udcff 1")]
    library.on("GetBook", failing(FleetError(reason, "a.b: must be \udcff 1", violations=violations)))
    body = check_error(await client.get("/v1/books/7"), status, reason, field="a.b")
    assert body["code"] == REASON_CODES[reason].name
    assert body["violations"] == [{"field": "a.b", "description": "must be ? 1"}]


@pytest.mark.parametrize(
    ("code", "status"),
    [(Code.ALREADY_EXISTS, 409), (Code.ABORTED, 409), (Code.DATA_LOSS, 500), (Code.UNKNOWN, 500)],
)
async def test_codes_without_a_reason_of_ours_have_a_status_too(
    library: Library, client: httpx.AsyncClient, code: Code, status: int
) -> None:
    library.on("GetBook", failing(FleetError("OTHER", "other", code=code)))
    check_error(await client.get("/v1/books/7"), status, "OTHER")


@pytest.mark.parametrize(("seconds", "header"), [(0.01, "1"), (1.0, "1"), (1.2, "2"), (30, "30")])
async def test_retry_after_is_whole_seconds_and_never_zero(
    library: Library, client: httpx.AsyncClient, seconds: float, header: str
) -> None:
    library.on("GetBook", failing(FleetError("QUEUE_FULL", "full", retry_after_seconds=seconds)))
    assert (await client.get("/v1/books/7")).headers["retry-after"] == header


async def test_every_503_and_429_says_when_to_come_back(library: Library, client: httpx.AsyncClient) -> None:
    for reason in ("NO_NODE", "RATE_LIMITED"):
        library.on("GetBook", failing(FleetError(reason, "later")))
        assert int((await client.get("/v1/books/7")).headers["retry-after"]) >= 1
    library.on("GetBook", failing(FleetError("JOB_NOT_FOUND", "no")))
    assert "retry-after" not in (await client.get("/v1/books/7")).headers


async def test_abort_and_set_code_are_errors_and_status_details_are_read(
    library: Library, client: httpx.AsyncClient
) -> None:
    async def abort(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.NOT_FOUND, "book: none")

    async def rich(request: Any, context: Any) -> Any:
        await abort_with_details(context)

    async def set_code(request: Any, context: Any) -> Any:
        context.set_code(grpc.StatusCode.PERMISSION_DENIED)
        context.set_details("book: not yours")
        return pb.Book()

    library.on("GetBook", abort)
    assert check_error(await client.get("/v1/books/7"), 404, "NOT_FOUND")["detail"] == "book: none"
    library.on("GetBook", rich)
    reply = await client.get("/v1/books/7")
    body = check_error(reply, 503, "QUEUE_FULL", field="queue")
    assert body["violations"] == [{"field": "queue", "description": "it is full"}]
    assert reply.headers["retry-after"] == "3"
    library.on("GetBook", set_code)
    assert check_error(await client.get("/v1/books/7"), 403, "PERMISSION_DENIED")["detail"] == "book: not yours"


async def test_a_fault_of_the_bridge_is_500_and_says_nothing_of_itself(
    library: Library, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    library.on("GetBook", failing(ZeroDivisionError("secret")))
    reply = await client.get("/v1/books/7")
    assert "secret" not in check_error(reply, 500, "INTERNAL")["detail"]
    assert reply.headers["x-request-id"] in caplog.text


async def test_paths_and_methods_that_are_not_there(client: httpx.AsyncClient) -> None:
    check_error(await client.get("/v1/books/"), 404, "ROUTE_NOT_FOUND")
    check_error(await client.get("/v1/books/a%2Fb"), 400, "INVALID_PATH")
    wrong = await client.put("/v1/books")
    check_error(wrong, 405, "METHOD_NOT_ALLOWED")
    assert wrong.headers["allow"] == "GET, HEAD, POST"
    assert "ws://" in check_error(await client.get("/v1/ws"), 400, "INVALID_PATH")["detail"]


@pytest.mark.parametrize("path", ["/v1/books", "/v1/watch?nothing=1", "/v1/wait"])
async def test_who_is_not_let_in_learns_nothing_of_the_request(path: str) -> None:
    class NobodyIn:
        async def unary(self, path: str, request: Any, context: Any) -> Message:
            raise FleetError("API_KEY_MISSING", "an API key is required")

        async def stream(self, path: str, request: Any, context: Any) -> AsyncGenerator[Message, None]:
            raise FleetError("API_KEY_MISSING", "an API key is required")
            yield

    async with client_of(Bridge([SERVICE], NobodyIn())) as client:
        method = "GET" if "watch" in path else "POST"
        body = b"" if "watch" in path else b"not json"
        check_error(await client.request(method, path, content=body), 401, "API_KEY_MISSING")


async def test_a_body_that_announces_too_much_is_413_unread(library: Library) -> None:
    app = bridge_of(library)
    read = []

    async def receive() -> dict[str, Any]:
        read.append(1)
        return {"type": "http.request", "body": b"", "more_body": False}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", b"65")]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/raw/x", "raw_path": b"/v1/raw/x"}
    await app({**scope, "query_string": b"", "headers": headers, "client": None}, receive, send)
    assert (sent[0]["status"], read) == (413, [])


@pytest.mark.parametrize(("size", "status"), [(64, 200), (65, 413)])
async def test_the_limit_of_a_method_holds_with_and_without_content_length(
    client: httpx.AsyncClient, size: int, status: int
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(size):
            yield b"x"

    for content in (b"x" * size, chunks()):
        reply = await client.post("/v1/raw/x", content=content)
        assert reply.status_code == status
        if status == 413:
            check_error(reply, 413, "BODY_TOO_LARGE")


async def test_the_limit_is_one_mebibyte_where_a_method_sets_none(client: httpx.AsyncClient) -> None:
    head = {"content-type": "application/json"}
    body = b'{"title":"' + b"x" * (1024 * 1024 - 12) + b'"}'
    assert (await client.post("/v1/books", content=body, headers=head)).status_code == 200
    check_error(await client.post("/v1/books", content=body + b" ", headers=head), 413, "BODY_TOO_LARGE")


async def test_a_body_that_is_not_there_in_time_is_408(library: Library) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"{"
        await library.release.wait()

    async with client_of(bridge_of(library, settings=BridgeSettings(body_chunk_seconds=0.05))) as client:
        reply = await client.post("/v1/books", content=chunks(), headers={"content-type": "application/json"})
        check_error(reply, 408, "REQUEST_TIMEOUT")


async def _page(scope: Any, receive: Any, send: Any) -> None:
    if scope["query_string"] == b"fail":
        raise FleetError("SHUTTING_DOWN", "no page now")
    await http_reply(send, 200, b"page", (b"content-type", b"text/html"))


async def test_special_routes_are_served_beside_the_methods(library: Library) -> None:
    docs = SpecialRoute("GET", "/docs", _page, "a page")
    async with client_of(bridge_of(library, special=[docs], required_paths=["GET /docs"])) as client:
        page = await client.get("/docs", headers={"x-request-id": "r"})
        assert (page.content, page.headers["content-type"], page.headers["x-request-id"]) == (b"page", "text/html", "r")
        assert (await client.head("/docs")).content == b""
        wrong = await client.post("/docs")
        check_error(wrong, 405, "METHOD_NOT_ALLOWED")
        assert wrong.headers["allow"] == "GET, HEAD"
        check_error(await client.get("/docs?fail"), 503, "SHUTTING_DOWN")
        assert (await client.get("/v1/books/7")).status_code == 200


@pytest.mark.parametrize(
    ("routes", "problem"),
    [
        ([SpecialRoute("GET", "/v1/books", _page, "a page")], "shadowed by the special route"),
        ([SpecialRoute("GET", "/docs/{x}", _page, "a page")], "must be literal"),
        ([SpecialRoute("GET", "docs", _page, "a page")], "must be literal"),
        ([SpecialRoute("GET", "/docs", _page, "")], "needs a reason"),
        ([SpecialRoute("GET", "/docs", _page, "a"), SpecialRoute("GET", "/docs", _page, "b")], "answer the same path"),
    ],
)
def test_special_routes_that_cannot_be_served_are_refused(routes: list[SpecialRoute], problem: str) -> None:
    with pytest.raises(RouteError, match=problem):
        bridge_of(Library(), special=routes)


def test_a_required_path_that_nothing_answers_stops_the_start() -> None:
    with pytest.raises(RouteError, match="DELETE /v1/shelves"):
        bridge_of(Library(), required_paths=["GET /v1/books/{id}", "DELETE /v1/shelves"])
