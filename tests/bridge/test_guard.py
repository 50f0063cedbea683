"""Host and Origin: each rule with an attack and its allowed twin, over a real uvicorn and against the ASGI
app itself.
"""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_server.bridge.guard import HostOriginGuard, parse_authority
from tests.bridge.raw_http import connect, http_reply, serve

LAN: dict[str, Any] = {"loopback_bind": False}
HOSTS = ["fleet.example.com", "10.0.0.5", "tunnel.example:9000"]
ORIGINS = ["https://dash.example.com", "http://10.0.0.9:3000"]


class Reached:
    """The application behind the guard."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.count += 1
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await receive()
        else:
            await http_reply(send, 200, b"in")


def make(app: Any, **more: Any) -> HostOriginGuard:
    return HostOriginGuard(app, HOSTS, ORIGINS, hosts_setting="X_HOSTS", origins_setting="X_ORIGINS", **more)


async def call(headers: list[tuple[str, str]], method: str = "GET", **more: Any) -> tuple[int, dict[str, Any]]:
    """Status and error object (empty when let through) of one request."""
    scope_more: dict[str, Any] = {
        key: more.pop(key) for key in ("scheme", "server", "type", "extensions") if key in more
    }
    app = Reached()
    sent: list[dict[str, Any]] = []
    scope: dict[str, Any] = {
        "type": "http",
        "method": method,
        "path": "/api/x",
        "scheme": "http",
        "server": ("127.0.0.1", 8765),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
        **scope_more,
    }

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await make(app, **more)(scope, receive, send)  # type: ignore[arg-type]
    if app.count:
        return 200, {}
    if sent[0]["type"] == "websocket.close":
        return 403, {"reason": "closed"}
    assert sent[0]["type"].replace("websocket.", "") == "http.response.start"
    headers_out = dict(sent[0]["headers"])
    assert headers_out[b"content-type"] == b"application/json"
    assert int(headers_out[b"content-length"]) == len(sent[1]["body"])
    error: dict[str, Any] = orjson.loads(sent[1]["body"])
    assert set(error) == {"detail", "code", "reason", "request_id", "violations"}
    assert error["code"] == "PERMISSION_DENIED"
    assert headers_out[b"x-request-id"].decode() == error["request_id"]
    return sent[0]["status"], error


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8765",
        "LOCALHOST:1",
        "localhost.",
        "127.0.0.1:8765",
        "127.8.9.10",
        "[::1]",
        "[::1]:8765",
        "[0:0:0:0:0:0:0:1]:80",
        "[::ffff:127.0.0.1]",
        "fleet.example.com",
        "Fleet.Example.COM.:443",
        "10.0.0.5:8765",
        "tunnel.example:9000",
    ],
)
async def test_names_of_this_server_are_let_in(host: str) -> None:
    assert await call([("host", host)]) == (200, {})


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",  # DNS rebinding: the name resolves to us, the browser sends its own
        "evil.example:8765",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example#localhost",
        "localhost@evil.example",
        "evil.example@localhost",
        "user:secret@localhost",
        "localhost:8765@evil.example",
        "localhost, evil.example",
        "localhost evil.example",
        "localhost/evil.example",
        "localhost\\evil.example",
        "localhost%00.evil.example",
        "localhost..",
        ".localhost",
        "xn--localhst-1wc",
        "l\xf6calhost",
        "",
        ":8765",
        "localhost:",
        "localhost:http",
        "localhost:-1",
        "localhost:0",
        "localhost:65536",
        "localhost:8765:8765",
        "127.1",
        "2130706433",
        "0x7f.0.0.1",
        "0x7f000001",
        "127.0.0.01",
        "127.0.0.1.1",
        "0.0.0.0:8765",
        "::1",
        "[::1",
        "[::1]8765",
        "[localhost]",
        "[127.0.0.1]",
        "[fe80::1%25eth0]",
        "[::]",
        "192.168.1.5",  # not where this connection came in
        "tunnel.example",  # allowed with its port alone
        "tunnel.example:9001",
        "a" * 300,
    ],
)
async def test_other_hosts_are_403_naming_the_setting(host: str) -> None:
    status, error = await call([("host", host)])
    assert (status, error["reason"]) == (403, "HOST_FORBIDDEN")
    assert error["detail"].startswith("Host: ")
    assert "X_HOSTS" in error["detail"] or "is malformed" in error["detail"]
    assert len(error["detail"]) < 250


async def test_the_refusal_of_a_plain_other_name_says_what_to_set() -> None:
    _, error = await call([("host", "evil.example")])
    assert error["detail"] == "Host: 'evil.example' is not a name of this server; add it to X_HOSTS if it is one"


@pytest.mark.parametrize(
    "headers",
    [[], [("host", "localhost"), ("host", "localhost")], [("host", "localhost"), ("host", "evil.example")]],
)
async def test_exactly_one_host_is_wanted(headers: list[tuple[str, str]]) -> None:
    status, error = await call(headers)
    assert (status, error["reason"]) == (403, "HOST_FORBIDDEN")


async def test_the_address_that_the_connection_came_in_on_is_a_name_of_this_server() -> None:
    assert await call([("host", "192.168.1.5:8765")], server=("192.168.1.5", 8765)) == (200, {})
    assert await call([("host", "[fd00::5]:8765")], server=("fd00::5", 8765)) == (200, {})
    assert (await call([("host", "192.168.1.6:8765")], server=("192.168.1.5", 8765)))[0] == 403
    assert (await call([("host", "192.168.1.6:8765")], server=("/run/fleet.sock", None)))[0] == 403
    assert await call([("host", "192.168.1.6")], bound_addresses=["192.168.1.6"]) == (200, {})
    assert (await call([("host", "0.0.0.0")], bound_addresses=["0.0.0.0"]))[0] == 403


async def test_forwarded_headers_do_not_speak_for_the_host() -> None:
    assert (await call([("host", "evil.example"), ("x-forwarded-host", "localhost")]))[0] == 403
    assert await call([("host", "localhost"), ("x-forwarded-host", "evil.example")]) == (200, {})


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:5173", "HTTP://LOCALHOST"]
)
async def test_pages_of_this_machine_may_use_a_loopback_server_and_only_that(origin: str) -> None:
    assert await call([("host", "localhost:8765"), ("origin", origin)], "POST") == (200, {})
    status, error = await call([("host", "fleet.example.com"), ("origin", origin)], "POST", **LAN)
    assert (status, error["reason"]) == (403, "ORIGIN_FORBIDDEN")


@pytest.mark.parametrize("loopback_bind", [True, False])
@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "https://evil.example",
        "http://localhost.evil.example",
        "http://localhost@evil.example",
        "http://evil.example#localhost",
        "https://dash.example.com.evil.example",
        "https://dash.example.com:8443",
        "http://dash.example.com",
        "https://sub.dash.example.com",
        "https://dash.example.com/",
        "https://dash.example.com https://evil.example",
        "chrome-extension://abcdefgh",
        "file://",
        "file://localhost",
        "localhost",
        "",
        "*",
    ],
)
async def test_other_origins_are_403_naming_the_setting(origin: str, loopback_bind: bool) -> None:
    headers = [("host", "localhost:8765"), ("origin", origin)]
    status, error = await call(headers, "POST", loopback_bind=loopback_bind)
    assert (status, error["reason"]) == (403, "ORIGIN_FORBIDDEN")
    assert error["detail"].startswith("Origin: ") and "X_ORIGINS" in error["detail"]


@pytest.mark.parametrize("origin", ["https://dash.example.com", "https://dash.example.com:443", "http://10.0.0.9:3000"])
async def test_allowed_origins_pass_even_from_another_site(origin: str) -> None:
    headers = [("host", "fleet.example.com"), ("origin", origin), ("sec-fetch-site", "cross-site")]
    assert await call(headers, "POST", **LAN) == (200, {})


async def test_two_origins_are_no_origin() -> None:
    headers = [("host", "localhost"), ("origin", "http://localhost"), ("origin", "https://evil.example")]
    assert (await call(headers))[1]["reason"] == "ORIGIN_FORBIDDEN"


@pytest.mark.parametrize(
    ("host", "origin", "scheme", "status"),
    [
        ("fleet.example.com:8765", "http://fleet.example.com:8765", "http", 200),
        ("fleet.example.com", "http://fleet.example.com", "http", 200),
        ("fleet.example.com", "https://fleet.example.com", "http", 200),  # a proxy ends TLS
        ("fleet.example.com", "https://fleet.example.com", "https", 200),
        ("fleet.example.com", "http://fleet.example.com", "https", 403),
        ("fleet.example.com", "http://fleet.example.com:8080", "http", 403),
        ("fleet.example.com:8765", "http://fleet.example.com", "http", 403),
        ("fleet.example.com", "http://10.0.0.5", "http", 403),
    ],
)
async def test_the_servers_own_pages_may_use_it(host: str, origin: str, scheme: str, status: int) -> None:
    assert (await call([("host", host), ("origin", origin)], "POST", scheme=scheme, **LAN))[0] == status


NAVIGATE = [("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")]


@pytest.mark.parametrize("method", ["POST", "DELETE", "GET"])
@pytest.mark.parametrize("site", ["cross-site", "Cross-Site"])
async def test_requests_of_another_sites_page_without_origin_are_403(method: str, site: str) -> None:
    status, error = await call([("host", "localhost"), ("sec-fetch-site", site), ("sec-fetch-mode", "no-cors")], method)
    assert (status, error["reason"]) == (403, "ORIGIN_FORBIDDEN")


@pytest.mark.parametrize("site", ["same-origin", "same-site", "none"])
async def test_requests_of_our_own_pages_and_of_the_address_bar_pass(site: str) -> None:
    assert await call([("host", "localhost"), ("sec-fetch-site", site)], "POST") == (200, {})


async def test_a_link_from_another_site_may_be_followed_but_not_posted_framed_or_upgraded() -> None:
    base = [("host", "localhost"), ("sec-fetch-site", "cross-site")]
    assert await call([*base, *NAVIGATE]) == (200, {})
    assert (await call([*base, *NAVIGATE], "POST"))[0] == 403
    assert (await call([*base, ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")]))[0] == 403
    assert (await call([*base, ("sec-fetch-dest", "document")]))[0] == 403
    assert (await call([*base, *NAVIGATE, ("sec-fetch-dest", "image")]))[0] == 403
    assert (await call([*base, *NAVIGATE], type="websocket", scheme="ws"))[0] == 403


async def test_programs_without_browser_headers_pass() -> None:
    assert await call([("host", "localhost:8765"), ("user-agent", "curl/8")], "POST") == (200, {})


async def test_a_websocket_is_refused_by_403_where_the_server_can_and_closed_where_not() -> None:
    headers = [("host", "localhost"), ("origin", "https://evil.example")]
    extensions: dict[str, Any] = {"websocket.http.response": {}}
    status, error = await call(headers, type="websocket", scheme="ws", extensions=extensions)
    assert (status, error["reason"]) == (403, "ORIGIN_FORBIDDEN")
    assert (await call(headers, type="websocket", scheme="ws"))[1] == {"reason": "closed"}


async def test_the_callers_request_id_is_kept_where_it_is_valid() -> None:
    _, error = await call([("host", "evil.example"), ("x-request-id", "abc-1")])
    assert error["request_id"] == "abc-1"
    for bad in ("a b", "x" * 129, ""):
        _, error = await call([("host", "evil.example"), ("x-request-id", bad)])
        assert error["request_id"] not in (bad, "")


async def test_lifespan_passes_unjudged() -> None:
    app = Reached()
    seen: list[str] = []

    async def lifespan(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await make(lifespan)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan"] and app.count == 0


@pytest.mark.parametrize("entry", ["http://x", "a b", "", "host:99999", "*"])
def test_a_malformed_host_entry_stops_the_start_naming_the_setting(entry: str) -> None:
    with pytest.raises(ValueError, match="X_HOSTS"):
        HostOriginGuard(Reached(), [entry], hosts_setting="X_HOSTS")


@pytest.mark.parametrize("entry", ["null", "*", "dash.example.com", "https://a/b", "ftp://a"])
def test_a_malformed_origin_entry_stops_the_start_naming_the_setting(entry: str) -> None:
    with pytest.raises(ValueError, match="X_ORIGINS"):
        HostOriginGuard(Reached(), [], [entry], origins_setting="X_ORIGINS")


def test_ipv6_entries_are_taken_with_and_without_brackets() -> None:
    HostOriginGuard(Reached(), ["fd00::5", "[fd00::6]", "[fd00::7]:8765"])


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(alphabet="localhst127.:[]@0x%#/\\ \tev\u0130\u017f", max_size=30))
def test_no_spelling_but_the_known_ones_is_loopback(text: str) -> None:
    authority = parse_authority(text)
    if authority is not None and authority.host in ("localhost", "127.0.0.1", "::1"):
        assert text.lower().rpartition("]")[0].strip("[") in ("::1", "::ffff:127.0.0.1", "") or ":" in authority.host
        assert text.lower().startswith(("localhost", "127.", "["))
        assert "@" not in text and "#" not in text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"host: evil.example\r\n", 403),
        (b"host: localhost\r\norigin: https://evil.example\r\n", 403),
        (b"host: localhost\r\norigin: null\r\n", 403),
        (b"host: localhost\r\nhost: evil.example\r\n", 403),
        (b"host: localhost\r\n", 101),
        (b"host: localhost\r\norigin: http://localhost:1\r\n", 101),
    ],
)
async def test_on_a_real_server_a_websocket_is_refused_before_the_upgrade(headers: bytes, status: int) -> None:
    app = Reached()
    async with serve(make(app), ws="websockets-sansio") as server, connect(server) as client:
        await client.send(
            b"GET /ws HTTP/1.1\r\n"
            + headers
            + b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        if status == 101:
            assert (await client.reader.readline()).split()[1] == b"101"
            assert app.count == 1
        else:
            reply = await client.reply()
            assert (reply.status, app.count) == (status, 0)
            assert reply.json()["reason"] in ("HOST_FORBIDDEN", "ORIGIN_FORBIDDEN")


async def test_on_a_real_server_an_absolute_target_does_not_replace_the_host() -> None:
    app = Reached()
    async with serve(make(app)) as server, connect(server) as client:
        await client.send(b"GET http://localhost/x HTTP/1.1\r\nhost: evil.example\r\n\r\n")
        assert (await client.reply()).status == 403
