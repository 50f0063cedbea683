"""The engine: a container run from its image to its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import requests
from docker.errors import APIError, DockerException, NotFound
from docker.types import Mount
from fleet.v1 import types_pb2

from fleet_agent.commands.faults import UNKNOWN, CommandFault
from fleet_agent.containers.containers import ContainerLimits
from fleet_agent.containers.image_roots import ImagePolicy
from fleet_agent.containers.mounts import MountPolicy
from fleet_agent.docker_client import connected_client
from fleet_agent.docker_engine import DEFAULT_URL, DockerEngine
from fleet_agent.engines.base import (
    Cancelled,
    EngineError,
    EngineInfo,
    EngineResult,
    EngineSettings,
    LoadedModel,
    LoraUse,
    ModelFile,
    Reason,
    Reporter,
    Task,
)
from fleet_agent.engines.container.folders import JobFolders, forget_old
from fleet_agent.engines.container.output import ContainerOutput
from fleet_agent.engines.container.progress import Lines, percent_of
from fleet_agent.engines.container.request import PREFIX, deploy_of, payload_of
from fleet_agent.engines.container.runs import JobContainers
from fleet_agent.engines.leftovers import Leftovers

NAME = "container"
_STEP_SECONDS = 0.1
_TRY_AGAIN = frozenset(
    {"DOCKER_UNAVAILABLE", "REGISTRY_UNAVAILABLE", "GPU_UNAVAILABLE", "DISK_FULL", "NAME_IN_USE", "IMAGE_NOT_FOUND"}
)


class ContainerEngine:
    """Options `docker_host`, `mount_roots`, `image_roots`, `container_pids` and `node_id` are the agent's settings."""

    def __init__(self, settings: EngineSettings) -> None:
        options = settings.options
        self._data = settings.data_folder
        self._url = options.get("docker_host") or os.environ.get("DOCKER_HOST") or DEFAULT_URL
        roots = [Path(root) for root in options.get("mount_roots", "").split(",") if root]
        door = self._url.partition("unix://")[2]
        self._policy = MountPolicy(roots, [self._data, *([Path(door)] if door else [])])
        images = ImagePolicy(root for root in options.get("image_roots", "").split(",") if root)
        self._limits = ContainerLimits(pids=int(options.get("container_pids", "4096")), images=images)
        self._node_id = options.get("node_id", "")
        self._leftovers = Leftovers(self._data / "container-jobs")

    def info(self) -> EngineInfo:
        with self._client() as client:
            version = str(client.version().get("Version", ""))
            self._leftovers.end(lambda name: _removed(client, name))
        forget_old(self._data)
        detail = f"at {self._url}"
        return EngineInfo(NAME, version, ("training", "custom"), detail=detail, refresh_seconds=30)

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        """The image is brought when the job runs."""
        return LoadedModel("", 0, 0.0)

    def unload(self, model: str) -> None:
        return None

    def loaded(self) -> list[LoadedModel]:
        return []

    def estimate(self, task: Task) -> int:
        return 0

    def run(self, task: Task, report: Reporter) -> EngineResult:
        payload = payload_of(task)
        folders = JobFolders(self._data, task)
        folders.make()
        request = deploy_of(task, payload)
        report.progress(0, 100)
        with self._client() as client:
            self._leftovers.end(lambda name: _removed(client, name))
            # An attempt before this one, on a node whose agent was replaced meanwhile.
            _removed(client, request.name)
            self._leftovers.note(request.name)
            try:
                self._started(task, request, folders, report)
                result = self._ended(client, request.name, payload, folders, report)
            except Cancelled:
                _stopped(client, request.name, payload.stop_grace_seconds)
                raise
            finally:
                self._tidied(client, request.name)
        # The last of all: whatever ends this process before has the next attempt go on from there.
        folders.forget()
        return result

    def _tidied(self, client: docker.DockerClient, name: str) -> None:
        """The container is gone, or noted for who comes next. The job's own end is what counts: nothing is raised."""
        try:
            gone = _removed(client, name)
        except (DockerException, requests.exceptions.RequestException):
            gone = False
        if gone:
            self._leftovers.done()
        else:
            self._leftovers.give_up()

    def _started(self, task: Task, request: Any, folders: JobFolders, report: Reporter) -> None:
        """Pulls the image and starts the container. Raises EngineError; `Cancelled` passes."""
        mounts = (
            Mount("/inputs", str(folders.inputs), type="bind", read_only=True),
            Mount("/outputs", str(folders.outputs), type="bind"),
            Mount("/checkpoints", str(folders.checkpoints), type="bind"),
        )

        async def tell(done: int, total: int, words: str) -> None:
            report.progress(0, 100, words)

        async def deploy() -> None:
            engine = DockerEngine(self._url, threads=4)
            containers = JobContainers(
                self._node_id, engine, self._policy, self._limits, job_id=task.job_id, mounts=mounts
            )
            deploying = asyncio.create_task(containers.deploy(request, f"job-{task.job_id}", tell))
            try:
                while not deploying.done():
                    await asyncio.wait({deploying}, timeout=_STEP_SECONDS)
                    report.check()
                deploying.result()
            finally:
                deploying.cancel()
                await asyncio.gather(deploying, return_exceptions=True)
                await asyncio.to_thread(containers.abandon)
                await engine.close()

        try:
            asyncio.run(deploy())
        except CommandFault as fault:
            if fault.reason == UNKNOWN:
                # Whatever came of it, the next attempt removes it first.
                words = "the Docker engine went away while it started the container"
                raise EngineError("DOCKER_UNAVAILABLE", words, retryable=True) from fault
            reason = Reason(fault.reason) if fault.reason in Reason.__members__ else Reason.ENGINE_FAILED
            raise EngineError(reason, str(fault), fault.reason in _TRY_AGAIN) from fault

    def _ended(
        self,
        client: docker.DockerClient,
        name: str,
        payload: types_pb2.ContainerPayload,
        folders: JobFolders,
        report: Reporter,
    ) -> EngineResult:
        """What the container leaves when it has ended. Raises EngineError where that is a failure."""
        lines, percent = Lines(), 0
        with ContainerOutput(self._url, name, lambda: _runs(client, name)) as output:
            for data in output.pieces(report):
                for line in lines.heard(data) if data is not None else lines.rest():
                    percent = max(percent, percent_of(line) or 0)
                    report.progress(percent, 100, line)
        state = _final_state(client, name, report)
        code = int(state.get("ExitCode", 1))
        result = EngineResult(exit_code=code)
        if state.get("OOMKilled"):
            words = f"the container needed more than its {payload.memory_bytes:,} bytes of memory"
            raise EngineError(Reason.OUT_OF_MEMORY, words, retryable=True, result=result)
        if code != 0:
            last = "\n".join(lines.last)
            words = f"the container ended with exit code {code}"
            raise EngineError(Reason.EXIT_NONZERO, f"{words}: {last}"[:2000], retryable=True, result=result)
        outputs = tuple(folders.collected())
        report.progress(100, 100)
        return EngineResult(outputs, exit_code=code)

    @contextlib.contextmanager
    def _client(self) -> Iterator[docker.DockerClient]:
        """The engine, for plain calls. Raises EngineError where it is away, or fails in between."""
        try:
            client = connected_client(self._url)
        except (DockerException, requests.exceptions.RequestException) as error:
            raise _away(error) from error
        try:
            yield client
        except (DockerException, requests.exceptions.RequestException) as error:
            raise _away(error) from error
        finally:
            client.close()


