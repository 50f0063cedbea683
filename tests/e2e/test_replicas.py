"""Two servers on one store: every door of either answers for the whole fleet, and one may die."""

from __future__ import annotations

import base64
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fleet_client import FleetCommander

from tests.e2e.fleet_process import FleetProcess, clean_environment
from tests.e2e.test_crashes import until
from tests.ports import free_ports
from tests.store.conftest import run_server


@dataclass
class Pair:
    """Servers `a` and `b`, and an agent that dials `a` first, and `b` where that is away."""

    a: FleetProcess
    b: FleetProcess
    agent: FleetProcess


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-")))
        (folder / "store").mkdir()
        store = stack.enter_context(contextmanager(run_server)(folder / "store", cluster=False))
        servers = []
        for name in "ab":
            port, grpc_port = free_ports(2)
            command = ("server", "--redis-url", store.url, "--port", str(port), "--grpc-port", str(grpc_port))
            servers.append(stack.enter_context(FleetProcess(folder / name, command=command)))
        a, b = servers
        address = f"ipv4:127.0.0.1:{a.grpc_port},127.0.0.1:{b.grpc_port}"
        agent = FleetProcess(folder / "agent", command=("agent", "--server", address, "--node-id", "far"))
        agent.spawn()
        stack.callback(agent.stop)
        with FleetCommander(a.url) as client:
            until(lambda: client.status()["nodes"]["online"] == 1, "the agent is online")
        yield Pair(a, b, agent)


def test_either_server_answers_for_the_fleet(pair: Pair) -> None:
    with FleetCommander(pair.b.url) as client:
        node = until(
            lambda: next((n for n in client.list_nodes()["nodes"] if n["status"] == "online"), None), "the node"
        )
        assert (node["node_id"], node["slots"]) == ("far", 1)
        job = client.wait(client.queue_job("sea", width=64, height=64, steps=2)["job_id"])
        assert (job["status"], job["node_id"]) == ("succeeded", "far")


def test_progress_and_previews_are_seen_at_the_other_server(pair: Pair) -> None:
    """The agent's stream is held by `a`; who watches at `b` sees the ticks all the same, and the pictures."""
    with (
        FleetCommander(pair.b.url) as client,
        closing(client.watch_events(type="job_progress", previews=True)) as ticks,
    ):
        seen: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

        def read() -> None:
            for tick in ticks:
                # A listener that is late is told of the gap.
                if tick["type"] != "job_progress":
                    continue
                seen.put(tick["data"])
                if tick["data"]["preview"]:
                    return

        reader = threading.Thread(target=read)
        reader.start()
        # Who looks at `b` is known at `a` within a second or two: jobs go on until one is seen.
        while reader.is_alive():
            client.wait(client.queue_job("mountains", width=512, height=512, steps=30)["job_id"], timeout_seconds=150)
        reader.join()
        while True:
            last = seen.get_nowait()
            assert (last["node_id"], last["attempt"]) == ("far", 1)
            if last["preview"]:
                break
        assert base64.b64decode(last["preview"]["data"]).startswith(b"\xff\xd8")


def test_programs_run_through_the_other_server(pair: Pair) -> None:
    """A node is told what to do by either server, whichever holds its stream."""

    def ran(client: FleetCommander) -> bool:
        # A server tells its door when it has started.
        reply = client.call("POST", "/api/fleet/exec/far", json={"command": "echo done"})
        return bool(reply.json()["stdout"] == "done\n")

    with FleetCommander(pair.b.url) as client:
        until(lambda: client.status()["nodes"]["online"] == 1, "the node is online there too")
        until(lambda: ran(client), "the server is found")
    command = [sys.executable, "-m", "fleet_client", "exec", "-i", "far", "--", "sh", "-c", "cat; exit 6"]
    environment = clean_environment({"FLEET_URL": pair.b.url})
    done = subprocess.run(command, check=False, input=b"through", capture_output=True, env=environment, timeout=150)
    assert (done.returncode, done.stdout) == (6, b"through"), done.stderr


def test_the_nodes_of_a_server_that_died_are_given_up_by_the_other(pair: Pair) -> None:
    """Those that do not come back: the next start of the agent finds the server that is left."""
    with FleetCommander(pair.b.url) as client:

        def status_is(wanted: str) -> bool:
            return bool(client.list_nodes()["nodes"][0]["status"] == wanted)

        until(lambda: status_is("online"), "the node is online")
        pair.a.kill()
        pair.agent.kill()
        until(lambda: status_is("disconnected"), "the node is disconnected")
        until(lambda: status_is("down"), "the node is down")
        pair.agent.spawn()
        until(lambda: status_is("online"), "the node is back")


def test_a_job_outlives_the_server_that_gave_it(pair: Pair) -> None:
    """Its agent dials the other one, works on, and hands the result in there: one attempt, no loss."""
    pair.a.kill()
    with FleetCommander(pair.b.url) as client:
        until(lambda: client.status()["nodes"]["online"] == 1, "the agent has dialled the other")
    pair.a.start()
    with FleetCommander(pair.a.url) as client:
        job_id = client.queue_job("storm", width=512, height=512, steps=100)["job_id"]
        until(lambda: client.get_job(job_id)["progress"] > 0, "the job runs")
        pair.b.kill()
        job = client.wait(job_id, timeout_seconds=150)
        assert (job["status"], job["node_id"], job["attempt"]) == ("succeeded", "far", 1)
        assert client.get_output(job["result"]["outputs"][0]["filename"]).startswith(b"\x89PNG")
        again = client.wait(client.queue_job("calm", width=64, height=64, steps=2)["job_id"], timeout_seconds=150)
        assert (again["status"], again["node_id"]) == ("succeeded", "far")
