"""S3 is away while pictures are made, the server is killed twice: all reach S3 unharmed, none is removed before."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
from fleet_client import FleetCommander, FleetError

from fleet_server.storage.buckets import OUTPUTS
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import S3Config
from tests.e2e.fleet_process import FleetProcess
from tests.ports import free_ports
from tests.s3.embedded import ACCESS, SECRET, EmbeddedProcess

GENERATIONS = int(os.environ.get("FLEET_SOAK_GENERATIONS", "40"))
"""`make soak` makes 500."""
START_SECONDS = 150.0

IMPATIENT = {
    # Copies and cleanups come as often as they can, and nothing is too young to be removed.
    "FLEET_OUTPUT_SYNC_SECONDS": "0.2",
    "FLEET_OUTPUT_MAX_AGE_HOURS": "0.0000001",
    "FLEET_OUTPUT_RESERVE_BYTES": "0",
}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as path:
        yield Path(path)


def on_disk(fleet: FleetProcess) -> set[str]:
    return {path.name for path in (fleet.folder / "outputs").iterdir() if not path.name.startswith(".")}


def made(client: FleetCommander) -> dict[str, str]:
    """The hash of each output, as its job says."""
    found: dict[str, str] = {}
    token = ""
    while True:
        page = client.list_jobs(status="succeeded", limit=100, page_token=token)
        found |= {one["filename"]: one["sha256"] for job in page["jobs"] for one in job["result"]["outputs"]}
        token = page["next_page_token"]
        if not token:
            return found


def succeeded(client: FleetCommander, count: int) -> bool:
    return int(client.status()["jobs"]["succeeded"]) >= count


def until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Returns when it is so. Looks seldom: each look is work for the server that is to get on."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(FleetError, httpx.HTTPError):
            if condition():
                return
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds:g} s: {what}")


async def hashes(endpoint: str) -> dict[str, str]:
    """What the bucket holds, read back."""
    s3 = S3Store(S3Config(endpoint, ACCESS, SECRET))
    await s3.open()
    await s3.wait_well()
    try:
        found: dict[str, str] = {}
        while objects := await s3.list(OUTPUTS, after=max(found, default="")):
            for one in objects:
                found[one.key] = hashlib.sha256(await s3.read(OUTPUTS, one.key, limit=1 << 24)).hexdigest()
        return found
    finally:
        await s3.aclose()


@pytest.mark.timeout(6 * START_SECONDS + 4 * GENERATIONS)
def test_all_pictures_reach_s3_and_none_is_removed_before(folder: Path) -> None:
    bucket = EmbeddedProcess(folder / "s3").start()
    port, grpc_port = free_ports(2)
    fleet = FleetProcess(
        folder / "data",
        command=("up", "--no-agent", "--port", str(port), "--grpc-port", str(grpc_port)),
        environment={**IMPATIENT, "FLEET_S3_ENDPOINT": bucket.endpoint},
    )
    agent = FleetProcess(
        folder / "node",
        command=("agent", "--server", f"127.0.0.1:{grpc_port}", "--engines", "sketch"),
    )
    try:
        agent.spawn()
        fleet.start(START_SECONDS)
        with FleetCommander(fleet.url) as client:
            until(lambda: client.status()["s3"]["status"] == "ok", "S3 is there", 150)
            bucket.stop()
            picture = {"prompt": "a picture that must not be lost", "width": 256, "height": 256, "steps": 4}
            jobs = [{"job_type": "image_gen", "payload": {**picture, "seed": seed}} for seed in range(GENERATIONS)]
            client.submit_batch(jobs)
        for share in (GENERATIONS // 3, 2 * GENERATIONS // 3, GENERATIONS):
            with FleetCommander(fleet.url) as client:
                done = partial(succeeded, client, share)
                until(done, f"{share} pictures", 150 + 2 * GENERATIONS)
                assert set(made(client)) <= on_disk(fleet), "with S3 away nothing may leave the disk"
                assert client.output_stats()["s3"]["files"] == 0
            if share < GENERATIONS:
                fleet.kill()
                if share == 2 * GENERATIONS // 3:
                    # The first time the agent goes on by itself, with what it has made meanwhile.
                    agent.kill()
                    agent.spawn()
                fleet.start(START_SECONDS)
        with FleetCommander(fleet.url) as client:
            pictures = made(client)
            assert len(pictures) == GENERATIONS
            bucket.start()
            until(lambda: client.output_stats()["unsynced"]["files"] == 0, "all are in S3", 150 + GENERATIONS)
            assert asyncio.run(hashes(bucket.endpoint)) == pictures
            # A file goes first, and then what the index says of it.
            until(lambda: client.output_stats()["local"]["files"] == 0, "the disk is cleaned up", 150)
            assert not on_disk(fleet)
            stats = client.output_stats()
            assert (stats["s3"]["files"], stats["failures"]) == (GENERATIONS, [])
            name, sha256 = next(iter(pictures.items()))
            assert hashlib.sha256(client.get_output(name)).hexdigest() == sha256
    finally:
        agent.stop()
        fleet.stop()
        bucket.stop()
