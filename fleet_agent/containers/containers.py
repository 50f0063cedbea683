"""Containers of this node: started, removed, listed, described."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import docker
import requests
import structlog
from docker.errors import APIError, NotFound
from docker.models.containers import Container
from docker.types import DeviceRequest, LogConfig, Mount
from fleet.v1 import fleet_pb2, types_pb2

from fleet_agent.commands.faults import CommandFault, unknown
from fleet_agent.containers.faults import gone, refused
from fleet_agent.containers.image_roots import ImagePolicy
from fleet_agent.containers.messages import (
    COMMAND,
    MANAGED,
    POLICY_NAMES,
    PREFIX,
    SPEC,
    container_message,
    host_port,
    spec_label,
    stats_message,
)
from fleet_agent.containers.mounts import BindMount, MountPolicy
from fleet_agent.containers.pulls import Images, Tell, digest_of
from fleet_agent.docker_engine import DockerEngine, DockerUnavailableError
from fleet_agent.swarm.messages import SHORT

_log = structlog.get_logger("fleet.agent.containers")
_SAMPLE_SECONDS = 0.25
_LOG = LogConfig(type="json-file", config={"max-size": "64m", "max-file": "2"})


@dataclass(frozen=True, slots=True)
class ContainerLimits:
    """What every container of the fleet gets beside the bounds that its caller asks for, and what it may be made of."""

    pids: int = 4096
    images: ImagePolicy = field(default_factory=ImagePolicy)


class Containers:
    """Every method raises CommandFault, DOCKER_UNAVAILABLE where the engine is away.

    A container is named by its name, or by 12 or more characters of its id.
    """

    def __init__(
        self, node_id: str, engine: DockerEngine, policy: MountPolicy, limits: ContainerLimits | None = None
    ) -> None:
        self._node_id = node_id
        self._engine = engine
        self._policy = policy
        self._limits = limits or ContainerLimits()
        self._images = Images(engine)
        self._lost: set[str] = set()
        """Deploys during which the engine went away."""
        self.deploying: Counter[str] = Counter()
        """Names of containers that are on their way, and how many deploys of each."""

    @contextlib.contextmanager
    def on_its_way(self, name: str) -> Iterator[None]:
        """While the block runs, the container is being deployed."""
        self.deploying[name] += 1
        try:
            yield
        finally:
            self.deploying[name] -= 1
            if not self.deploying[name]:
                del self.deploying[name]

    async def deploy(
        self, request: fleet_pb2.DeployContainerRequest, command_id: str, tell: Tell
    ) -> types_pb2.Container:
        """A new container, running. One that cannot be started is removed again; pulled images stay."""
        _judge(request)
        self._limits.images.judge(request.image)
        mounts = await asyncio.to_thread(self._policy.judge, list(request.mounts))
        with _unavailable():
            await self._engine.run(lambda client: _check_name(client, request.name))
            await self._images.ensure(request, tell)
            options = self._options(request, mounts, command_id)
            return await self._engine.run(lambda client: self._start(client, options, mounts))

    async def remove(self, name: str, grace_seconds: int) -> types_pb2.Container:
        """The container, stopped and removed with its own volumes. PRIVILEGE_FORBIDDEN where the fleet did not start
        it."""

        def work(client: docker.DockerClient) -> types_pb2.Container:
            container = find(client, name)
            if MANAGED not in (container.labels or {}):
                raise CommandFault(
                    "PRIVILEGE_FORBIDDEN", f"container_name: {name!r} was not deployed by the fleet: it is left alone"
                )
            with contextlib.suppress(NotFound):
                container.stop(timeout=grace_seconds)
                container.reload()
            message = self._message(client, container)
            with contextlib.suppress(NotFound):
                container.remove(force=True, v=True)
            message.status = types_pb2.CONTAINER_STATUS_REMOVED
            return message

        with _unavailable():
            return await self._engine.run(work)

    async def get(self, name: str) -> types_pb2.Container:
        """One container; with what it uses while it runs."""

        def work(client: docker.DockerClient) -> types_pb2.Container:
            container = find(client, name)
            message = self._message(client, container)
            if message.status == types_pb2.CONTAINER_STATUS_RUNNING:
                with contextlib.suppress(APIError):
                    before = client.api.stats(container.id or "", stream=False, one_shot=True)
                    time.sleep(_SAMPLE_SECONDS)
                    after = client.api.stats(container.id or "", stream=False, one_shot=True)
                    message.stats.CopyFrom(stats_message(before, after))
            return message

        with _unavailable():
            return await self._engine.run(work)

    async def all(self, *, managed: bool = False) -> list[types_pb2.Container]:
        """All containers of the node by name; `managed`: those of the fleet alone."""

        def work(client: docker.DockerClient) -> list[types_pb2.Container]:
            filters = {"label": MANAGED} if managed else None
            found = []
            for summary in client.api.containers(all=True, filters=filters):
                with contextlib.suppress(NotFound):
                    found.append(self._message(client, client.containers.get(summary["Id"])))
            return sorted(found, key=lambda one: one.name)

        with _unavailable():
            return await self._engine.run(work)

    async def tidy(self, command_ids: Sequence[str] = ()) -> None:
        """Removes what deploys that a crash, or the engine's absence, cut short have left behind, unless it runs."""
        wanted = {*command_ids, *self._lost}
        if not wanted:
            return

        def work(client: docker.DockerClient) -> None:
            for summary in client.api.containers(all=True, filters={"label": COMMAND, "status": "created"}):
                if summary["Labels"].get(COMMAND) in wanted:
                    with contextlib.suppress(APIError):
                        client.api.remove_container(summary["Id"], force=True, v=True)
                        _log.warning("a container that was never started is removed", name=summary["Names"])

        with contextlib.suppress(CommandFault), _unavailable():
            await self._engine.run(work)
            self._lost -= wanted

    def _message(self, client: docker.DockerClient, container: Container) -> types_pb2.Container:
        attrs: dict[str, Any] = container.attrs or {}
        message = container_message(self._node_id, attrs)
        message.image_digest = digest_of(client, attrs.get("Image", ""), message.image)
        return message

    def _options(
        self, request: fleet_pb2.DeployContainerRequest, mounts: list[BindMount], command_id: str
    ) -> dict[str, Any]:
        """What the engine is asked for. Nothing of a caller's widens it: no privileges, no namespaces of the host."""
        options: dict[str, Any] = {
            "image": request.image,
            "name": request.name,
            "environment": dict(request.env),
            "labels": {
                **request.labels,
                MANAGED: self._node_id,
                COMMAND: command_id,
                SPEC: spec_label(request),
            },
            "mounts": [
                Mount(target=mount.target, source=mount.source, type="bind", read_only=mount.read_only)
                for mount in mounts
            ],
            "restart_policy": {"Name": POLICY_NAMES[request.restart_policy]},
            "security_opt": ["no-new-privileges:true"],
            "pids_limit": self._limits.pids,
            "log_config": _LOG,
        }
        port = host_port(request)
        if port is not None:
            options["ports"] = {f"{request.port}/tcp": port}
        if request.gpus:
            options["device_requests"] = [DeviceRequest(count=-1, capabilities=[["gpu"]])]
        if request.HasField("command"):
            options["command"] = shlex.split(request.command)
        if request.HasField("cpus"):
            options["nano_cpus"] = int(request.cpus * 1e9)
        if request.HasField("memory_bytes"):
            options["mem_limit"] = request.memory_bytes
        return options

    def _start(
        self, client: docker.DockerClient, options: dict[str, Any], mounts: list[BindMount]
    ) -> types_pb2.Container:
        container: Container | None = None
        try:
            container = client.containers.create(**options)
            # An image may have been long in coming.
            self._policy.check(mounts)
            container.start()
            # The engine looks at the paths in its own time: what a link that was planted meanwhile shows is taken away.
            self._policy.check(mounts)
            container.reload()
            return self._message(client, container)
        except BaseException as error:
            if container is not None:
                with contextlib.suppress(requests.exceptions.RequestException):
                    container.remove(force=True, v=True)
            if isinstance(error, APIError):
                raise refused(error) from None
            if isinstance(error, requests.exceptions.RequestException):
                self._lost.add(options["labels"][COMMAND])
                raise unknown(f"the Docker engine went away while it started the container ({error})") from None
            raise


