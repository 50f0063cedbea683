"""Containers of all nodes, and programs that run to their end: every call goes to the node that it names."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fleet.v1 import command_pb2, fleet_pb2, types_pb2

from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.services.audit import Actor, audited
from fleet_server.services.commands import Commands
from fleet_server.services.fleet import FleetView
from fleet_server.services.intake import idempotency
from fleet_server.services.pages import page_by_name
from fleet_server.services.shield import Shield
from fleet_server.store import ReplyStore

Tell = Callable[[types_pb2.OperationProgress], None]
Command = command_pb2.Command


@dataclass(frozen=True, slots=True)
class ContainerSettings:
    """How long nodes may take, in seconds; a call's own deadline is a little later."""

    deploy_seconds: float = 295.0
    command_seconds: float = 25.0
    list_seconds: float = 10.0
    """A node that takes longer for its list is left out of it, and named."""
    margin_seconds: float = 20.0
    """What a removal may take beside the grace of the container."""
    exec_margin_seconds: float = 4.0
    kept_bytes: int = 64 << 10
    """A larger reply is not kept in the store for its idempotency key: the node has it."""


class Containers:
    """Every method raises FleetError: NODE_NOT_FOUND, NODE_OFFLINE, and what the node says."""

    def __init__(
        self,
        fleet: FleetView,
        commands: Commands,
        replies: ReplyStore,
        tell: Tell,
        settings: ContainerSettings | None = None,
    ) -> None:
        self._fleet = fleet
        self._commands = commands
        self._replies = replies
        self._tell = tell
        self._settings = settings or ContainerSettings()
        self._shield = Shield()

    async def aclose(self) -> None:
        """Waits for what is under way."""
        await self._shield.aclose()

    async def deploy(self, request: fleet_pb2.DeployContainerRequest, actor: Actor) -> types_pb2.Container:
        """The container, once it runs; the pull is told as operation_progress. A caller who leaves does not stop it."""
        if request.HasField("host_port") and not request.HasField("port"):
            raise invalid_field("host_port", "needs port, the container's own")
        asked = fleet_pb2.DeployContainerRequest()
        asked.CopyFrom(request)
        asked.ClearField("request_id")

        def progress(tick: types_pb2.OperationProgress) -> None:
            mine = types_pb2.OperationProgress()
            mine.CopyFrom(tick)
            mine.node_id = request.node_id
            mine.request_id = actor.key or actor.request_id
            self._tell(mine)

        async def work(operation: str) -> bytes:
            command = Command(command_id=operation, deploy=asked)
            seconds = self._settings.deploy_seconds
            end = await self._commands.run(request.node_id, command, timeout=seconds, progress=progress)
            end.container.node_id = request.node_id
            return end.container.SerializeToString()

        # The password is no part of what makes two requests alike: not even its hash is kept.
        public = fleet_pb2.DeployContainerRequest()
        public.CopyFrom(asked)
        public.ClearField("registry_auth")
        with audited(
            actor, "deploy", request.node_id, name=request.name, image=request.image, mounts=[*request.mounts]
        ):
            return types_pb2.Container.FromString(await self._once("DeployContainer", public, actor, work))

    async def remove(self, request: fleet_pb2.RemoveContainerRequest, actor: Actor) -> types_pb2.Container:
        """The container as it was left. PRIVILEGE_FORBIDDEN where the fleet did not deploy it."""
        command = Command(remove=request)
        seconds = request.stop_grace_seconds + self._settings.margin_seconds
        with audited(actor, "remove", request.node_id, name=request.container_name):
            run = self._commands.run(request.node_id, command, timeout=seconds)
            return _named((await self._shield.run(run)).container, request.node_id)

    async def get(self, request: fleet_pb2.GetContainerRequest) -> types_pb2.Container:
        """One container with what it uses."""
        command = Command(get_container=request)
        end = await self._commands.run(request.node_id, command, timeout=self._settings.command_seconds)
        return _named(end.container, request.node_id)

    async def all(self, request: fleet_pb2.ListContainersRequest) -> fleet_pb2.ListContainersResponse:
        """Containers by node and name, with the nodes that did not answer. INVALID_PAGE_TOKEN."""
        nodes = [view.node_id for view in self._fleet.nodes() if self._has_engine(view.node_id)]
        if request.HasField("node_id"):
            nodes = [node_id for node_id in nodes if node_id == request.node_id]
        answers = await asyncio.gather(*(self._on(node_id) for node_id in nodes))
        silent = [node_id for node_id, answer in zip(nodes, answers, strict=True) if answer is None]
        found = [one for answer in answers if answer is not None for one in answer]
        if request.status:
            found = [one for one in found if one.status in set(request.status)]
        page, token = page_by_name(request, found, lambda one: (one.node_id, one.name))
        return fleet_pb2.ListContainersResponse(containers=page, next_page_token=token, unreachable_node_ids=silent)

    async def execute(self, request: fleet_pb2.ExecRequest, actor: Actor) -> fleet_pb2.ExecResponse:
        """What the program printed, once it has ended. TIMEOUT: it ran for too long and was killed."""
        asked = fleet_pb2.ExecRequest()
        asked.CopyFrom(request)
        asked.ClearField("request_id")

        async def work(operation: str) -> bytes:
            command = Command(command_id=operation, exec=asked)
            seconds = request.timeout_seconds + self._settings.exec_margin_seconds
            end = await self._commands.run(request.node_id, command, timeout=seconds)
            end.exec.node_id = request.node_id
            return end.exec.SerializeToString()

        place = request.container_name if request.HasField("container_name") else None
        with audited(actor, "exec", request.node_id, container_name=place, command=request.command):
            return fleet_pb2.ExecResponse.FromString(await self._once("Exec", asked, actor, work))

    async def _once(
        self,
        method: str,
        content: fleet_pb2.DeployContainerRequest | fleet_pb2.ExecRequest,
        actor: Actor,
        work: Callable[[str], Awaitable[bytes]],
    ) -> bytes:
        """An effect under its idempotency key, which is the command's identity on the node too."""
        once = idempotency(content, method=f"Fleet/{method}", owner=actor.owner, key=actor.key)
        if once is None:

            async def unkeyed() -> bytes:
                return await work("")

            return await self._shield.run(unkeyed())
        return await self._shield.run(self._replies.once(once, work, most_bytes=self._settings.kept_bytes))

    async def _on(self, node_id: str) -> list[types_pb2.Container] | None:
        """The node's containers; None where it does not answer."""
        command = Command(list_containers=fleet_pb2.ListContainersRequest(node_id=node_id))
        try:
            end = await self._commands.run(node_id, command, timeout=self._settings.list_seconds)
        except FleetError:
            return None
        return [_named(one, node_id) for one in end.containers.containers]

    def _has_engine(self, node_id: str) -> bool:
        hello = self._fleet.hello(node_id)
        return hello is not None and bool(hello.docker_version)


def _named(container: types_pb2.Container, node_id: str) -> types_pb2.Container:
    """A node speaks for itself alone."""
    container.node_id = node_id
    return container
