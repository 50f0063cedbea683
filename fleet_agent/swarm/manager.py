"""The swarm that this node manages: its services read and changed through the node's Docker engine."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from urllib.parse import quote

import docker
from docker.errors import APIError
from fleet.v1 import fleet_pb2, types_pb2

from fleet_agent.commands.faults import CommandFault, unknown
from fleet_agent.containers.image_roots import ImagePolicy
from fleet_agent.docker_engine import DockerEngine, DockerUnavailableError, ask
from fleet_agent.swarm.messages import SHORT, Json, by_service, current, hostnames_of, mode_of, service_message

T = TypeVar("T")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
_STALE = "update out of sequence"
_STALE_TRIES = 12
_MISSING = ("manifest unknown", "not found", "denied", "unauthorized", "authentication required", "credentials")


class SwarmManager:
    """Services of the swarm. Every method raises CommandFault: NOT_SWARM_MANAGER, DOCKER_UNAVAILABLE, and where a
    service is named SERVICE_NOT_FOUND.

    A service is named by its name, its id, or the first 12 or more characters of that.
    """

    def __init__(self, engine: DockerEngine, images: ImagePolicy | None = None) -> None:
        self._engine = engine
        self._images = images or ImagePolicy()

    async def services(self) -> list[types_pb2.SwarmService]:
        """All services by name, each with the tasks that stand for it now."""
        return await self._run(_services)

    async def service(self, service_id: str) -> types_pb2.SwarmService:
        """One service, with all tasks that the swarm remembers: the ended ones say why they did."""
        return await self._run(lambda client: _whole(client, _inspect(client, service_id)))

    async def inspect(self, service_id: str) -> Json:
        """The engine's own description of a service."""
        return await self._run(lambda client: _inspect(client, service_id))

    async def scale(self, service_id: str, replicas: int) -> types_pb2.SwarmService:
        """Changes the number of replicas and nothing else, so that tasks which run go on. SERVICE_NOT_REPLICATED."""

        def change(spec: dict[str, Any], _: Json) -> bool:
            detail = _replicated(spec, service_id)
            if detail.get("Replicas") == replicas:
                return False
            detail["Replicas"] = replicas
            return True

        return await self._change(service_id, change)

    async def update(
        self, service_id: str, image: str, auth: fleet_pb2.RegistryAuth | None = None
    ) -> types_pb2.SwarmService:
        """Gives the service another image; its tasks are replaced in the way that its spec says.

        The tag is pinned to the digest that the registry has now. An image that no registry has, but this engine, is
        taken as it is. IMAGE_NOT_FOUND, REGISTRY_UNAVAILABLE, PRIVILEGE_FORBIDDEN where the node takes none from there.
        """
        if not _IMAGE.fullmatch(image) or ".." in image:
            raise CommandFault("INVALID_FIELD", "image: must be the name of an image, such as registry:5000/sdxl:2")
        self._images.judge(image)
        login = None if auth is None else _login(image, auth)
        await self.inspect(service_id)
        pinned = await self._run(lambda client: _pinned(client, image, login))

        def change(spec: dict[str, Any], _: Json) -> bool:
            container = spec["TaskTemplate"].get("ContainerSpec")
            if container is None:
                raise CommandFault("IMAGE_NOT_FOUND", f"service_id: {service_id} runs a plug-in, not an image")
            if container.get("Image") == pinned:
                return False
            container["Image"] = pinned
            return True

        return await self._change(service_id, change, login=login)

    async def rollback(self, service_id: str) -> types_pb2.SwarmService:
        """Goes back to the spec before the last change. NO_PREVIOUS_SPEC."""

        def change(_: dict[str, Any], attrs: Json) -> bool:
            if not attrs.get("PreviousSpec"):
                raise _no_previous(service_id)
            return True

        return await self._change(service_id, change, rollback="previous")

    async def _change(
        self,
        service_id: str,
        change: Callable[[dict[str, Any], Json], bool],
        *,
        login: str | None = None,
        **params: str,
    ) -> types_pb2.SwarmService:
        """Sends the spec as `change` leaves it, unless it says that nothing changes. Where somebody else was quicker,
        the spec is read again and changed again."""
        for last in (*[False] * (_STALE_TRIES - 1), True):
            attrs = await self.inspect(service_id)
            spec = json.loads(json.dumps(attrs["Spec"]))
            if not change(spec, attrs):
                break
            request = _Update(attrs["ID"], attrs["Version"]["Index"], spec, login, params)
            try:
                await self._run(request.send, acted=True)
            except _StaleError:
                if last:
                    detail = (
                        f"service_id: {service_id} is being changed by others again and again; try again in a moment"
                    )
                    raise CommandFault("DOCKER_UNAVAILABLE", detail) from None
                await asyncio.sleep(random.uniform(0, 0.05))
                continue
            return await self._run(lambda client: _whole(client, _inspect(client, service_id)), acted=True)
        return await self.service(service_id)

    async def _run(self, work: Callable[[docker.DockerClient], T], *, acted: bool = False) -> T:
        """`acted`: where the engine falls silent over it, the outcome is unknown."""
        try:
            return await self._engine.run(work)
        except DockerUnavailableError as error:
            if acted:
                raise unknown(str(error)) from None
            raise CommandFault("DOCKER_UNAVAILABLE", str(error)) from None
        except APIError as error:
            if acted and "eadline" in _words(error):
                raise unknown(f"the swarm did not answer in time ({_words(error)})") from None
            raise fault_of(error.status_code or 500, _words(error)) from None


