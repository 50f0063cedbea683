"""What the registry has: Debian's own, and such that misbehave."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fleet.v1 import fleet_pb2
from starlette.responses import RedirectResponse, Response

from fleet_server.domain.errors import FleetError
from fleet_server.services.registry import Registry, RegistrySettings
from tests.clients.serving import reply, serving
from tests.ports import free_port
from tests.swarm.registry import PASSWORD, USERNAME, registry

NAMES = sorted([*(f"many/image-{number:02}" for number in range(23)), "alpha", "zebra/with.dots_and-dashes"])
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


def push(session: httpx.Client, name: str, tags: list[str]) -> str:
    """An image of one empty config; its digest."""
    config = b"{}"
    digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    begun = session.post(f"/v2/{name}/blobs/uploads/")
    # The location has a query of its own.
    session.put(f"{begun.headers['location']}&digest={digest}", content=config).raise_for_status()
    described = {"mediaType": "application/vnd.docker.container.image.v1+json", "size": len(config), "digest": digest}
    manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": []}).encode()
    for tag in tags:
        url = f"/v2/{name}/manifests/{tag}"
        session.put(url, content=manifest, headers={"Content-Type": MANIFEST}).raise_for_status()
    return f"sha256:{hashlib.sha256(manifest).hexdigest()}"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder, registry(Path(folder), address):
        with httpx.Client(base_url=f"http://{address}", timeout=60) as session:
            for name in NAMES:
                push(session, name, ["1", "latest"] if name == "alpha" else ["2"])
            gone = push(session, "emptied", ["1"])
            session.delete(f"/v2/emptied/manifests/{gone}").raise_for_status()
        yield f"http://{address}"


@asynccontextmanager
async def reading(url: str, **settings: object) -> AsyncIterator[Registry]:
    opened = Registry(RegistrySettings(url=url, **settings))  # type: ignore[arg-type]
    yield opened
    await opened.aclose()


async def why(url: str, **settings: object) -> str:
    """Why the registry cannot be read."""
    async with reading(url, **settings) as opened:
        with pytest.raises(FleetError) as caught:
            await opened.images(fleet_pb2.ListImagesRequest())
    assert caught.value.reason == "REGISTRY_UNAVAILABLE"
    assert "FLEET_REGISTRY_URL" in caught.value.detail
    return caught.value.detail


@pytest.mark.parametrize("page", [100, 7])
async def test_everything_by_name(url: str, page: int) -> None:
    async with reading(url, page=page) as opened:
        images, token = await opened.images(fleet_pb2.ListImagesRequest())
    found = {image.name: list(image.tags) for image in images}
    assert list(found) == sorted([*NAMES, "emptied"])
    assert (found["alpha"], found["many/image-07"], found["emptied"]) == (["1", "latest"], ["2"], [])
    assert token == ""


@pytest.mark.parametrize("limit", [1, 10, 26, 1000])
async def test_page_by_page(url: str, limit: int) -> None:
    names: list[str] = []
    token = ""
    async with reading(url) as opened:
        while True:
            images, token = await opened.images(fleet_pb2.ListImagesRequest(limit=limit, page_token=token))
            assert 0 < len(images) <= limit
            names += [image.name for image in images]
            if not token:
                break
        assert names == sorted([*NAMES, "emptied"])
        for bad in ("x", "bm8", token + "e30"):
            with pytest.raises(FleetError) as caught:
                await opened.images(fleet_pb2.ListImagesRequest(page_token=bad))
            assert caught.value.reason == "INVALID_PAGE_TOKEN"


async def test_a_login() -> None:
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder, registry(Path(folder), address, login=True):
        url = f"http://{address}"
        assert "FLEET_REGISTRY_USERNAME" in await why(url)
        said = await why(url, username=USERNAME, password="wrong-word")
        assert "FLEET_REGISTRY_USERNAME" in said and "wrong-word" not in said
        async with reading(url, username=USERNAME, password=PASSWORD) as opened:
            assert await opened.images(fleet_pb2.ListImagesRequest()) == ([], "")


async def test_what_is_no_registry() -> None:
    port = free_port()
    said = await why(f"http://user:hidden@127.0.0.1:{port}")
    assert f"127.0.0.1:{port}" in said and "hidden" not in said
    with serving(Response("<html>", media_type="text/html")) as web:
        assert "is no registry" in await why(web.url)
    with serving(reply({}, 500)) as broken:
        assert "500" in await why(broken.url)
    with serving(RedirectResponse("http://127.0.0.1:1/elsewhere", 307)) as moved:
        assert "307" in await why(moved.url)
        assert len(moved.asked) == 1


async def test_pages_are_asked_of_the_registry_itself() -> None:
    away = {"Link": '<http://127.0.0.1:1/v2/_catalog?n=2&last=b>; rel="next"'}
    first, rest = {"repositories": ["a", "b"]}, {"repositories": ["c"]}
    tags = reply({"tags": ["1"]})
    with serving(Response(json.dumps(first), 200, away, "application/json"), reply(rest), tags) as server:
        async with reading(server.url) as opened:
            images, _ = await opened.images(fleet_pb2.ListImagesRequest())
        assert [image.name for image in images] == ["a", "b", "c"]
        assert server.asked[1].url.query == "n=2&last=b"


async def test_an_image_that_goes_while_it_is_listed() -> None:
    with serving(reply({"repositories": ["a"]}), reply({"errors": []}, 404)) as server:
        async with reading(server.url) as opened:
            images, _ = await opened.images(fleet_pb2.ListImagesRequest())
    assert [(image.name, list(image.tags)) for image in images] == [("a", [])]


async def test_pages_without_end_end() -> None:
    again = {"Link": '</v2/_catalog?n=2&last=a>; rel="next"'}
    endless = Response(json.dumps({"repositories": ["a"]}), 200, again, "application/json")
    with serving(endless) as server:
        assert "no answer within 0.5 s" in await why(server.url, seconds=0.5)
