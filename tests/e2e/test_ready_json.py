"""`--json` of the commands that start something: one line of JSON once it is there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.fleet_process import FAST, FleetProcess, clean_environment
from tests.waiting import wait_until_now


@contextmanager
def ready(words: Sequence[str], log: Path) -> Iterator[dict[str, Any]]:
    """Starts a command; what its first line says."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "fleet_client", *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=clean_environment(FAST),
            text=True,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()[-2000:]
        said: dict[str, Any] = json.loads(line)
        assert said["pid"] == process.pid
        yield said
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 0
        assert process.stdout.read() == ""
        process.stdout.close()


def test_up_says_where_it_listens(tmp_path: Path) -> None:
    words = [
        "up",
        "--port",
        "0",
        "--grpc-port",
        "0",
        "--s3-port",
        "off",
        "--data-dir",
        str(tmp_path / "data"),
        "--json",
    ]
    with ready(words, tmp_path / "log") as said:
        assert said["status"] == "ready"
        assert httpx.get(f"{said['url']}/health", timeout=60).json()["status"] == "ok"
        assert httpx.get(said["docs_url"], timeout=60).status_code == 200
        assert said["grpc_port"] > 0


def test_an_agent_says_that_it_was_welcomed(fleet: FleetProcess, tmp_path: Path) -> None:
    server = f"localhost:{fleet.grpc_port}"
    words = ["agent", "--server", server, "--node-id", "second", "--data-dir", str(tmp_path), "--json"]
    with ready(words, tmp_path / "log") as said:
        assert (said["status"], said["node_id"], said["server"], said["slots"]) == ("ready", "second", server, 1)
        assert httpx.get(f"{fleet.url}/api/nodes/second", timeout=60).json()["status"] == "online"
    # Other tests of this fleet count its nodes.
    wait_until_now(lambda: httpx.delete(f"{fleet.url}/api/nodes/second", timeout=60).status_code == 200)


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_file_is_described(tmp_path: Path, lora: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fleet_client", "sketch-model", "--out", str(tmp_path), "--json", *(["--lora"] * lora)],
        check=True,
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=150,
    )
    made = json.loads(done.stdout)
    assert (made["kind"], Path(made["path"]).stat().st_size) == ("lora" if lora else "checkpoint", made["size_bytes"])
    assert Path(made["path"]).name == made["name"]