def find(client: docker.DockerClient, name: str) -> Container:
    """A container by its exact name or the beginning of its id. Raises CommandFault CONTAINER_NOT_FOUND."""
    try:
        container: Container = client.containers.get(name)
    except (NotFound, docker.errors.NullResource):
        raise gone(name) from None
    except APIError as error:
        # A name that the engine would not even look for.
        if error.status_code == 400:
            raise gone(name) from None
        raise
    if container.name == name or (len(name) >= SHORT and (container.id or "").startswith(name)):
        return container
    raise gone(name)


def _judge(request: fleet_pb2.DeployContainerRequest) -> None:
    for name in request.labels:
        if name.startswith(PREFIX):
            raise CommandFault("INVALID_FIELD", f"labels.{name}: labels that begin with {PREFIX} are the fleet's own")
    for name, text in request.env.items():
        if not name or "=" in name or "\0" in name + text:
            raise CommandFault("INVALID_FIELD", f"env: {name!r} is no name of a variable")
    if request.HasField("command"):
        try:
            words = shlex.split(request.command)
        except ValueError as error:
            raise CommandFault("INVALID_FIELD", f"command: cannot be split into words: {error}") from None
        if not words or "\0" in request.command:
            raise CommandFault("INVALID_FIELD", "command: has no words that could be run")


def _check_name(client: docker.DockerClient, name: str) -> None:
    """Before a long pull rather than after it."""
    try:
        find(client, name)
    except CommandFault:
        return
    raise CommandFault("NAME_IN_USE", f"name: the node has a container {name!r} already: remove it, or choose another")


@contextlib.contextmanager
def _unavailable() -> Iterator[None]:
    """The engine's absence as a fault."""
    try:
        yield
    except DockerUnavailableError as error:
        raise CommandFault("DOCKER_UNAVAILABLE", str(error)) from None
    except APIError as error:
        raise refused(error) from None
