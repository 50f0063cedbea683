"""Who may call, from where, and what is refused: with real processes on real ports."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from fleet.v1 import node_pb2, node_pb2_grpc
from fleet_client import FleetCommander
from grpc_health.v1 import health_pb2
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.e2e.fleet_process import FleetProcess

KEY = secrets.token_hex(32)
WRONG = secrets.token_hex(32)
SMALL: dict[str, Any] = {"prompt": "a sunset", "width": 64, "height": 64, "steps": 1}
OPEN_READY = re.compile(r"ready at http://\S+?:(\d+) .*gRPC: localhost:(\d+)")


class OpenFleet(FleetProcess):
    """`fleet up` on all addresses of this machine, with a key; reached through loopback alone."""

    pattern = OPEN_READY

    def __init__(self, folder: Path) -> None:
        settings = {
            "FLEET_HOST": "0.0.0.0",
            "FLEET_API_KEY": KEY,
            "FLEET_ALLOWED_HOSTS": "fleet.example other.example:9000",
            "FLEET_ALLOWED_ORIGINS": "https://panel.example",
            "FLEET_LOG_LEVEL": "debug",
        }
        super().__init__(folder, environment=settings)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def keyed() -> Iterator[OpenFleet]:
    folder = Path(tempfile.mkdtemp(prefix="fleet-posture-", dir="/tmp")) / "data"
    folder.parent.chmod(0o755)
    process = OpenFleet(folder)
    try:
        with process:
            yield process
    finally:
        subprocess.run(["rm", "-rf", str(folder.parent)], check=True)


def channel_to(fleet: FleetProcess) -> grpc.Channel:
    """Not on loopback, gRPC speaks TLS; the server's authority lies in its folder."""
    authority, address = fleet.folder / "pki" / "ca.pem", f"127.0.0.1:{fleet.grpc_port}"
    if not authority.exists():
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority.read_bytes()))


ADDRESSES = (f"127.0.1.{number}" for number in range(1, 255))


def caller(fleet: FleetProcess, address: str = "127.0.0.1") -> httpx.Client:
    """A client that calls from that address of this machine: wrong keys count for the address that they come from."""
    return httpx.Client(base_url=fleet.url, transport=httpx.HTTPTransport(local_address=address), timeout=60)


def get(
    fleet: FleetProcess, path: str, headers: Mapping[str, str] | None = None, address: str = "127.0.0.1"
) -> httpx.Response:
    """The head of a reply; a stream's body is not waited for."""
    with caller(fleet, address) as client, client.stream("GET", path, headers=dict(headers or {})) as response:
        if "event-stream" not in response.headers.get("content-type", ""):
            response.read()
        return response


def refused(response: httpx.Response, status: int, reason: str) -> str:
    """The detail of a refusal in the one shape of errors."""
    body = response.json()
    assert (response.status_code, body["reason"]) == (status, reason), body
    detail: str = body["detail"]
    return detail


def list_nodes(fleet: FleetProcess, *metadata: tuple[str, str]) -> list[str]:
    with channel_to(fleet) as channel:
        reply = node_pb2_grpc.NodeStub(channel).ListNodes(
            node_pb2.NodeListNodesRequest(), metadata=metadata, timeout=60, wait_for_ready=True
        )
    return [node.node_id for node in reply.nodes]


DOORS = [
    "/",
    "/docs",
    "/openapi.json",
    "/metrics",
    "/api/fleet/status",
    "/api/fleet/connect",
    "/api/nodes",
    "/api/events",
]
GIVEN = [{"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer {KEY}"}]


@pytest.mark.parametrize("path", DOORS)
def test_on_loopback_no_key_is_needed(fleet: FleetProcess, path: str) -> None:
    assert get(fleet, path, {"Accept": "text/event-stream, */*"}).status_code == 200
    # One that is sent all the same does no harm.
    assert get(fleet, path, {"X-API-Key": WRONG, "Accept": "text/event-stream, */*"}).status_code == 200


