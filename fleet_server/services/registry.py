"""The registry that nodes take their images from: what is in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin, urlsplit

from fleet.v1 import fleet_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.pages import key_of, token_for

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://localhost:5000"


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """Where it is, and who we are to it. One list takes at most `seconds`, asks `at_once` questions at a time, and goes
    through `most` repositories."""

    url: str = DEFAULT_URL
    username: str = ""
    password: str = ""
    seconds: float = 20.0
    at_once: int = 8
    page: int = 100
    most: int = 10_000


class Registry:
    """A registry of the Docker Registry HTTP API V2. Calls raise REGISTRY_UNAVAILABLE where it does not answer."""

    def __init__(self, settings: RegistrySettings | None = None) -> None:
        self._settings = settings or RegistrySettings()
        self._url = self._settings.url.rstrip("/")

    @cached_property
    def _session(self) -> httpx.AsyncClient:
        """Of the first call: few fleets have a registry, and its library would make each start longer."""
        import httpx

        login = (self._settings.username, self._settings.password)
        # No redirects: what answers here must be the registry itself. Authorities are read where it speaks TLS alone.
        return httpx.AsyncClient(
            auth=login if any(login) else None,
            timeout=self._settings.seconds,
            trust_env=False,
            follow_redirects=False,
            verify=self._url.lower().startswith("https:"),
        )

    async def aclose(self) -> None:
        """Closes the connections."""
        if "_session" in self.__dict__:
            await self._session.aclose()

    async def images(self, request: fleet_pb2.ListImagesRequest) -> tuple[list[fleet_pb2.RegistryImage], str]:
        """A page of images by name with their tags, and the next page's token; all where no limit is given.

        One whose tags were all deleted has none. Raises INVALID_PAGE_TOKEN.
        """
        # Not in the event loop, which would stand still meanwhile.
        await asyncio.to_thread(import_module, "httpx")
        import httpx

        key = key_of(request)
        after = str(key[0]) if key else ""
        limit = request.limit if request.HasField("limit") else self._settings.most
        try:
            async with asyncio.timeout(self._settings.seconds):
                names = await self._names(after, limit + 1)
                images = await self._tagged(names[:limit])
        except TimeoutError:
            raise self._unavailable(f"no answer within {self._settings.seconds:g} s") from None
        except httpx.HTTPError as error:
            raise self._unavailable(str(error) or type(error).__name__) from error
        return images, token_for(request, (names[limit - 1],)) if len(names) > limit else ""

    async def _names(self, after: str, most: int) -> list[str]:
        """Names of repositories after that one, in order."""
        found: list[str] = []
        async for page in self._catalog(after, min(most, self._settings.page)):
            found += page
            if len(found) >= most:
                break
        return sorted(set(found))[:most]

    async def _catalog(self, after: str, count: int) -> AsyncGenerator[list[str], None]:
        url = f"{self._url}/v2/_catalog?n={count}" + (f"&last={quote(after, safe='')}" if after else "")
        while url:
            reply = await self._get(url)
            yield [str(name) for name in reply.json().get("repositories") or ()]
            url = _next(reply)

    async def _tagged(self, names: list[str]) -> list[fleet_pb2.RegistryImage]:
        slots = asyncio.Semaphore(self._settings.at_once)

        async def image(name: str) -> fleet_pb2.RegistryImage:
            async with slots:
                return fleet_pb2.RegistryImage(name=name, tags=await self._tags(name))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(image(name)) for name in names]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _tags(self, name: str) -> list[str]:
        found: list[str] = []
        url = f"{self._url}/v2/{quote(name, safe='/')}/tags/list"
        while url:
            reply = await self._get(url, missing=True)
            if reply.status_code == HTTPStatus.NOT_FOUND:
                # Removed since it was listed.
                break
            found += [str(tag) for tag in reply.json().get("tags") or ()]
            url = _next(reply)
        return sorted(set(found))

    async def _get(self, url: str, *, missing: bool = False) -> httpx.Response:
        reply = await self._session.get(url)
        path = urlsplit(url).path
        if reply.status_code == HTTPStatus.UNAUTHORIZED:
            raise self._unavailable("it asks for a login: set FLEET_REGISTRY_USERNAME and FLEET_REGISTRY_PASSWORD")
        if not (reply.is_success or (missing and reply.status_code == HTTPStatus.NOT_FOUND)):
            raise self._unavailable(f"it answered {reply.status_code} to GET {path}")
        if reply.is_success and not isinstance(_json(reply), dict):
            raise self._unavailable(f"what answered GET {path} is no registry")
        return reply

    def _unavailable(self, why: str) -> FleetError:
        host = urlsplit(self._settings.url).netloc.rpartition("@")[2]
        return FleetError("REGISTRY_UNAVAILABLE", f"the registry at {host} (FLEET_REGISTRY_URL) cannot be read: {why}")


def _json(reply: httpx.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        return None


def _next(reply: httpx.Response) -> str:
    """The next page, "" at the end; it is asked of the registry itself, whatever address that calls its own."""
    link = reply.links.get("next", {}).get("url", "")
    if not link:
        return ""
    parts = urlsplit(urljoin(str(reply.url), link))
    return str(reply.url.copy_with(raw_path=f"{parts.path}?{parts.query}".encode()))
