"""`fleet up --lan`: a key and a token, told once, with which another machine joins; and what is open without a key."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from fleet.v1 import node_pb2, node_pb2_grpc

from tests.e2e.fleet_process import FAST, FleetProcess, clean_environment
from tests.ports import free_ports
from tests.waiting import wait_until_now

READY = re.compile(r"ready at http://\S+?:(\d+) .*gRPC: localhost:(\d+)")
SMALL: dict[str, Any] = {"prompt": "a sunset", "width": 64, "height": 64, "steps": 1}


class LanFleet(FleetProcess):
    """A fleet that listens on all addresses, reached through loopback."""

    pattern = READY

    def told(self, pattern: str) -> list[str]:
        """What the log shows of that shape."""
        return re.findall(pattern, self.log.read_text())


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fleet-lan-") as name:
        yield Path(name)


@contextmanager
def agent(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`fleet agent` in a process of its own, once the server has welcomed it."""
    command = [sys.executable, "-m", "fleet_client", "agent", "--json", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=clean_environment(FAST), text=True)
    try:
        assert process.stdout is not None
        assert any(line.startswith('{"status"') for line in process.stdout), "the agent has not been welcomed"
        yield process
    finally:
        process.terminate()
        process.wait(100)
        assert process.stdout is not None
        process.stdout.close()


def check_doors(fleet: LanFleet) -> None:
    """What moves with HTTP speaks TLS."""
    listening: dict[int, set[str]] = {}
    for one in psutil.Process(fleet.pid).net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN:
            listening.setdefault(one.laddr.port, set()).add(one.laddr.ip.removeprefix("::ffff:"))
    assert listening[fleet.port] == {"0.0.0.0"}
    others = set(listening) - {fleet.port}
    assert fleet.grpc_port in others and len(others) == 2, "gRPC for all, and the door of agents with certificates"
    context = ssl.create_default_context(cafile=str(fleet.folder / "pki" / "ca.pem"))
    context.set_alpn_protocols(["h2"])
    for port in others:
        plain = grpc.insecure_channel(f"127.0.0.1:{port}")
        with plain, pytest.raises(grpc.RpcError) as raised:
            node_pb2_grpc.NodeStub(plain).ListNodes(node_pb2.NodeListNodesRequest(), timeout=60)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        raw = socket.create_connection(("127.0.0.1", port), 60)
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as shaken:
            assert shaken.version() in {"TLSv1.2", "TLSv1.3"}


def test_lan_tells_a_key_and_a_token_once_and_a_machine_joins_with_them(folder: Path) -> None:
    grpc_port, agents_port = free_ports(2)
    doors = ("--port", "0", "--grpc-port", str(grpc_port), "--agents-port", str(agents_port))
    command = ("up", "--lan", "--no-agent", *doors)
    fleet = LanFleet(folder / "data", command=command)
    with fleet:
        wait_until_now(lambda: fleet.told(r"fleet agent --join (\S+)"))
        check_doors(fleet)
        (key,) = set(fleet.told(r"fc_[A-Za-z0-9_-]{43}"))
        (token,) = fleet.told(r"fleet agent --join (\S+)")
        with httpx.Client(base_url=fleet.url, timeout=60) as nobody:
            assert nobody.get("/api/nodes").json()["reason"] == "API_KEY_MISSING"
        with httpx.Client(base_url=fleet.url, headers={"X-API-Key": key}, timeout=60) as caller:
            arguments = ("--node-id", "far", "--data-dir", str(folder / "far"))
            with agent("--join", token, *arguments):
                job = caller.post("/api/fleet/generate", json=SMALL)
                assert (job.status_code, job.headers["content-type"]) == (200, "image/png")
                assert [node["node_id"] for node in caller.get("/api/nodes").json()["nodes"]] == ["far"]
                assert caller.request("DELETE", "/api/nodes/far").json()["reason"] == "NODE_ONLINE"
            made = caller.post("/api/nodes/tokens", headers={"Idempotency-Key": "one"}).json()
            assert caller.post("/api/nodes/tokens", params={"request_id": "one"}).json() == made
            assert set(made) == {"token", "ca_sha256", "expire_time"}
    before = len(fleet.told(r"fc_[A-Za-z0-9_-]{43}"))
    identity = json.loads((folder / "far" / "identity.json").read_text())
    assert identity["agents_server"].rpartition(":")[2] == str(agents_port)
    with LanFleet(folder / "data", command=command) as later:
        assert len(later.told(r"fc_[A-Za-z0-9_-]{43}")) == before, "told once"
        with agent("--data-dir", str(folder / "far")):
            headers = {"X-API-Key": key}
            nodes = httpx.get(f"{later.url}/api/nodes", headers=headers, timeout=60).json()["nodes"]
            assert [(node["node_id"], node["status"]) for node in nodes] == [("far", "online")]


