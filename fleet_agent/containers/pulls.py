"""Images: brought to the node where the policy wants it, and what they really are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import docker
from docker.errors import APIError, ImageNotFound
from docker.utils import parse_repository_tag
from fleet.v1 import fleet_pb2, types_pb2

from fleet_agent.commands.faults import CommandFault
from fleet_agent.containers.faults import pull_refused, words_of
from fleet_agent.docker_engine import DockerEngine

Tell = Callable[[int, int, str], Awaitable[None]]
"""Told of bytes that are here, of bytes in all, and in words what is being done."""


class Images:
    """At most `limit` pulls at once: each takes one of the engine's threads."""

    def __init__(self, engine: DockerEngine, *, limit: int = 4, tick_seconds: float = 0.25) -> None:
        self._engine = engine
        self._slots = asyncio.Semaphore(limit)
        self._tick_seconds = tick_seconds

    async def ensure(self, request: fleet_pb2.DeployContainerRequest, tell: Tell) -> None:
        """The request's image is on the node. Raises CommandFault: IMAGE_NOT_FOUND, REGISTRY_UNAVAILABLE, ..."""
        image = request.image
        if request.pull != types_pb2.PULL_POLICY_ALWAYS:
            if await self._engine.run(lambda client: _has(client, image)):
                return
            if request.pull == types_pb2.PULL_POLICY_NEVER:
                raise CommandFault("IMAGE_NOT_FOUND", f"image: {image} is not on the node, and pull is never")
        login = None
        if request.HasField("registry_auth"):
            login = {"username": request.registry_auth.username, "password": request.registry_auth.password}
        async with self._slots:
            await self._pull(image, login, tell)

    async def _pull(self, image: str, login: Mapping[str, str] | None, tell: Tell) -> None:
        tally = _Tally()
        work = asyncio.ensure_future(self._engine.run(lambda client: _pulled(client, image, login, tally)))
        said: tuple[int, int, str] | None = None
        while not work.done():
            await asyncio.wait({work}, timeout=self._tick_seconds)
            now = tally.done, tally.total, tally.words
            if now != said and now[2]:
                await tell(*now)
                said = now
        work.result()


class _Tally:
    """Bytes of the layers that a pull has brought. Written by one thread, read by another: each value is whole."""

    def __init__(self) -> None:
        self.done = 0
        self.total = 0
        self.words = ""
        self._layers: dict[str, tuple[int, int]] = {}

    def note(self, line: Mapping[str, Any]) -> None:
        layer, status = str(line.get("id", "")), str(line.get("status", ""))
        detail = line.get("progressDetail") or {}
        current, total = int(detail.get("current") or 0), int(detail.get("total") or 0)
        before = self._layers.get(layer, (0, 0))
        if status == "Downloading" and total:
            self._layers[layer] = current, total
        elif status in ("Download complete", "Pull complete") and before[1]:
            self._layers[layer] = before[1], before[1]
        self.done = sum(done for done, _ in self._layers.values())
        self.total = sum(total for _, total in self._layers.values())
        self.words = f"{status} {layer}".strip() if status else self.words


def _has(client: docker.DockerClient, image: str) -> bool:
    try:
        client.images.get(image)
    except ImageNotFound:
        return False
    except APIError as error:
        raise pull_refused(image, words_of(error)) from None
    return True


def _pulled(client: docker.DockerClient, image: str, login: Mapping[str, str] | None, tally: _Tally) -> None:
    repository, tag = parse_repository_tag(image)
    try:
        lines: Iterable[Any] = client.api.pull(
            repository, tag=tag or "latest", stream=True, decode=True, auth_config=dict(login) if login else None
        )
        for line in lines:
            if line.get("error"):
                raise pull_refused(image, " ".join(str(line["error"]).split()))
            tally.note(line)
    except APIError as error:
        raise pull_refused(image, words_of(error)) from None


def digest_of(client: docker.DockerClient, image_id: str, image: str) -> str:
    """The digest under which a registry has the image; the image's own id where no registry has it."""
    try:
        known: list[str] = (client.images.get(image_id).attrs or {}).get("RepoDigests") or []
    except APIError:
        return image_id
    repository, _ = parse_repository_tag(image)
    ours = [one for one in known if one.partition("@")[0].endswith(repository)] or known
    return ours[0].partition("@")[2] if ours else image_id
