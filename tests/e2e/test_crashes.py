"""SIGKILL of each part, and of all of them, while jobs wait and run; then start again on the same data.

Each job must end once, with the result of one attempt, `max_retries: 0` included: a lost node is no retry.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet_client import FleetCommander
from fleet_client.errors import FleetError

from tests.e2e.fleet_process import FleetProcess, slowed
from tests.e2e.test_starts import running
from tests.ports import free_ports
from tests.waiting import pause, wait_until_now

JOBS = 5
BUSY: dict[str, Any] = {"width": 768, "height": 768, "steps": 40}


def until(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """The first true value of `condition`; calls that fail while a server is away count as false."""
    begun = time.monotonic()
    while time.monotonic() < begun + seconds:
        with contextlib.suppress(FleetError, httpx.HTTPError):
            value = condition()
            if value:
                return value
        # Each look is some calls, and the fleet has its work to do.
        time.sleep(pause(begun, 0.25))
    raise AssertionError(f"not within {seconds} s: {what}")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fleet-") as path:
        yield Path(path) / "data"


@pytest.fixture(scope="module")
def fleet() -> Iterator[FleetProcess]:
    """One that takes all the blows, and then still stops as it should."""
    port, grpc_port = free_ports(2)
    command = ("up", "--port", str(port), "--grpc-port", str(grpc_port))
    with tempfile.TemporaryDirectory(prefix="fleet-") as path:
        process = FleetProcess(Path(path) / "data", command=command).start()
        yield process
        children = process.children()
        assert process.stop() == 0
        wait_until_now(lambda: not [child for child in children if running(child)])


def submit(client: FleetCommander) -> dict[str, int]:
    """Jobs and their max_retries; every second one may not be retried."""
    return {
        client.queue_job(f"mountain {n}", seed=n, max_retries=3 * (n % 2), **BUSY)["job_id"]: 3 * (n % 2)
        for n in range(JOBS)
    }


def ends(client: FleetCommander, jobs: dict[str, int]) -> list[dict[str, Any]]:
    """The jobs, once all have ended."""
    found = [client.get_job(job_id) for job_id in jobs]
    return found if all(job["end_time"] for job in found) else []


def completions(client: FleetCommander) -> Counter[str]:
    """How many job_complete events each job has had since the beginning."""
    counted: Counter[str] = Counter()
    with client.session.stream("GET", "/api/events", params={"since": "0", "type": "job_complete"}) as response:
        lines = response.iter_lines()
        total = client.queue_stats()["jobs"]
        wanted = total["succeeded"] + total["failed"] + total["cancelled"]
        while counted.total() < wanted:
            counted[json.loads(next(lines))["data"]["job_id"]] += 1
    return counted


def assert_completed_once(client: FleetCommander, jobs: dict[str, int]) -> None:
    counted = completions(client)
    assert {job_id: counted[job_id] for job_id in jobs} == dict.fromkeys(jobs, 1)


def assert_each_ended_once(client: FleetCommander, jobs: dict[str, int]) -> None:
    found = until(lambda: ends(client, jobs), "every job ended")
    for job in found:
        assert job["status"] == "succeeded", job
        assert len(job["result"]["outputs"]) == 1
        assert (
            len(client.get_output(job["result"]["outputs"][0]["filename"]))
            == (job["result"]["outputs"][0]["size_bytes"])
        )
    assert_completed_once(client, jobs)
    gallery = Counter(image["job_id"] for image in client.get_gallery(1000)["images"])
    assert {job_id: gallery[job_id] for job_id in jobs} == dict.fromkeys(jobs, 1)


def kill(pids: list[int]) -> None:
    assert pids, "there is nothing to kill"
    for pid in pids:
        # One that describes engines may have ended by itself.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("part", ["agent", "engine", "store", "server", "all"])
def test_each_job_ends_once_after_a_sigkill(part: str, fleet: FleetProcess) -> None:
    with FleetCommander(fleet.url) as client:
        jobs = submit(client)
        until(lambda: client.status()["jobs"]["running"] == 1, "a job runs")
        parts = {
            "agent": fleet.pids("fleet_agent"),
            "engine": fleet.pids("fleet_agent.slot"),
            "store": fleet.pids("valkey-server"),
            "server": [fleet.pid],
            "all": [fleet.pid, *(child.pid for child in fleet.children())],
        }
        kill(parts[part])
        if part in ("server", "all"):
            fleet.kill()
            fleet.start()
        if part == "engine":
            # An engine that dies is a failed attempt, not a lost node: jobs without retries may fail for it.
            found = until(lambda: ends(client, jobs), "every job ended")
            failed = [job for job in found if job["status"] == "failed"]
            assert all(job["max_retries"] == 0 and job["error"]["reason"] == "ENGINE_FAILED" for job in failed)
            assert len(failed) <= 1
            assert_completed_once(client, jobs)
        else:
            assert_each_ended_once(client, jobs)


def test_the_picture_of_a_second_attempt_is_that_of_the_first(fleet: FleetProcess) -> None:
    with FleetCommander(fleet.url) as client:
        first = client.wait(client.queue_job("forest", seed=11, **BUSY)["job_id"])
        job_id = client.queue_job("forest", seed=11, **BUSY)["job_id"]
        until(lambda: client.get_job(job_id)["status"] == "running", "the job runs")
        kill(fleet.pids("fleet_agent"))
        second = client.wait(job_id)
        pictures = [client.get_output(job["result"]["outputs"][0]["filename"]) for job in (first, second)]
    assert _pixels(pictures[0]) == _pixels(pictures[1])


def _pixels(data: bytes) -> bytes:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").tobytes()


def test_a_result_finished_while_the_server_was_down_is_not_lost(folder: Path) -> None:
    port, grpc_port = free_ports(2)
    command = ("up", "--no-agent", "--port", str(port), "--grpc-port", str(grpc_port))
    agent_folder = folder.parent / "agent"
    agent = FleetProcess(
        agent_folder,
        command=("agent", "--server", f"127.0.0.1:{grpc_port}", "--node-id", "apart", "--engines", "sketch"),
    )
    with FleetProcess(folder, command=command) as fleet, FleetCommander(fleet.url) as client:
        agent.spawn()
        try:
            until(lambda: client.status()["nodes"]["online"] == 1, "the agent is online")
            with slowed(agent.slot()):
                job_id = client.queue_job("sea", max_retries=0, width=1024, height=1024, steps=60)["job_id"]
                until(lambda: client.get_job(job_id)["status"] == "running", "the job runs")
                fleet.kill()
            spool = agent_folder / "spool" / "entries"
            until(lambda: list(spool.glob("*.end")), "the result is in the spool")
            fleet.start()
            job = until(lambda: ends(client, {job_id: 0}), "the job has ended")[0]
            assert (job["status"], job["attempt"], job["attempts"]) == ("succeeded", 1, [])
            until(lambda: not list(spool.iterdir()), "the spool is empty")
        finally:
            agent.stop()