def _final_state(client: docker.DockerClient, name: str, report: Reporter) -> dict[str, Any]:
    """The container's state when it has ended. Raises EngineError where somebody removed it; `Cancelled` passes."""
    while True:
        report.check()
        try:
            state: dict[str, Any] = client.api.inspect_container(name)["State"]
        except NotFound:
            raise EngineError("ENGINE_FAILED", "the container was removed by somebody", retryable=True) from None
        if not state.get("Running") and not state.get("Restarting"):
            return state
        time.sleep(_STEP_SECONDS)


def _runs(client: docker.DockerClient, name: str) -> bool:
    try:
        return bool(client.api.inspect_container(name)["State"]["Running"])
    except NotFound:
        return False


def _stopped(client: docker.DockerClient, name: str, grace_seconds: int) -> None:
    """Asks the container to end, and ends it after the grace."""
    with contextlib.suppress(DockerException, requests.exceptions.RequestException):
        # The answer comes after the grace at the latest.
        client.api.timeout = grace_seconds + 30
        client.containers.get(name).stop(timeout=grace_seconds)


def _removed(client: docker.DockerClient, name: str) -> bool:
    """Removes a job's container, whatever it does; whether it is gone, or no job's. Raises where the engine is away."""
    try:
        if name.startswith(PREFIX):
            client.containers.get(name).remove(force=True, v=True)
    except NotFound:
        return True
    except APIError:
        return False
    return True


def _away(error: Exception) -> EngineError:
    words = " ".join(str(error).split())[:500]
    return EngineError("DOCKER_UNAVAILABLE", f"the Docker engine does not answer: {words}", retryable=True)
