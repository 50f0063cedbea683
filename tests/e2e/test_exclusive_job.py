"""An exclusive job whose agent is stopped dead: over there it has ended before it begins elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.e2e.fleet_process import FAST, FleetProcess, clean_environment
from tests.waiting import wait_until

SLOW = {"prompt": "a harbour", "width": 2048, "height": 2048, "steps": 150}


@contextmanager
def agent(fleet: FleetProcess, folder: Path, node_id: str) -> Iterator[psutil.Process]:
    """A node of its own."""
    words = [
        "agent",
        "--server",
        f"localhost:{fleet.grpc_port}",
        "--node-id",
        node_id,
        "--data-dir",
        str(folder / node_id),
    ]
    with (folder / f"{node_id}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fleet_client", *words], stderr=log, stdout=log, env=clean_environment(FAST)
        )
    try:
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def soon(check: Any, seconds: float = 120) -> Any:
    return asyncio.run(wait_until(check, seconds=seconds))


def slots_of(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            words = child.cmdline()
            if "fleet_agent.slot" in words and "--describe" not in words:
                found.append(child)
    return found


def dead(processes: list[psutil.Process]) -> bool:
    return all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes)


def test_its_attempts_never_overlap() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-")))
        fleet = stack.enter_context(FleetProcess(folder / "data", "--no-agent"))
        client = stack.enter_context(httpx.Client(base_url=fleet.url, timeout=60))
        agents = {name: stack.enter_context(agent(fleet, folder, name)) for name in ("one", "two")}
        soon(lambda: len(client.get("/api/nodes?status=online").json()["nodes"]) == 2)
        body = {"job_type": "image_gen", "payload": SLOW, "exclusive": True}
        job_id = client.post("/api/queue/jobs", json=body).json()["job_id"]

        def job() -> dict[str, Any]:
            found: dict[str, Any] = client.get(f"/api/queue/jobs/{job_id}").json()
            return found

        first = soon(lambda: found if (found := job())["start_time"] else None)
        holder = agents[first["node_id"]]
        slots = slots_of(holder)
        assert slots
        os.kill(holder.pid, signal.SIGSTOP)
        # Not even its agent can end the engine now; the kernel does.
        soon(lambda: dead(slots))
        ended = time.time()
        second = soon(
            lambda: (
                found if (found := job())["node_id"] not in (None, first["node_id"]) and found["start_time"] else None
            )
        )
        assert second["node_id"] in agents and second["start_time"] != first["start_time"]
        assert datetime.fromisoformat(second["start_time"]).timestamp() > ended - 0.02
        assert client.delete(f"/api/queue/jobs/{job_id}").status_code == 200
