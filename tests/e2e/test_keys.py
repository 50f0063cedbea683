"""A fleet with a file of keys: owners are names, admins may more, and a change of the file is a change of who may."""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from fleet.v1 import fleet_pb2, fleet_pb2_grpc
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.e2e.fleet_process import FleetProcess
from tests.waiting import wait_until

ANN, BOB, EVE = (secrets.token_hex(16) for _ in range(3))
JOB: dict[str, Any] = {"job_type": "image_gen", "payload": {"prompt": "a", "width": 64, "height": 64, "steps": 1}}


def write_keys(path: Path, *lines: str) -> None:
    """The file, changed at once."""
    fresh = path.with_name("fresh")
    fresh.write_text("\n".join(lines))
    fresh.chmod(0o600)
    fresh.replace(path)


@pytest.fixture(scope="module")
def keys() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        path = Path(folder) / "keys"
        write_keys(path, f"ann:{ANN}:admin", f"bob:{BOB}")
        yield path


@pytest.fixture(scope="module")
def keyed(keys: Path) -> Iterator[FleetProcess]:
    """The agent beside the server needs no key of the file."""
    settings = {"FLEET_API_KEYS_FILE": str(keys)}
    with FleetProcess(keys.parent / "data", environment=settings) as process:
        yield process


def call(fleet: FleetProcess, key: str, method: str, path: str, **options: Any) -> httpx.Response:
    return httpx.request(method, fleet.url + path, headers={"X-API-Key": key}, timeout=60, **options)


def refused(response: httpx.Response, status: int, reason: str) -> str:
    body = response.json()
    assert (response.status_code, body["reason"]) == (status, reason), body
    detail: str = body["detail"]
    return detail


def test_a_job_belongs_to_the_name_of_its_key_and_lists_can_be_read_by_all(keyed: FleetProcess) -> None:
    job_id = call(keyed, BOB, "POST", "/api/queue/jobs", json=JOB).json()["job_id"]
    assert call(keyed, ANN, "GET", f"/api/queue/jobs/{job_id}").json()["owner"] == "bob"
    listed = call(keyed, ANN, "GET", "/api/queue/jobs", params={"owner": "bob"}).json()["jobs"]
    assert job_id in [job["job_id"] for job in listed]
    assert call(keyed, BOB, "GET", "/api/queue/jobs", params={"owner": "ann"}).json()["jobs"] == []


def test_what_an_ordinary_key_may_not_do_is_refused_with_the_scope_that_it_lacks(keyed: FleetProcess) -> None:
    for path in ("/api/queue/pause", "/api/queue/resume", "/api/nodes/tokens", "/api/fleet/exec/n1"):
        body = {"command": "true"} if "exec" in path else None
        assert "scope" in refused(call(keyed, BOB, "POST", path, json=body), 403, "SCOPE_MISSING")
    training = {"job_type": "training", "payload": {"image": "train:1"}}
    custom = {"job_type": "custom", "payload": {"engine": "container"}}
    for job in (training, custom):
        detail = refused(call(keyed, BOB, "POST", "/api/queue/jobs", json=job), 403, "SCOPE_MISSING")
        assert detail == f"job_type: {job['job_type']} jobs need the scope deploy: use an admin key"
    detail = refused(
        call(keyed, BOB, "POST", "/api/queue/jobs/batch", json={"jobs": [JOB, custom]}), 403, "SCOPE_MISSING"
    )
    assert detail.startswith("jobs[1].job_type: ")
    for job in (training, custom):
        assert call(keyed, ANN, "POST", "/api/queue/jobs", json=job).status_code == 200


DEPLOY = {"node_id": "", "image": "app:1", "name": "app"}
MACHINES: list[tuple[str, str, Any, str]] = [
    # What changes machines, and what an admin key hears: it is let through, to a node without a Docker engine.
    ("POST", "/api/fleet/exec/{node}", {"command": "echo done"}, ""),
    ("POST", "/api/fleet/deploy", DEPLOY, "DOCKER_UNAVAILABLE"),
    ("DELETE", "/api/fleet/deploy/{node}/app", None, "DOCKER_UNAVAILABLE"),
    ("POST", "/api/swarm/services/app/scale?replicas=2", None, "NOT_SWARM_MANAGER"),
    ("POST", "/api/swarm/services/app/update", {"image": "app:2"}, "NOT_SWARM_MANAGER"),
    ("POST", "/api/swarm/services/app/rollback", None, "NOT_SWARM_MANAGER"),
    ("POST", "/api/swarm/services/app/autoscale", {"max_replicas": 2}, "NOT_SWARM_MANAGER"),
    ("POST", "/api/nodes/{node}/cordon", None, ""),
    ("POST", "/api/nodes/{node}/drain", {"deadline_seconds": 0}, ""),
    ("POST", "/api/nodes/{node}/uncordon", None, ""),
    ("PATCH", "/api/nodes/{node}", {"labels": {"zone": "a"}}, ""),
    ("DELETE", "/api/nodes/{node}", None, "NODE_ONLINE"),
]