def test_on_loopback_grpc_needs_no_key(fleet: FleetProcess) -> None:
    assert list_nodes(fleet)


@pytest.mark.parametrize("path", DOORS)
def test_every_door_asks_for_the_key(keyed: OpenFleet, path: str) -> None:
    accept = {"Accept": "text/event-stream, */*"}
    assert "X-API-Key" in refused(get(keyed, path, accept), 401, "API_KEY_MISSING")
    wrong = get(keyed, path, {**accept, "X-API-Key": WRONG}, address=next(ADDRESSES))
    assert "FLEET_API_KEY" in refused(wrong, 401, "API_KEY_INVALID")
    for headers in GIVEN:
        assert get(keyed, path, {**accept, **headers}).status_code == 200


def test_a_key_in_the_address_is_none(keyed: OpenFleet) -> None:
    for name in ("api_key", "key", "token"):
        assert get(keyed, f"/api/nodes?{name}={KEY}").status_code in (400, 401)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/fleet/generate", SMALL),
        ("POST", "/api/queue/jobs", {"job_type": "custom", "payload": {}}),
        ("DELETE", "/api/queue/jobs/x", None),
        ("DELETE", "/api/vision/outputs/x", None),
        ("PATCH", "/api/vision/outputs/x", {"starred": True}),
    ],
)
def test_calls_that_change_something_ask_for_the_key(keyed: OpenFleet, method: str, path: str, body: Any) -> None:
    with caller(keyed) as client:
        refused(client.request(method, path, json=body), 401, "API_KEY_MISSING")


def test_health_needs_no_key_and_says_nothing_more(keyed: OpenFleet) -> None:
    assert get(keyed, "/health").json() == {"status": "ok", "version": "1.0.0"}


def test_connect_checks_the_key(keyed: OpenFleet) -> None:
    with caller(keyed, next(ADDRESSES)) as client:
        path = "/api/fleet/connect"
        assert client.post(path, json={"api_key": KEY}).json()["status"] == "connected"
        refused(client.post(path, json={"api_key": WRONG}), 401, "API_KEY_INVALID")


def test_the_websocket_asks_before_the_upgrade(keyed: OpenFleet) -> None:
    url = f"ws://127.0.0.1:{keyed.port}/ws"
    assert websocket_status(keyed, url, {}) == 401
    assert websocket_status(keyed, url, {"X-API-Key": WRONG}, address=next(ADDRESSES)) == 401
    for headers in GIVEN:
        assert websocket_status(keyed, url, headers) == 101


def test_grpc_asks_for_the_key(keyed: OpenFleet) -> None:
    for metadata in ((), (("x-api-key", WRONG),)):
        with pytest.raises(grpc.RpcError) as raised:
            list_nodes(keyed, *metadata)
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert list_nodes(keyed, ("x-api-key", KEY))
    assert list_nodes(keyed, ("authorization", f"Bearer {KEY}"))


def test_grpc_health_is_open_as_over_rest(keyed: OpenFleet) -> None:
    with channel_to(keyed) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        reply = check(health_pb2.HealthCheckRequest(), timeout=60)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_the_agent_beside_the_server_has_the_key(keyed: OpenFleet) -> None:
    with FleetCommander(keyed.url, api_key=KEY) as client:
        assert [node["status"] for node in client.list_nodes()["nodes"]] == ["online"]
        assert client.generate_image(**SMALL).size == (64, 64)


