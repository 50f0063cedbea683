"""A model file from a bucket to three agents on one machine: time, reads of the bucket, memory, and a cut at half.

    python -m bench.models [--sizes 256MB 2GB] [--s3 rgw]

A real `fleet up`, its agent, two more agents, and an S3 server (ours, or Ceph's gateway) behind a relay that counts
reads of objects and cuts one. Memory is how much each process's peak (VmHWM, reset before) is above what it had before
the download.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from fleet_client import FleetCommander
from minio import Minio

from bench._machine import heading
from fleet_agent.engines.sketch_model import parse_size
from tests.e2e.fleet_process import FleetProcess
from tests.models.tap import Tap
from tests.s3.embedded import ACCESS, SECRET, EmbeddedProcess
from tests.s3.rgw import gateway
from tests.waiting import wait_until_now

LIMIT_MB = 64
_BLOCK = 16 << 20
_SECONDS = 300.0


def main() -> None:
    """Runs each size and prints the table; exits with 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=["256MB", "2GB"])
    parser.add_argument("--s3", choices=["embedded", "rgw"], default="embedded", help="rgw needs Debian's radosgw")
    options = parser.parse_args()
    sys.stdout.write(
        heading() + "\n| size | to three agents | MB/s together | reads of the bucket | peak memory: server | "
    )
    sys.stdout.write("agents | cut at half: read again | same bytes |\n" + "|---" * 8 + "|\n")
    kept = True
    for text in options.sizes:
        with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
            line, good = measure(Path(folder), text, parse_size(text), options.s3)
        sys.stdout.write(line)
        sys.stdout.flush()
        kept &= good
    raise SystemExit(0 if kept else 1)


def measure(folder: Path, text: str, size: int, s3: str) -> tuple[str, bool]:
    """One size: its line, and whether all promises are kept."""
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(_store(s3, folder / "s3"))
        tap = stack.enter_context(Tap(port))
        fleet = stack.enter_context(FleetProcess(folder / "data", environment=_settings(tap.port)))
        client = stack.enter_context(FleetCommander(fleet.url))
        agents = [_agent(folder, fleet, name) for name in ("a1", "a2")]
        for agent in agents:
            stack.callback(agent.stop)
        wait_until_now(lambda: sum(node["status"] == "online" for node in client.list_nodes()["nodes"]) == 3)
        sha256 = _put(port, folder / "whole.safetensors", "whole.safetensors", size, 1)
        names = [node["node_id"] for node in client.list_nodes()["nodes"]]
        pids = [fleet.pid, *fleet.pids("fleet_agent"), *(agent.pid for agent in agents)]
        with _peaks(pids) as grown:
            begun = time.monotonic()
            reply = client.download_model("whole.safetensors", names)
            seconds = time.monotonic() - begun
        reads = tap.reads["/fleet-models/whole.safetensors"]
        same = all(one["status"] == "downloaded" for one in reply["downloads"])
        folders = [folder / name for name in ("data/agent", "a1", "a2")]
        same &= all(_hash(one / "models/checkpoints/whole.safetensors") == sha256 for one in folders)
        for one in folders:
            (one / "models/checkpoints/whole.safetensors").unlink()
        again, resumed = _cut(client, tap, port, folder, size)
        server, agents_mb = grown[0] / 1e6, max(grown[1:]) / 1e6
        good = same and resumed and reads <= 3 and max(server, agents_mb) < LIMIT_MB
    cells = (
        f"| {text} | {seconds:.1f} s | {3 * size / 1e6 / seconds:,.0f} | {reads} | {server:.0f} MB "
        f"| {agents_mb:.0f} MB | {again / 1e6:.0f} MB | {'yes' if same and resumed else 'NO'} |\n"
    )
    return cells, good


@contextlib.contextmanager
def _store(s3: str, folder: Path) -> Iterator[int]:
    """The port of an S3 server."""
    folder.mkdir()
    if s3 == "rgw":
        with gateway(folder, ACCESS, SECRET) as endpoint:
            yield urlsplit(endpoint).port or 80
    else:
        with EmbeddedProcess(folder) as embedded:
            yield embedded.port


def _cut(client: FleetCommander, tap: Tap, port: int, folder: Path, size: int) -> tuple[float, bool]:
    """A download that is cut at half: bytes that were read twice, and whether it came whole."""
    sha256 = _put(port, folder / "cut.safetensors", "cut.safetensors", size, 2)
    before, tap.cut_after = tap.passed, size // 2
    reply = client.download_model("cut.safetensors", ["a1"])
    whole = reply["downloads"][0]["status"] == "downloaded"
    target = folder / "a1/models/checkpoints/cut.safetensors"
    return tap.passed - before - size, whole and _hash(target) == sha256


def _settings(s3_port: int) -> dict[str, str]:
    return {
        "FLEET_S3_ENDPOINT": f"http://127.0.0.1:{s3_port}",
        "FLEET_S3_ACCESS_KEY": ACCESS,
        "FLEET_S3_SECRET_KEY": SECRET,
        "FLEET_MODELS_REFRESH_SECONDS": "1",
        "FLEET_ENGINES": "sketch",
    }


def _agent(folder: Path, fleet: FleetProcess, name: str) -> FleetProcess:
    command = ("agent", "--server", f"127.0.0.1:{fleet.grpc_port}", "--node-id", name, "--engines", "sketch")
    agent = FleetProcess(folder / name, command=command)
    agent.spawn()
    return agent


def _put(port: int, path: Path, key: str, size: int, seed: int) -> str:
    """A safetensors file of noise in the bucket; its hash."""
    raw = json.dumps(
        {
            "__metadata__": {"architecture": "sketch"},
            "noise": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        }
    ).encode()
    block, left = random.Random(seed).randbytes(_BLOCK), size
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in (struct.pack("<Q", len(raw)), raw):
            file.write(data)
            digest.update(data)
        while left:
            data = block[: min(left, _BLOCK)]
            file.write(data)
            digest.update(data)
            left -= len(data)
    Minio(f"127.0.0.1:{port}", ACCESS, SECRET, secure=False).fput_object("fleet-models", key, str(path))
    path.unlink()
    return digest.hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _peaks(pids: list[int]) -> Iterator[list[int]]:
    """By how many bytes each process's peak is above what it has now; filled in at the end of the block."""
    before = [_status(pid, "VmRSS") for pid in pids]
    for pid in pids:
        # The peak begins anew.
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    grown: list[int] = []
    yield grown
    grown += [_status(pid, "VmHWM") - was for pid, was in zip(pids, before, strict=True)]


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


if __name__ == "__main__":
    os.nice(5)
    main()
