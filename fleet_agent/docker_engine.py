"""The node's Docker engine: Docker's own library in bounded threads, its endless replies without any thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import docker
import httpx
import requests
from docker.errors import APIError, DockerException, create_api_error_from_http_exception

from fleet_agent.docker_client import connected_client

T = TypeVar("T")
DEFAULT_URL = "unix:///var/run/docker.sock"
_HEADER_BYTES = 8
_STREAMS = {1: "stdout", 2: "stderr", 3: "system"}


class DockerUnavailableError(Exception):
    """The engine cannot be reached; the text says why and what to do."""


class DockerRefusedError(Exception):
    """The engine refused a request that was sent as a stream: its HTTP status and its words."""

    def __init__(self, status_code: int, explanation: str) -> None:
        super().__init__(f"{status_code}: {explanation}")
        self.status_code = status_code
        self.explanation = explanation


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the engine says of itself."""

    version: str = ""
    engine_id: str = ""
    hostname: str = ""
    swarm_role: str = ""
    """manager, worker, or "" where it is in no swarm."""
    swarm_node_id: str = ""
    managed_containers: int = 0
    """Containers of the fleet that run there or are being deployed."""


NO_ENGINE = EngineFacts()


class DockerEngine:
    """One engine. It is connected at the first use, and again after it was away.

    Every call raises DockerUnavailableError where the engine does not answer, and docker.errors.APIError where it
    refuses. At most `threads` calls run at once; further ones wait their turn.
    """

    def __init__(
        self, url: str | None = None, *, threads: int = 16, timeout_seconds: float = 60, place: str = ""
    ) -> None:
        self.url = url or os.environ.get("DOCKER_HOST") or DEFAULT_URL
        self.place = place or f"at {self.url}"
        """Where it is, for people."""
        self.facts = NO_ENGINE
        """As of the last `look`."""
        self._threads = threads
        self._timeout = timeout_seconds
        self._client: docker.DockerClient | None = None
        self._connecting = asyncio.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="docker")

    async def run(self, work: Callable[[docker.DockerClient], T]) -> T:
        """What `work` returns, done in one of the threads. Cancelled, the caller leaves at once; the work ends by
        itself, at the latest at the library's own time-out."""
        client = await self._connected()
        try:
            return await self._in_thread(work, client)
        except requests.exceptions.RequestException as error:
            if isinstance(error, APIError):
                raise
            raise _unavailable(self.place, error) from error

    async def look(self) -> EngineFacts:
        """Reads `facts` again; those of no engine where it is away. Never raises."""
        try:
            self.facts = await self.run(_facts)
        except (DockerUnavailableError, DockerException):
            self.facts = NO_ENGINE
        return self.facts

    @asynccontextmanager
    async def stream(
        self, path: str, params: Mapping[str, Any], *, silence_seconds: float | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes of an endless reply to GET `path` (`/events`, `/services/x/logs`), as they come.

        No thread waits for them, the engine is told to wait while nobody reads on, and leaving the context ends the
        request. Raises DockerRefusedError, and DockerUnavailableError where the engine goes away.
        """
        client = await self._connected()
        version = await self._in_thread(lambda one: one.api.api_version, client)
        timeout = httpx.Timeout(self._timeout, read=silence_seconds)
        base, transport = _road(self.url)
        async with httpx.AsyncClient(base_url=base, transport=transport, timeout=timeout, trust_env=False) as session:
            try:
                async with session.stream("GET", f"/v{version}{path}", params=dict(params)) as reply:
                    if not reply.is_success:
                        raise DockerRefusedError(reply.status_code, _explanation(await reply.aread()))
                    yield reply.aiter_raw()
            except httpx.TransportError as error:
                raise _unavailable(self.place, error) from error

    async def close(self) -> None:
        """Ends the connections. Calls under way fail or end by themselves."""
        client, self._client = self._client, None
        if client is not None:
            await asyncio.to_thread(client.close)
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _connected(self) -> docker.DockerClient:
        if self._client is None:
            async with self._connecting:
                if self._client is None:
                    self._client = await self._in_thread(self._connect)
        return self._client

    def _connect(self) -> docker.DockerClient:
        try:
            return connected_client(self.url, timeout_seconds=self._timeout, pool_size=self._threads)
        except (DockerException, requests.exceptions.RequestException) as error:
            raise _unavailable(self.place, error) from error

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)


async def frames(chunks: AsyncIterator[bytes], *, tty: bool = False) -> AsyncIterator[tuple[str, bytes]]:
    """(stdout or stderr, bytes) of an engine's multiplexed reply; of a container with a terminal it is all stdout.

    `system` is the engine itself, which could not give all.
    """
    if tty:
        async for chunk in chunks:
            yield "stdout", chunk
        return
    waiting = bytearray()
    async for chunk in chunks:
        waiting += chunk
        while len(waiting) >= _HEADER_BYTES:
            end = _HEADER_BYTES + int.from_bytes(waiting[4:_HEADER_BYTES], "big")
            if len(waiting) < end:
                break
            yield _STREAMS.get(waiting[0], "stdout"), bytes(waiting[_HEADER_BYTES:end])
            del waiting[:end]


def ask(
    client: docker.DockerClient,
    method: str,
    path: str,
    *,
    params: Mapping[str, Any] | None = None,
    json: Any = None,
    headers: Mapping[str, str] | None = None,
) -> Any:
    """What the engine answers to a request as it is, in JSON; for what the library would change on its way. Blocks.

    Raises what the library raises: docker.errors.APIError, requests' RequestException.
    """
    api = client.api
    url = f"{api.base_url}/v{api.api_version}{path}"
    reply = api.request(method, url, params=params, json=json, headers=headers, timeout=api.timeout)
    try:
        reply.raise_for_status()
    except requests.HTTPError as error:
        create_api_error_from_http_exception(error)
    return reply.json() if reply.content else None


def _facts(client: docker.DockerClient) -> EngineFacts:
    info: dict[str, Any] = client.info()
    swarm = info.get("Swarm") or {}
    active = swarm.get("LocalNodeState") == "active"
    role = ("manager" if swarm.get("ControlAvailable") else "worker") if active else ""
    return EngineFacts(
        version=info.get("ServerVersion", ""),
        engine_id=info.get("ID", ""),
        hostname=info.get("Name", ""),
        swarm_role=role,
        swarm_node_id=swarm.get("NodeID", "") if active else "",
    )


def _road(url: str) -> tuple[str, httpx.AsyncHTTPTransport]:
    scheme, _, rest = url.partition("://")
    # Nothing here speaks TLS: the authorities of the world are not read for each request.
    if scheme in ("unix", "http+unix"):
        return "http://docker", httpx.AsyncHTTPTransport(uds=f"/{rest.lstrip('/')}", verify=False)
    return f"http://{rest}", httpx.AsyncHTTPTransport(verify=False)


def _explanation(body: bytes) -> str:
    try:
        return str(httpx.Response(200, content=body).json()["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()


def _unavailable(place: str, error: Exception) -> DockerUnavailableError:
    return DockerUnavailableError(
        f"the Docker engine {place} does not answer ({_root(error)}): start it, or let the agent's user use it"
    )


def _root(error: BaseException) -> str:
    """The plainest cause: Docker's library wraps connection errors several times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
