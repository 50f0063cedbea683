"""Our side of the queue benchmark: `fleet server` on the run's store, `fleet agent` with the engine `noop`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench._queue_peers import ROOT
from bench._queue_run import Contender, answer_of, peer_variables, running
from bench._queue_store import BenchStore, bench_store

SLOTS = int(os.environ.get("FLEET_BENCH_SLOTS", "4"))
SEATS = int(os.environ.get("FLEET_BENCH_SEATS", "16"))
"""Tasks that each slot's process is given at a time; the engine runs them one after the other."""
PROMISE = "at least once, each end settled exactly once (attempt token); results on the agent's disk until acknowledged"
_READY = re.compile(r"ready at http://\S+ .*gRPC: localhost:(\d+)")
_START_SECONDS = 60.0
_PREFIX = "{fleet}:"


@contextlib.contextmanager
def fleet(folder: Path, fsync: str) -> Iterator[Contender]:
    """Server, agent and producer, ready for work."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(bench_store(folder / "store", fsync))
        variables = {
            **peer_variables(store.url, folder),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python"), str(_plugin(folder))]),
            "FLEET_LOG_LEVEL": "warning",
            "FLEET_AGENT_LOG_LEVEL": "warning",
            "FLEET_AGENT_BATCH": str(SEATS),
        }
        fleet_command = [sys.executable, "-m", "fleet_client"]
        options = ["--redis-url", store.url, "--port", "0", "--grpc-port", "0", "--comfy-port", "off"]
        command = [*fleet_command, "server", *options, "--data-dir", str(folder / "server-data")]
        server = stack.enter_context(running(command, folder, "server", variables))
        assert server.stdout is not None
        found = next(filter(None, map(_READY.search, server.stdout)), None)
        if found is None:
            raise SystemExit(f"the server did not start:\n{(folder / 'server.log').read_text()[-3000:]}")
        address = f"127.0.0.1:{found[1]}"
        options = ["--server", address, "--data-dir", str(folder / "agent-data"), "--slots", str(SLOTS)]
        options += ["--engines", "noop", "--node-id", "bench"]
        agent = stack.enter_context(running([*fleet_command, "agent", *options], folder, "agent", variables))
        producer = [sys.executable, "-m", "bench.peers.queue_fleet.producer"]
        make = stack.enter_context(running(producer, folder, "producer", {**variables, "BENCH_SERVER": address}))
        answer_of(make, folder)
        _await_node(store)
        processes = {
            "server": psutil.Process(server.pid),
            "agent": psutil.Process(agent.pid),
            "producer": psutil.Process(make.pid),
        }
        yield Contender("fleet", folder, store, _left, processes, make)


def _left(store: BenchStore) -> int:
    return sum(store.count("ZCARD", f"{_PREFIX}st:{state}") for state in ("queued", "running"))


def _await_node(store: BenchStore) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not store.client.smembers(f"{_PREFIX}nodes"):
        if time.monotonic() > deadline:
            raise SystemExit("the agent did not come")
        time.sleep(0.05)


def _plugin(folder: Path) -> Path:
    """A folder with the entry point by which an agent finds the engine, as an installed plug-in has it."""
    site = folder / "plugin"
    info = site / "fleet_bench_noop-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fleet-bench-noop\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fleet.engines]\nnoop = bench.peers.queue_fleet.noop:NoopEngine\n")
    return site
