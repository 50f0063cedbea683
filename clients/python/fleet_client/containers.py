"""What both clients can do with containers, their logs, and programs on nodes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, closing
from typing import Any

import httpx

from fleet_client import calls
from fleet_client.calls import Json, segment
from fleet_client.streams import async_entries, entries

DEPLOY_SECONDS = 310.0
"""The server gives up on a deploy after 300."""
_EXEC_SECONDS = 60.0
_MARGIN_SECONDS = 15.0
_GRACE_SECONDS = 10


def _deploy(node_id: str, name: str = "") -> str:
    return f"/api/fleet/deploy/{segment(node_id)}/{segment(name)}"


def _logs(node_id: str, name: str, call: str = "") -> str:
    return f"/api/fleet/logs/{segment(node_id)}/{segment(name)}{call}"


def _exec_timeout(fields: Json) -> httpx.Timeout:
    return calls.timeout(float(fields.get("timeout_seconds") or _EXEC_SECONDS) + _MARGIN_SECONDS)


def _grace(seconds: int | None) -> tuple[Json, httpx.Timeout]:
    waits = _GRACE_SECONDS if seconds is None else seconds
    return calls.given({"stop_grace_seconds": seconds}), calls.timeout(waits + 2 * _MARGIN_SECONDS)


class ContainerCalls:
    """Part of the blocking client."""

    session: httpx.Client

    _json: Callable[..., Json]

    def deploy_container(self, node_id: str, image: str, name: str, **fields: Any) -> Json:
        """Run a container on a node; it is returned once it runs. Fields: port, host_port, gpus, mounts, env, labels,
        command, restart_policy, cpus, memory_bytes, pull, registry_auth, request_id."""
        body = {"node_id": node_id, "image": image, "name": name, **calls.given(fields)}
        return self._json("POST", "/api/fleet/deploy", json=body, timeout=calls.timeout(DEPLOY_SECONDS))

    def list_containers(self, node_id: str | None = None, **filters: Any) -> Json:
        """Containers of all nodes, or of one: `containers`, and `unreachable_node_ids` of nodes that did not answer."""
        return self._json("GET", "/api/fleet/deploy", params=calls.given({"node_id": node_id, **filters}))

    def get_container(self, node_id: str, name: str) -> Json:
        """One container, with what it uses."""
        return self._json("GET", _deploy(node_id, name))

    def remove_container(self, node_id: str, name: str, stop_grace_seconds: int | None = None) -> Json:
        """Stop and remove a container that the fleet deployed; the container as it was left."""
        params, timeout = _grace(stop_grace_seconds)
        return self._json("DELETE", _deploy(node_id, name), params=params, timeout=timeout)

    def exec(self, node_id: str, command: str, **fields: Any) -> Json:
        """Run a command to its end, on the node or in a container: `exit_code`, `stdout`, `stderr`. Fields: shell,
        container_name, env, timeout_seconds, request_id. A non-zero exit is no error."""
        body = {"command": command, **calls.given(fields)}
        return self._json("POST", f"/api/fleet/exec/{segment(node_id)}", json=body, timeout=_exec_timeout(body))

    def container_logs(self, node_id: str, name: str, tail: int | None = None, **times: Any) -> Json:
        """The last lines, oldest first (`lines`), between the times `since` and `until`; `exit` of one that ended."""
        return self._json("GET", _logs(node_id, name), params=calls.given({"tail": tail, **times}))

    def follow_container_logs(
        self, node_id: str, name: str, tail: int | None = None, **times: Any
    ) -> Generator[Json, None, None]:
        """The last lines, then those that come: `{"line": …}` each, and `{"exit": …}` at the container's end. Raises
        ConnectionFailedError where the stream breaks."""
        with closing(
            entries(self.session, _logs(node_id, name, "/stream"), calls.given({"tail": tail, **times}))
        ) as found:
            yield from found


class AsyncContainerCalls:
    """Part of the awaited client."""

    session: httpx.AsyncClient

    _json: Callable[..., Awaitable[Json]]

    async def deploy_container(self, node_id: str, image: str, name: str, **fields: Any) -> Json:
        """Run a container on a node; it is returned once it runs. Fields: port, host_port, gpus, mounts, env, labels,
        command, restart_policy, cpus, memory_bytes, pull, registry_auth, request_id."""
        body = {"node_id": node_id, "image": image, "name": name, **calls.given(fields)}
        return await self._json("POST", "/api/fleet/deploy", json=body, timeout=calls.timeout(DEPLOY_SECONDS))

    async def list_containers(self, node_id: str | None = None, **filters: Any) -> Json:
        """Containers of all nodes, or of one: `containers`, and `unreachable_node_ids` of nodes that did not answer."""
        return await self._json("GET", "/api/fleet/deploy", params=calls.given({"node_id": node_id, **filters}))

    async def get_container(self, node_id: str, name: str) -> Json:
        """One container, with what it uses."""
        return await self._json("GET", _deploy(node_id, name))

    async def remove_container(self, node_id: str, name: str, stop_grace_seconds: int | None = None) -> Json:
        """Stop and remove a container that the fleet deployed; the container as it was left."""
        params, timeout = _grace(stop_grace_seconds)
        return await self._json("DELETE", _deploy(node_id, name), params=params, timeout=timeout)

    async def exec(self, node_id: str, command: str, **fields: Any) -> Json:
        """Run a command to its end, on the node or in a container: `exit_code`, `stdout`, `stderr`. Fields: shell,
        container_name, env, timeout_seconds, request_id. A non-zero exit is no error."""
        body = {"command": command, **calls.given(fields)}
        return await self._json("POST", f"/api/fleet/exec/{segment(node_id)}", json=body, timeout=_exec_timeout(body))

    async def container_logs(self, node_id: str, name: str, tail: int | None = None, **times: Any) -> Json:
        """The last lines, oldest first (`lines`), between the times `since` and `until`; `exit` of one that ended."""
        return await self._json("GET", _logs(node_id, name), params=calls.given({"tail": tail, **times}))

    async def follow_container_logs(
        self, node_id: str, name: str, tail: int | None = None, **times: Any
    ) -> AsyncGenerator[Json, None]:
        """The last lines, then those that come: `{"line": …}` each, and `{"exit": …}` at the container's end. Raises
        ConnectionFailedError where the stream breaks."""
        params = calls.given({"tail": tail, **times})
        async with aclosing(async_entries(self.session, _logs(node_id, name, "/stream"), params)) as found:
            async for entry in found:
                yield entry