class _StaleError(Exception):
    """The service was changed since it was read."""


@dataclass(frozen=True, slots=True)
class _Update:
    """One update of a service, as the engine takes it: the whole spec, and the version that it was made from.

    Docker's library would complete the spec with defaults of its own, which the swarm takes for a change of every task.
    """

    service_id: str
    version: int
    spec: Json
    login: str | None
    params: Json

    def send(self, client: docker.DockerClient) -> None:
        """Raises _StaleError, and what docker raises."""
        try:
            ask(
                client,
                "POST",
                f"/services/{self.service_id}/update",
                params={"version": self.version, **self.params},
                json=self.spec,
                headers=None if self.login is None else {"X-Registry-Auth": self.login},
            )
        except APIError as error:
            if _STALE in _words(error):
                raise _StaleError from None
            if "does not have a previous spec" in _words(error):
                raise _no_previous(self.service_id[:SHORT]) from None
            raise


def fault_of(status: int, words: str) -> CommandFault:
    """What an engine's refusal means to a caller."""
    if status == 503 and "not a swarm manager" in words:
        return CommandFault("NOT_SWARM_MANAGER", words.splitlines()[0])
    if status == 404:
        return CommandFault("SERVICE_NOT_FOUND", f"service_id: {words}; see GET /api/swarm/services")
    if status == 400 and "is not a valid repository/tag" in words:
        return CommandFault("INVALID_FIELD", "image: is no name of an image")
    if status == 400:
        return CommandFault("INVALID_FIELD", f"the engine refuses it: {words}")
    return CommandFault("DOCKER_UNAVAILABLE", f"the Docker engine failed: {words}")


def _services(client: docker.DockerClient) -> list[types_pb2.SwarmService]:
    found = ask(client, "GET", "/services")
    tasks = by_service(ask(client, "GET", "/tasks"))
    hostnames = hostnames_of(ask(client, "GET", "/nodes"))
    made = [service_message(one, current(tasks.get(one["ID"], [])), hostnames) for one in found]
    return sorted(made, key=lambda one: one.name)


def _inspect(client: docker.DockerClient, service_id: str) -> Json:
    try:
        attrs: Json = ask(client, "GET", f"/services/{quote(service_id, safe='')}")
    except APIError as error:
        # The engine calls a beginning that several ids share a bad request.
        if error.status_code == 400 and "ambiguous" in _words(error):
            raise fault_of(404, f"several services have ids that begin with {service_id}") from None
        raise
    if attrs["Spec"]["Name"] == service_id or (len(service_id) >= SHORT and attrs["ID"].startswith(service_id)):
        return attrs
    # The engine would take a single letter for the id that begins with it: too easily another service than was meant.
    raise fault_of(404, f"service {service_id} not found")


def _whole(client: docker.DockerClient, attrs: Json) -> types_pb2.SwarmService:
    tasks = ask(client, "GET", "/tasks", params={"filters": json.dumps({"service": [attrs["ID"]]})})
    return service_message(attrs, tasks, hostnames_of(ask(client, "GET", "/nodes")))


def _replicated(spec: Json, service_id: str) -> dict[str, Any]:
    mode, detail = mode_of(spec)
    if mode != "replicated":
        raise CommandFault(
            "SERVICE_NOT_REPLICATED",
            f"service_id: {service_id} is a {mode} service: its number of tasks follows from the nodes",
        )
    return cast("dict[str, Any]", detail)


def _pinned(client: docker.DockerClient, image: str, login: str | None) -> str:
    if "@" in image:
        return image
    headers = None if login is None else {"X-Registry-Auth": login}
    try:
        found = ask(client, "GET", f"/distribution/{image}/json", headers=headers)
    except APIError as error:
        words = _words(error).strip()
        if error.status_code == 400:
            raise CommandFault("INVALID_FIELD", f"image: {words}") from None
        if _has(client, image):
            return image
        if error.status_code in (401, 403, 404) or any(one in words for one in _MISSING):
            raise CommandFault(
                "IMAGE_NOT_FOUND", f"image: the registry has no {image}, or this login may not see it: {words}"
            ) from None
        raise CommandFault("REGISTRY_UNAVAILABLE", f"image: the registry of {image} does not answer: {words}") from None
    return f"{image}@{found['Descriptor']['digest']}"


def _has(client: docker.DockerClient, image: str) -> bool:
    try:
        ask(client, "GET", f"/images/{image}/json")
    except APIError:
        return False
    return True


def _login(image: str, auth: fleet_pb2.RegistryAuth) -> str:
    """What the engine passes on to the registry, in the coding that it expects."""
    first, slash, _ = image.partition("/")
    registry = first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"
    given = {"username": auth.username, "password": auth.password, "serveraddress": registry}
    return base64.urlsafe_b64encode(json.dumps(given).encode()).decode()


def _no_previous(service_id: str) -> CommandFault:
    return CommandFault(
        "NO_PREVIOUS_SPEC", f"service_id: {service_id} has never been changed, or was rolled back already"
    )


def _words(error: APIError) -> str:
    """The engine's own words."""
    return str(error.explanation or error)