def test_wrong_keys_are_limited_for_each_caller(keyed: OpenFleet) -> None:
    with caller(keyed, next(ADDRESSES)) as guesser, caller(keyed, next(ADDRESSES)) as neighbour:
        answers = [guesser.get("/api/nodes", headers={"X-API-Key": secrets.token_hex(8)}) for _ in range(9)]
        answers.append(guesser.post("/api/fleet/connect", json={"api_key": secrets.token_hex(8)}))
        assert {answer.status_code for answer in answers} == {401}
        for answer in (
            guesser.get("/api/nodes", headers={"X-API-Key": WRONG}),
            guesser.post("/api/fleet/connect", json={"api_key": WRONG}),
        ):
            refused(answer, 429, "RATE_LIMITED")
            assert 0 < int(answer.headers["retry-after"]) <= 60
        assert neighbour.get("/api/nodes", headers={"X-API-Key": KEY}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("fleet.example", 200),
        ("FLEET.example:1234", 200),
        ("other.example:9000", 200),
        ("other.example:9001", 403),
        ("evil.example", 403),
        ("fleet.example.evil.example", 403),
        ("localhost", 200),
        ("127.0.0.1:8765", 200),
        ("0x7f000001", 403),
    ],
)
def test_hosts(keyed: OpenFleet, host: str, status: int) -> None:
    answer = get(keyed, "/health", {"Host": host})
    assert answer.status_code == status
    if status == 403:
        assert "FLEET_ALLOWED_HOSTS" in refused(answer, 403, "HOST_FORBIDDEN")
    url = f"ws://{host}/ws"
    assert websocket_status(keyed, url, {"X-API-Key": KEY}) == (101 if status == 200 else 403)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://panel.example", 200),
        ("https://panel.example:443", 200),
        ("http://panel.example", 403),
        ("https://evil.example", 403),
        ("null", 403),
    ],
)
def test_origins(keyed: OpenFleet, origin: str, status: int) -> None:
    answer = get(keyed, "/health", {"Origin": origin})
    assert answer.status_code == status
    if status == 403:
        assert "FLEET_ALLOWED_ORIGINS" in refused(answer, 403, "ORIGIN_FORBIDDEN")
    url = f"ws://127.0.0.1:{keyed.port}/ws"
    headers = {"X-API-Key": KEY, "Origin": origin}
    assert websocket_status(keyed, url, headers) == (101 if status == 200 else 403)


def websocket_status(fleet: FleetProcess, url: str, headers: Mapping[str, str], address: str = "127.0.0.1") -> int:
    """What the server answers to the wish for a WebSocket, whatever name the address has."""
    given = {name: value for name, value in headers.items() if name != "Origin"}
    origin: Any = headers.get("Origin")
    try:
        with (
            socket.create_connection(("127.0.0.1", fleet.port), 60, (address, 0)) as wire,
            connect(url, sock=wire, open_timeout=60, additional_headers=given, origin=origin),
        ):
            return 101
    except InvalidStatus as error:
        return error.response.status_code


def test_a_rebound_name_reaches_nothing_on_loopback_either(fleet: FleetProcess) -> None:
    refused(get(fleet, "/health", {"Host": f"evil.example:{fleet.port}"}), 403, "HOST_FORBIDDEN")
    assert websocket_status(fleet, f"ws://evil.example:{fleet.port}/ws", {}) == 403
    refused(get(fleet, "/health", {"Origin": "https://evil.example"}), 403, "ORIGIN_FORBIDDEN")
    assert websocket_status(fleet, f"ws://localhost:{fleet.port}/ws", {"Origin": "https://evil.example"}) == 403
    # A page served by another program of this machine may use a server that only this machine reaches.
    assert get(fleet, "/health", {"Origin": "http://localhost:3000"}).status_code == 200


def test_the_key_is_nowhere_to_be_read(keyed: OpenFleet) -> None:
    with FleetCommander(keyed.url, api_key=KEY) as client:
        client.generate_image(**SMALL)
    get(keyed, f"/api/nodes?api_key={KEY}")
    # Processes and files come and go.
    for process in (psutil.Process(keyed.pid), *keyed.children()):
        with contextlib.suppress(psutil.NoSuchProcess):
            assert KEY not in " ".join(process.cmdline())
    places = [keyed.log, *(Path(root) / name for root, _, names in os.walk(keyed.folder) for name in names)]
    looked = 0
    for path in places:
        if not path.is_file():
            continue
        with contextlib.suppress(FileNotFoundError):
            content = path.read_bytes()
            assert KEY.encode() not in content, path
            assert WRONG.encode() not in content, path
            looked += 1
    assert looked > 5