GUARDED = [
    ("POST", "/api/fleet/exec/agx0", {"command": "id"}),
    ("POST", "/api/fleet/deploy", {"node_id": "agx0", "image": "busybox", "name": "x"}),
    ("DELETE", "/api/fleet/deploy/agx0/x", None),
    ("POST", "/api/swarm/services/x/scale?replicas=4", None),
    ("DELETE", "/api/vision/outputs/x.png", None),
    ("POST", "/api/outputs/cleanup?max_age_hours=24", None),
    ("POST", "/api/outputs/move-all-to-s3", None),
    ("POST", "/api/nodes/agx0/cordon", None),
    ("DELETE", "/api/nodes/agx0", None),
    ("POST", "/api/nodes/tokens", None),
    ("POST", "/api/queue/pause", {}),
]


def test_without_auth_everybody_reads_and_submits_and_nothing_else(folder: Path) -> None:
    command = ("up", "--host", "0.0.0.0", "--insecure-no-auth", "--port", "0", "--grpc-port", "0")
    with LanFleet(folder / "data", command=command) as fleet, httpx.Client(base_url=fleet.url, timeout=60) as anybody:
        assert "everybody who reaches this server" in fleet.log.read_text()
        assert anybody.get("/api/nodes").json()["nodes"][0]["status"] == "online", "our own agent has a key"
        assert anybody.post("/api/fleet/generate", json=SMALL).status_code == 200
        receipt = anybody.post("/api/queue/jobs", json={"job_type": "image_gen", "payload": SMALL}).json()
        assert anybody.get(f"/api/queue/jobs/{receipt['job_id']}").status_code == 200
        assert anybody.get("/api/vision/gallery").status_code == 200
        assert anybody.get("/docs").status_code == 200
        for method, path, body in GUARDED:
            answer = anybody.request(method, path, json=body)
            assert (answer.status_code, answer.json()["reason"]) == (401, "API_KEY_MISSING"), path
        custom = {"job_type": "custom", "payload": {"image": "busybox"}}
        assert anybody.post("/api/queue/jobs", json=custom).json()["reason"] == "SCOPE_MISSING"


def test_not_on_loopback_there_is_a_key_or_no_start(folder: Path) -> None:
    command = [sys.executable, "-m", "fleet_client", "up", "--host", "0.0.0.0", "--data-dir", str(folder / "data")]
    ended = subprocess.run(
        command, check=False, env=clean_environment(FAST), capture_output=True, text=True, timeout=150
    )
    assert ended.returncode == 2
    assert "--lan" in ended.stderr


def test_on_loopback_no_token_is_needed_and_that_is_said(folder: Path) -> None:
    with FleetProcess(folder / "data", "--no-agent") as fleet:
        answer = httpx.post(f"{fleet.url}/api/nodes/tokens", timeout=60)
        assert (answer.status_code, answer.json()["reason"]) == (409, "TLS_OFF")
