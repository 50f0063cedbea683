"""S3 as a user of `fleet up` meets it: on its port at once, back after crashes, and dispensable."""

from __future__ import annotations

import asyncio
import io
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
from minio import Minio

from tests.e2e.fleet_process import FAST, FleetProcess, clean_environment
from tests.e2e.test_starts import running
from tests.ports import free_port
from tests.s3.embedded import ACCESS, SECRET, EmbeddedProcess
from tests.waiting import wait_until

NO_AGENT = ("up", "--no-agent", "--port", "0", "--grpc-port", "0")


def status(fleet: FleetProcess) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{fleet.url}/api/status", timeout=60).json()
    return found


def body(url: str) -> bytes:
    return httpx.get(url, timeout=60).content


def s3_child(fleet: FleetProcess) -> psutil.Process:
    (pid,) = fleet.pids("fleet_server.embedded.s3_server")
    return psutil.Process(pid)


def client(port: int) -> Minio:
    return Minio(f"localhost:{port}", access_key=ACCESS, secret_key=SECRET, region="us-east-1", secure=False)


async def test_it_is_there_at_the_ready_line_and_after_crashes(short_path: Path) -> None:
    """The four buckets, direct URLs, a kill of S3, a kill of everything: the object stays."""
    port = free_port()
    fleet = FleetProcess(short_path / "data", "--s3-port", str(port), command=NO_AGENT)
    await asyncio.to_thread(fleet.start)
    try:
        buckets = await asyncio.to_thread(client(port).list_buckets)
        assert len(buckets) == 4
        client(port).put_object("fleet-outputs", "a.png", io.BytesIO(b"png"), 3, content_type="image/png")
        url = f"http://localhost:{port}/fleet-outputs/a.png"
        assert body(url) == b"png"
        assert status(fleet)["s3"] == {"status": "ok", "detail": None}
        await asyncio.to_thread(s3_child(fleet).kill)
        assert body(url) == b"png"
        left = s3_child(fleet)
        await asyncio.to_thread(fleet.kill)
        await wait_until(lambda: not running(left))
    finally:
        fleet.stop()
    again = FleetProcess(short_path / "data", "--s3-port", str(port), command=NO_AGENT)
    await asyncio.to_thread(again.start)
    try:
        assert body(url) == b"png"
    finally:
        again.stop()


async def test_everything_else_works_without_it_until_it_is_back(short_path: Path) -> None:
    """Your S3 is away: ready, degraded with the reason, pictures are made; then it comes, and all is well."""
    mine = EmbeddedProcess(short_path / "mine")
    fleet = FleetProcess(short_path / "data", environment={"FLEET_S3_ENDPOINT": mine.endpoint})
    await asyncio.to_thread(fleet.start)
    try:
        await wait_until(lambda: (told := status(fleet))["status"] == "degraded" and told["s3"]["status"] != "ok")
        assert status(fleet)["s3"] == {"status": "unavailable", "detail": "connection refused"}
        body = {"prompt": "a lighthouse", "width": 64, "height": 64, "steps": 1}
        made = await asyncio.to_thread(httpx.post, f"{fleet.url}/api/fleet/generate", json=body, timeout=150)
        assert (made.status_code, made.headers["content-type"]) == (200, "image/png")
        await asyncio.to_thread(mine.start)
        await wait_until(lambda: status(fleet)["status"] == "ok")
        assert (await asyncio.to_thread(client(mine.port).bucket_exists, "fleet-models")) is True
    finally:
        fleet.stop()
        mine.stop(signal.SIGTERM)


def test_a_taken_port_that_was_asked_for_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = [*NO_AGENT, "--s3-port", port, "--data-dir", str(tmp_path / "data")]
        done = subprocess.run(
            [sys.executable, "-m", "fleet_client", *words],
            capture_output=True,
            text=True,
            env=clean_environment(FAST),
            timeout=150,
            check=False,
        )
    assert done.returncode == 1
    assert port in done.stderr and "--s3-port" in done.stderr and "Traceback" not in done.stderr
