"""What both clients can do with swarm services, and with the registry's images."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import aclosing, closing
from typing import Any

import httpx

from fleet_client import calls
from fleet_client.calls import Json, segment
from fleet_client.streams import async_entries, entries


def _path(service_id: str, call: str = "") -> str:
    return f"/api/swarm/services/{segment(service_id)}{call}"


class SwarmCalls:
    """Part of the blocking client."""

    session: httpx.Client
    _json: Callable[..., Json]

    def list_services(self) -> Json:
        """The swarm's services: `services`."""
        return self._json("GET", "/api/swarm/services")

    def get_service(self, service_id: str) -> Json:
        """One service, by id or name, with its tasks."""
        return self._json("GET", _path(service_id))

    def scale_service(self, service_id: str, replicas: int, request_id: str | None = None) -> Json:
        """Change the number of replicas; tasks that run are kept. The service, at once."""
        params = calls.given({"replicas": replicas, "request_id": request_id})
        return self._json("POST", _path(service_id, "/scale"), params=params)

    def update_service(
        self,
        service_id: str,
        image: str,
        registry_auth: Mapping[str, str] | None = None,
        request_id: str | None = None,
    ) -> Json:
        """Give a service another image; `registry_auth` has `username` and `password`. The service, at once."""
        auth = None if registry_auth is None else dict(registry_auth)
        body = calls.given({"image": image, "registry_auth": auth, "request_id": request_id})
        return self._json("POST", _path(service_id, "/update"), json=body)

    def rollback_service(self, service_id: str, request_id: str | None = None) -> Json:
        """Undo the last change of a service; the service, at once."""
        params = calls.given({"request_id": request_id})
        return self._json("POST", _path(service_id, "/rollback"), params=params)

    def autoscale_service(self, service_id: str, max_replicas: int, **rule: Any) -> Json:
        """Let a service grow and shrink with the jobs that wait: target_cluster, job_type, target_model say which,
        min_replicas, jobs_per_replica and enabled how. The service."""
        body = {"max_replicas": max_replicas, **calls.given(rule)}
        return self._json("POST", _path(service_id, "/autoscale"), json=body)

    def service_logs(self, service_id: str, tail: int | None = None, **times: Any) -> list[Json]:
        """The last lines of all tasks, oldest first; between the times `since` and `until`."""
        reply = self._json("GET", _path(service_id, "/logs"), params=calls.given({"tail": tail, **times}))
        lines: list[Json] = reply["lines"]
        return lines

    def follow_service_logs(
        self, service_id: str, tail: int | None = None, **times: Any
    ) -> Generator[Json, None, None]:
        """The last lines, then those that come, until the service is removed. Raises ConnectionFailedError where the
        stream breaks."""
        params = calls.given({"tail": tail, **times})
        path = _path(service_id, "/logs/stream")
        with closing(entries(self.session, path, params)) as found:
            for entry in found:
                yield entry["line"]

    def list_images(self, **page: Any) -> Json:
        """The registry's images with their tags: `images`; a page of them with `limit` and `page_token`."""
        return self._json("GET", "/api/fleet/images", params=calls.given(page))


class AsyncSwarmCalls:
    """Part of the awaited client."""

    session: httpx.AsyncClient
    _json: Callable[..., Awaitable[Json]]

    async def list_services(self) -> Json:
        """The swarm's services: `services`."""
        return await self._json("GET", "/api/swarm/services")

    async def get_service(self, service_id: str) -> Json:
        """One service, by id or name, with its tasks."""
        return await self._json("GET", _path(service_id))

    async def scale_service(self, service_id: str, replicas: int, request_id: str | None = None) -> Json:
        """Change the number of replicas; tasks that run are kept. The service, at once."""
        params = calls.given({"replicas": replicas, "request_id": request_id})
        return await self._json("POST", _path(service_id, "/scale"), params=params)

    async def update_service(
        self,
        service_id: str,
        image: str,
        registry_auth: Mapping[str, str] | None = None,
        request_id: str | None = None,
    ) -> Json:
        """Give a service another image; `registry_auth` has `username` and `password`. The service, at once."""
        auth = None if registry_auth is None else dict(registry_auth)
        body = calls.given({"image": image, "registry_auth": auth, "request_id": request_id})
        return await self._json("POST", _path(service_id, "/update"), json=body)

    async def rollback_service(self, service_id: str, request_id: str | None = None) -> Json:
        """Undo the last change of a service; the service, at once."""
        params = calls.given({"request_id": request_id})
        return await self._json("POST", _path(service_id, "/rollback"), params=params)

    async def autoscale_service(self, service_id: str, max_replicas: int, **rule: Any) -> Json:
        """Let a service grow and shrink with the jobs that wait: target_cluster, job_type, target_model say which,
        min_replicas, jobs_per_replica and enabled how. The service."""
        body = {"max_replicas": max_replicas, **calls.given(rule)}
        return await self._json("POST", _path(service_id, "/autoscale"), json=body)

    async def service_logs(self, service_id: str, tail: int | None = None, **times: Any) -> list[Json]:
        """The last lines of all tasks, oldest first; between the times `since` and `until`."""
        reply = await self._json("GET", _path(service_id, "/logs"), params=calls.given({"tail": tail, **times}))
        lines: list[Json] = reply["lines"]
        return lines

    async def follow_service_logs(
        self, service_id: str, tail: int | None = None, **times: Any
    ) -> AsyncGenerator[Json, None]:
        """The last lines, then those that come, until the service is removed. Raises ConnectionFailedError where the
        stream breaks."""
        params = calls.given({"tail": tail, **times})
        path = _path(service_id, "/logs/stream")
        async with aclosing(async_entries(self.session, path, params)) as found:
            async for entry in found:
                yield entry["line"]

    async def list_images(self, **page: Any) -> Json:
        """The registry's images with their tags: `images`; a page of them with `limit` and `page_token`."""
        return await self._json("GET", "/api/fleet/images", params=calls.given(page))