def test_machines_are_for_admin_keys_and_looking_at_them_for_all(keyed: FleetProcess) -> None:
    node = call(keyed, BOB, "GET", "/api/nodes").json()["nodes"][0]["node_id"]
    for method, path, body, reason in MACHINES:
        where, what = path.format(node=node), {**DEPLOY, "node_id": node} if body is DEPLOY else body
        detail = refused(call(keyed, BOB, method, where, json=what), 403, "SCOPE_MISSING")
        assert "the scope" in detail, where
        allowed = call(keyed, ANN, method, where, json=what)
        assert (allowed.json().get("reason", ""), allowed.status_code == 200) == (reason, not reason), allowed.text
    assert call(keyed, BOB, "GET", "/api/fleet/deploy").json()["containers"] == []
    logs = call(keyed, BOB, "GET", f"/api/fleet/logs/{node}/app")
    assert logs.json()["reason"] == "DOCKER_UNAVAILABLE", "it may look"


def test_programs_that_one_stays_connected_to_are_for_admin_keys(keyed: FleetProcess) -> None:
    node = call(keyed, BOB, "GET", "/api/nodes").json()["nodes"][0]["node_id"]
    start = fleet_pb2.ExecStreamRequest(node_id=node, start=fleet_pb2.ExecStart(command="echo done"))
    with grpc.insecure_channel(f"localhost:{keyed.grpc_port}") as channel:
        stub = fleet_pb2_grpc.FleetStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ExecStream(iter([start]), metadata=(("x-api-key", BOB),)))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        allowed = list(stub.ExecStream(iter([start]), metadata=(("x-api-key", ANN),)))
        assert allowed[0].stdout == b"done\n"
    address = f"ws://localhost:{keyed.port}/api/fleet/exec/{node}/stream"
    for key, status in ((BOB, 403), ("", 401)):
        with pytest.raises(InvalidStatus) as closed:
            connect(address, open_timeout=60, additional_headers={"X-API-Key": key} if key else {})
        assert closed.value.response.status_code == status
    with connect(address, open_timeout=60, additional_headers={"X-API-Key": ANN}) as socket:
        socket.send(json.dumps({"start": {"command": "echo done"}}))
        assert base64.b64decode(json.loads(socket.recv())["stdout"]) == b"done\n"


def test_a_change_of_the_file_counts_at_once_and_a_spoiled_file_changes_nothing(
    keyed: FleetProcess, keys: Path
) -> None:
    refused(call(keyed, EVE, "GET", "/api/nodes"), 401, "API_KEY_INVALID")
    write_keys(keys, f"ann:{ANN}:admin", f"eve:{EVE}")
    os.kill(keyed.pid, signal.SIGHUP)
    # Asked with a key that is good until then: after ten wrong ones every further one is refused as too many.
    wait_until_now(lambda: call(keyed, BOB, "GET", "/api/nodes").status_code != 200)
    refused(call(keyed, BOB, "GET", "/api/nodes"), 401, "API_KEY_INVALID")
    assert call(keyed, EVE, "GET", "/api/nodes").status_code == 200
    # The agent's own key is not of the file, so it is still there.
    assert call(keyed, ANN, "GET", "/api/nodes").json()["nodes"][0]["status"] == "online"
    write_keys(keys, "nonsense")
    os.kill(keyed.pid, signal.SIGHUP)
    wait_until_now(lambda: f"{keys}:1" in keyed.log.read_text())
    assert call(keyed, EVE, "GET", "/api/nodes").status_code == 200
    assert not {ANN, BOB, EVE} & set(keyed.log.read_text().split())


def test_streams_of_a_withdrawn_key_end_and_those_of_others_go_on(keyed: FleetProcess, keys: Path) -> None:
    write_keys(keys, f"ann:{ANN}:admin", f"eve:{EVE}")
    os.kill(keyed.pid, signal.SIGHUP)
    wait_until_now(lambda: call(keyed, EVE, "GET", "/api/nodes").status_code == 200)
    address = f"ws://localhost:{keyed.port}/ws"
    metadata = (("x-api-key", EVE),)
    with (
        connect(address, open_timeout=60, additional_headers={"X-API-Key": EVE}) as withdrawn,
        connect(address, open_timeout=60, additional_headers={"X-API-Key": ANN}) as kept,
        grpc.insecure_channel(f"localhost:{keyed.grpc_port}") as channel,
    ):
        events = fleet_pb2_grpc.FleetStub(channel).WatchEvents(fleet_pb2.WatchEventsRequest(), metadata=metadata)
        # Once its headers have come it hears of everything.
        events.initial_metadata()
        call(keyed, ANN, "POST", "/api/queue/jobs", json=JOB)
        next(events)
        write_keys(keys, f"ann:{ANN}:admin")
        os.kill(keyed.pid, signal.SIGHUP)
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                withdrawn.recv(timeout=60)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
        with pytest.raises(grpc.RpcError) as caught:
            for _ in events:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        job_id = call(keyed, ANN, "POST", "/api/queue/jobs", json=JOB).json()["job_id"]
        while job_id not in str(kept.recv(timeout=60)):
            pass


def wait_until_now(check: Any) -> None:
    """As `wait_until`, from a test that is no coroutine."""
    import asyncio

    asyncio.run(wait_until(check))
