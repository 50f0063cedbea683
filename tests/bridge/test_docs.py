"""/openapi.json and /docs: small, cacheable, and alone with themselves."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re

import httpx
import pytest

from fleet_server.bridge.docs import docs_routes
from tests.bridge.library import Library, bridge_of, check_error, client_of

DOCUMENT = {"openapi": "3.1.0", "info": {"title": "T", "version": "1"}, "paths": {}}


@pytest.fixture
def client() -> httpx.AsyncClient:
    return client_of(bridge_of(Library(), special=docs_routes(lambda: DOCUMENT)))


async def test_the_document_is_served_as_json_to_those_who_take_gzip_and_those_who_do_not(
    client: httpx.AsyncClient,
) -> None:
    for encoding in ("identity", "gzip", "br;q=1, gzip;q=0.8", "deflate, GZIP"):
        reply = await client.get("/openapi.json", headers={"accept-encoding": encoding})
        assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
        assert reply.json() == DOCUMENT
        assert reply.headers.get("content-encoding") == ("gzip" if "gzip" in encoding.lower() else None)
        assert reply.headers["vary"] == "accept-encoding"
    for encoding in ("gzip;q=0", "gzip;q=0.0", "xgzip", "*;q=0"):
        reply = await client.get("/openapi.json", headers={"accept-encoding": encoding})
        assert "content-encoding" not in reply.headers


async def test_what_the_caller_has_is_not_sent_again(client: httpx.AsyncClient) -> None:
    for path in ("/openapi.json", "/docs"):
        etag = (await client.get(path)).headers["etag"]
        for header in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            reply = await client.get(path, headers={"if-none-match": header})
            assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", etag)
        assert (await client.get(path, headers={"if-none-match": '"other"'})).status_code == 200
    other = docs_routes(lambda: {**DOCUMENT, "paths": {"/x": {}}})
    changed = client_of(bridge_of(Library(), special=other))
    assert (await changed.get("/openapi.json")).headers["etag"] != (await client.get("/openapi.json")).headers["etag"]


async def test_the_page_runs_its_own_script_and_nothing_else(client: httpx.AsyncClient) -> None:
    reply = await client.get("/docs")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    scripts = re.findall(r"<script>(.*?)</script>", reply.text, re.DOTALL)
    assert len(scripts) == 1 and reply.text.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "connect-src 'self'" in policy
    assert "unsafe-eval" not in policy and "frame-ancestors 'none'" in policy
    assert reply.headers["x-content-type-options"] == "nosniff"


async def test_the_page_works_offline_and_takes_no_markup_from_the_document(client: httpx.AsyncClient) -> None:
    text = (await client.get("/docs")).text
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//|@import|[ :]url\(""", text)
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text
    assert 'fetch("openapi.json")' in text
    assert "prefers-color-scheme: dark" in text


async def test_head_and_other_methods(client: httpx.AsyncClient) -> None:
    reply = await client.head("/docs")
    assert (reply.status_code, reply.content) == (200, b"") and int(reply.headers["content-length"]) > 5_000
    check_error(await client.post("/docs"), 405, "METHOD_NOT_ALLOWED")


async def test_the_packed_form_is_the_same_each_time() -> None:
    bodies = []
    for _ in range(2):
        client = client_of(bridge_of(Library(), special=docs_routes(lambda: DOCUMENT)))
        async with client.stream("GET", "/docs", headers={"accept-encoding": "gzip"}) as reply:
            bodies.append(b"".join([part async for part in reply.aiter_raw()]))
    assert bodies[0] == bodies[1] and len(bodies[0]) < len(gzip.decompress(bodies[0])) / 2
