"""Swarm services: every call goes to a node whose Docker engine manages the swarm."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fleet.v1 import command_pb2, fleet_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.audit import Actor, audited
from fleet_server.services.commands import Commands
from fleet_server.services.fleet import FleetView
from fleet_server.services.intake import idempotency
from fleet_server.services.pages import page_by_name
from fleet_server.services.shield import Shield
from fleet_server.store import ReplyStore, SwarmStore

MANAGER = "manager"
_NEXT = frozenset({"NODE_OFFLINE", "NODE_NOT_FOUND", "NOT_SWARM_MANAGER", "DOCKER_UNAVAILABLE"})
"""Nothing was done, and another node that manages the swarm may do it."""
NOBODY = Actor()
Effect = fleet_pb2.ScaleServiceRequest | fleet_pb2.UpdateServiceRequest | fleet_pb2.RollbackServiceRequest


@dataclass(frozen=True, slots=True)
class SwarmSettings:
    """How long a node may take for an answer; a call's own deadline is a little later. A reply with a log has no more
    than `log_bytes` of text, the newest."""

    command_seconds: float = 25.0
    log_bytes: int = 3 << 20


class Swarm:
    """The services of the fleet's swarm. Every method raises FleetError: NOT_SWARM_MANAGER where no online node manages
    one, DOCKER_UNAVAILABLE, and where a service is named SERVICE_NOT_FOUND.
    """

    def __init__(
        self,
        fleet: FleetView,
        commands: Commands,
        rules: SwarmStore,
        replies: ReplyStore,
        settings: SwarmSettings | None = None,
    ) -> None:
        self._fleet = fleet
        self._commands = commands
        self._rules = rules
        self._replies = replies
        self._settings = settings or SwarmSettings()
        self._shield = Shield()

    async def aclose(self) -> None:
        """Waits for the changes under way."""
        await self._shield.aclose()

    @property
    def managers(self) -> list[str]:
        """The online nodes that manage the swarm, by node_id."""
        online = [(view.node_id, self._fleet.hello(view.node_id)) for view in self._fleet.online()]
        return [node_id for node_id, hello in online if hello is not None and hello.swarm_role == MANAGER]

    async def page(self, request: fleet_pb2.ListServicesRequest) -> tuple[list[types_pb2.SwarmService], str]:
        """Services by name, each with its tasks of now, and the next page's token. INVALID_PAGE_TOKEN."""
        return page_by_name(request, await self.services(), lambda one: (one.name, one.service_id))

    async def services(self) -> list[types_pb2.SwarmService]:
        """All services by name."""
        end = await self._run(command_pb2.Command(list_services=fleet_pb2.ListServicesRequest()))
        return await self.completed(list(end.services.services))

    async def service(self, service_id: str) -> types_pb2.SwarmService:
        """One service, with all the tasks that the swarm remembers."""
        asked = fleet_pb2.GetServiceRequest(service_id=service_id)
        return await self._named(command_pb2.Command(get_service=asked))

    async def scale(self, request: fleet_pb2.ScaleServiceRequest, actor: Actor = NOBODY) -> types_pb2.SwarmService:
        """Changes the number of replicas; tasks that run are kept. SERVICE_NOT_REPLICATED, IDEMPOTENCY_KEY_REUSED."""
        with audited(actor, "scale_service", "", service=request.service_id, replicas=request.replicas):
            command = command_pb2.Command(scale_service=request)
            return await self._once("ScaleService", request, command, actor)

    async def update(self, request: fleet_pb2.UpdateServiceRequest, actor: Actor = NOBODY) -> types_pb2.SwarmService:
        """Changes the image. IMAGE_NOT_FOUND, REGISTRY_UNAVAILABLE, IDEMPOTENCY_KEY_REUSED."""
        with audited(actor, "update_service", "", service=request.service_id, image=request.image):
            command = command_pb2.Command(update_service=request)
            return await self._once("UpdateService", request, command, actor)

    async def rollback(
        self, request: fleet_pb2.RollbackServiceRequest, actor: Actor = NOBODY
    ) -> types_pb2.SwarmService:
        """Goes back to the spec before. NO_PREVIOUS_SPEC, IDEMPOTENCY_KEY_REUSED."""
        with audited(actor, "rollback_service", "", service=request.service_id):
            command = command_pb2.Command(rollback_service=request)
            return await self._once("RollbackService", request, command, actor)

    async def set_replicas(self, service_id: str, replicas: int) -> None:
        """What autoscale does."""
        asked = fleet_pb2.ScaleServiceRequest(service_id=service_id, replicas=replicas)
        await self._run(command_pb2.Command(scale_service=asked))

    async def log(self, request: fleet_pb2.GetServiceLogsRequest) -> list[types_pb2.LogLine]:
        """The last lines of all tasks, oldest first."""
        asked = fleet_pb2.StreamServiceLogsRequest(service_id=request.service_id, tail=request.tail, follow=False)
        for name in ("since", "until"):
            if request.HasField(name):
                getattr(asked, name).CopyFrom(getattr(request, name))
        lines: deque[types_pb2.LogLine] = deque()
        size = 0
        try:
            async with asyncio.timeout(self._settings.command_seconds), aclosing(self.follow(asked)) as following:
                async for line in following:
                    lines.append(line)
                    size += line.ByteSize()
                    while size > self._settings.log_bytes:
                        size -= lines.popleft().ByteSize()
        except TimeoutError:
            raise FleetError(
                "TIMEOUT", f"the log did not come within {self._settings.command_seconds:g} s: ask for fewer lines"
            ) from None
        return list(lines)

    async def follow(self, request: fleet_pb2.StreamServiceLogsRequest) -> AsyncGenerator[types_pb2.LogLine, None]:
        """The last lines, then with `follow` what comes, until the service is removed."""
        command = command_pb2.Command(service_logs=request)
        refusal = _no_manager()
        for node_id in self.managers:
            begun = False
            try:
                async with self._commands.open(node_id, command) as stream:
                    async for part in stream:
                        if part.WhichOneof("part") == "line":
                            begun = True
                            yield part.line
                return
            except FleetError as error:
                if begun or error.reason not in _NEXT:
                    raise
                refusal = error
        raise _refused(refusal)

    async def completed(self, services: list[types_pb2.SwarmService]) -> list[types_pb2.SwarmService]:
        """What the node cannot know is filled in: the fleet's names of machines, and the rules of scaling."""
        rules = await self._rules.rules()
        names = self._node_names()
        for service in services:
            rule = rules.get(service.service_id)
            if rule is not None:
                service.autoscale.ParseFromString(rule)
            for task in service.tasks:
                name = names.get(task.node_id) or names.get(f"host {task.hostname}")
                if name is None:
                    task.ClearField("node_id")
                else:
                    task.node_id = name
        return services

    def _node_names(self) -> dict[str, str]:
        """The fleet's node by its id in the swarm; by its host's name where its agent does not know that."""
        hellos = [hello for view in self._fleet.nodes() if (hello := self._fleet.hello(view.node_id)) is not None]
        hosts = Counter(hello.hostname for hello in hellos)
        found = {
            f"host {one.hostname}": one.node_id for one in hellos if hosts[one.hostname] == 1 and not one.swarm_node_id
        }
        return found | {one.swarm_node_id: one.node_id for one in hellos if one.swarm_node_id}

    async def _once(
        self, method: str, request: Effect, command: command_pb2.Command, actor: Actor
    ) -> types_pb2.SwarmService:
        """A change under its idempotency key, which is the command's identity on the node too; a caller who leaves does
        not stop it."""
        once = idempotency(request, method=f"Fleet/{method}", owner=actor.owner, key=actor.key)
        if once is None:
            return await self._shield.run(self._named(command))

        async def work(operation: str) -> bytes:
            command.command_id = operation
            return (await self._named(command)).SerializeToString()

        reply = await self._shield.run(self._replies.once(once, work))
        return types_pb2.SwarmService.FromString(reply)

    async def _named(self, command: command_pb2.Command) -> types_pb2.SwarmService:
        end = await self._run(command)
        return (await self.completed([end.service]))[0]

    async def _run(self, command: command_pb2.Command) -> command_pb2.CommandEnd:
        refusal = _no_manager()
        for node_id in self.managers:
            try:
                return await self._commands.run(node_id, command, timeout=self._settings.command_seconds)
            except FleetError as error:
                if error.reason not in _NEXT:
                    raise
                refusal = error
        raise _refused(refusal)


def _no_manager() -> FleetError:
    return FleetError(
        "NOT_SWARM_MANAGER",
        "no online node manages a swarm: run `docker swarm init` on a node of the fleet, or start the agent of one "
        "that manages it",
    )


def _refused(last: FleetError) -> FleetError:
    """What all managers said, by the last of them."""
    return last if last.reason == "DOCKER_UNAVAILABLE" else _no_manager()
