"""A swarm of two machines under one fleet, for all tests of the file that uses it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import docker
import httpx
import pytest

from tests.docker_daemon import IMAGE, DockerDaemon, Switch, docker_daemon
from tests.e2e.fleet_process import FAST, FleetProcess, clean_environment
from tests.ports import free_port
from tests.swarm.registry import registry

T = TypeVar("T")
QUICK = {
    "FLEET_AGENT_DOCKER_SECONDS": "0.5",
    "FLEET_AUTOSCALE_SECONDS": "0.3",
    "FLEET_AUTOSCALE_CALM_SECONDS": "1.5",
}
REGISTRY, LOCKED_REGISTRY = 5000, 5001


@dataclass
class SwarmFleet:
    """`fleet up` on agx0, which manages the swarm, and an agent on agx1, a worker; two registries beside agx0."""

    fleet: FleetProcess
    manager: DockerDaemon
    worker: DockerDaemon
    engine: docker.DockerClient
    api: httpx.Client
    before: httpx.Response
    """What the list of services was answered while there was no swarm."""
    made: list[Any] = field(default_factory=list)

    @property
    def registry(self) -> str:
        return f"{self.manager.address}:{REGISTRY}"

    @property
    def locked_registry(self) -> str:
        return f"{self.manager.address}:{LOCKED_REGISTRY}"

    def service(self, name: str, *, replicas: int | None = 1, command: str = "exec sleep 100000", **fields: Any) -> str:
        """Makes a service whose tasks run; global without `replicas`. Its id."""
        modes = docker.types.ServiceMode
        made: Any = self.engine.services.create(  # type: ignore[no-untyped-call]
            fields.pop("image", IMAGE),
            ["/bin/sh", "-c", command],
            name=name,
            mode=modes("global") if replicas is None else modes("replicated", replicas=replicas),
            stop_grace_period=1_000_000,
            update_config=docker.types.UpdateConfig(parallelism=0, monitor=50_000_000),
            rollback_config=docker.types.RollbackConfig(parallelism=0, monitor=50_000_000),
            **fields,
        )
        self.made.append(made)
        self.until(lambda: self.running(name) == (2 if replicas is None else replicas))
        return str(made.id)[:12]

    def get(self, name: str) -> dict[str, Any]:
        """The service as the API has it."""
        reply = self.api.get(f"/api/swarm/services/{name}")
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def updated(self, name: str, status: str) -> dict[str, Any]:
        """The service once its update stands so; the engine has a word of it only when it has begun."""
        return self.until(lambda: one if ((one := self.get(name))["update"] or {}).get("status") == status else None)

    def running(self, name: str) -> int:
        return int(self.get(name)["running_replicas"])

    def tasks(self, name: str) -> dict[str, str]:
        """Tasks that run, and their containers."""
        return {
            task["task_id"]: task["container_id"]
            for task in self.get(name)["tasks"]
            if task["status"] == task["desired_status"] == "running"
        }

    @staticmethod
    def until(condition: Callable[[], T | None], seconds: float = 100) -> T:
        """The first true value of the condition."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.2)
        return value

    def clear(self) -> None:
        """Removes the services that were made."""
        while self.made:
            with contextlib.suppress(docker.errors.NotFound):
                self.made.pop().remove()


@pytest.fixture(scope="package")
def swarm_fleet() -> Iterator[SwarmFleet]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp")))
        switch = stack.enter_context(Switch())
        options = ["--insecure-registry=10.231.0.0/24"]
        manager, worker = (
            stack.enter_context(docker_daemon(folder / name, hostname=name, switch=switch, options=options))
            for name in ("agx0", "agx1")
        )
        inside = manager.entering()
        stack.enter_context(registry(folder / "r", f"{manager.address}:{REGISTRY}", within=inside))
        locked = registry(folder / "l", f"{manager.address}:{LOCKED_REGISTRY}", login=True, within=inside)
        stack.enter_context(locked)
        port = free_port()
        stack.enter_context(registry(folder / "r", f"127.0.0.1:{port}"))
        settings = {
            **QUICK,
            "FLEET_AGENT_NODE_ID": "agx0",
            "FLEET_AGENT_DOCKER_HOST": manager.url,
            "FLEET_REGISTRY_URL": f"http://127.0.0.1:{port}",
        }
        fleet = stack.enter_context(FleetProcess(folder / "data", environment=settings))
        stack.enter_context(_agent(folder, "agx1", worker, fleet))
        api = stack.enter_context(httpx.Client(base_url=fleet.url, timeout=60))
        engine = stack.enter_context(contextlib.closing(manager.client()))
        ready = SwarmFleet(fleet, manager, worker, engine, api, api.get("/api/swarm/services"))
        _join(manager, worker, engine)
        roles = {"agx0": "manager", "agx1": "worker"}
        # Else the scheduler puts all tasks on the one that it knows.
        ready.until(lambda: [one.attrs["Status"]["State"] for one in engine.nodes.list()] == ["ready", "ready"])
        ready.until(lambda: {n["node_id"]: n["swarm_role"] for n in api.get("/api/nodes").json()["nodes"]} == roles)
        yield ready


@pytest.fixture
def swarm(swarm_fleet: SwarmFleet) -> Iterator[SwarmFleet]:
    """The swarm, whose services of this test are removed after it."""
    yield swarm_fleet
    swarm_fleet.clear()


def _join(manager: DockerDaemon, worker: DockerDaemon, engine: docker.DockerClient) -> None:
    engine.swarm.init(advertise_addr=manager.address, listen_addr=f"{manager.address}:2377")
    engine.swarm.reload()
    with contextlib.closing(worker.client()) as other:
        other.swarm.join(
            remote_addrs=[f"{manager.address}:2377"],
            join_token=engine.swarm.attrs["JoinTokens"]["Worker"],
            advertise_addr=worker.address,
            listen_addr=f"{worker.address}:2377",
        )


@contextlib.contextmanager
def _agent(folder: Path, node_id: str, daemon: DockerDaemon, fleet: FleetProcess) -> Iterator[None]:
    environment = {
        **FAST,
        **QUICK,
        "FLEET_AGENT_DOCKER_HOST": daemon.url,
        "FLEET_AGENT_NODE_ID": node_id,
        "FLEET_AGENT_DATA_DIR": str(folder / f"agent-{node_id}"),
        "FLEET_AGENT_SERVER": f"127.0.0.1:{fleet.grpc_port}",
        "FLEET_AGENT_READY_JSON": "1",
    }
    with (folder / f"agent-{node_id}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fleet_agent"],
            stdout=subprocess.PIPE,
            stderr=log,
            env=clean_environment(environment),
        )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["node_id"] == node_id
        yield
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
