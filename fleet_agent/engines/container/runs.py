"""Containers of jobs: made as deploys are, with the job's folders besides, and not started again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import docker
from docker.types import Mount
from fleet.v1 import fleet_pb2, types_pb2

from fleet_agent.commands.faults import CommandFault
from fleet_agent.containers.containers import ContainerLimits, Containers
from fleet_agent.containers.messages import MANAGED, PREFIX
from fleet_agent.containers.mounts import BindMount, MountPolicy
from fleet_agent.docker_engine import DockerEngine

JOB = f"{PREFIX}job_id"


class JobContainers(Containers):
    """One job's container. It is no deploy: nobody removes it by DELETE /api/fleet/deploy."""

    def __init__(
        self,
        node_id: str,
        engine: DockerEngine,
        policy: MountPolicy,
        limits: ContainerLimits,
        *,
        job_id: str,
        mounts: Sequence[Mount],
    ) -> None:
        super().__init__(node_id, engine, policy, limits)
        self._job_id = job_id
        self._own = list(mounts)
        self._starting = threading.Lock()
        self._abandoned = False

    def abandon(self) -> None:
        """Nothing is started after this returns; what was being started has been. Blocks."""
        self._abandoned = True
        with self._starting:
            pass

    def _options(
        self, request: fleet_pb2.DeployContainerRequest, mounts: list[BindMount], command_id: str
    ) -> dict[str, Any]:
        options = super()._options(request, mounts, command_id)
        options["mounts"] += self._own
        options["labels"] = {
            **{name: text for name, text in options["labels"].items() if name != MANAGED},
            JOB: self._job_id,
        }
        options["restart_policy"] = {"Name": "no"}
        return options

    def _start(
        self, client: docker.DockerClient, options: dict[str, Any], mounts: list[BindMount]
    ) -> types_pb2.Container:
        # A thread cannot be cancelled: what it starts must not come after the job's end.
        with self._starting:
            if self._abandoned:
                raise CommandFault("CONTAINER_NOT_RUNNING", "the job was cancelled before its container was started")
            return super()._start(client, options, mounts)
