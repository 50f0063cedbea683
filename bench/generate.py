"""Our own time in POST /api/fleet/generate: from the last request byte in to the first reply byte out, less the
engine's run.

    python -m bench.generate [--calls 60]

A real `fleet up` (server, store with fsync, agent, its slot) on a folder of its own, with the engine `fixed`, which
answers at once with a picture of 10 kB or 1.5 MB. One caller, one call after the other, over a connection kept open.
The engine's run is `timings.run_seconds` of the job, which is in whole milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench._machine import heading

TARGETS_MS = {10_000: 8.0, 1_500_000: 20.0}
BODY = json.dumps({"prompt": "a lighthouse at dusk", "width": 512, "height": 512, "steps": 4, "seed": 7}).encode()
_WARM_UP = 10
_READY = re.compile(r"ready at http://localhost:(\d+)")
_START_SECONDS = 60.0
_CALL_SECONDS = 30.0


def main() -> None:
    """Runs both sizes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=60, help="measured calls of each size")
    options = parser.parse_args()
    sys.stdout.write(
        heading() + "\n| picture | own time ms | of it: queued | upload | engine | target | |\n" + "|---" * 7
    )
    sys.stdout.write("|\n")
    for size, target in TARGETS_MS.items():
        with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder, fleet(Path(folder), size) as port:
            rows = measure(port, options.calls)
        sys.stdout.write(line(rows, target))
        sys.stdout.flush()


@contextlib.contextmanager
def fleet(folder: Path, size_bytes: int) -> Iterator[int]:
    """A running `fleet up` whose engine answers with pictures of that size; its port."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
    own = {"FLEET_ENGINES": "fixed", "FLEET_FIXED_SIZE_BYTES": str(size_bytes), "FLEET_LOG_LEVEL": "warning"}
    command = [sys.executable, "-m", "fleet_client", "up", "--port", "0", "--grpc-port", "0", "--s3-port", "off"]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [*command, "--data-dir", str(folder / "data")],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**kept, **own},
        ) as process,
    ):
        watchdog = threading.Timer(_START_SECONDS, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            found = next(filter(None, map(_READY.search, process.stdout)), None)
            watchdog.cancel()
            if found is None:
                raise SystemExit(f"`fleet up` did not start:\n{(folder / 'log').read_text()[-3000:]}")
            yield int(found[1])
        finally:
            watchdog.cancel()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(port: int, calls: int) -> list[dict[str, float]]:
    """For each call, in milliseconds: `own`, `queued`, `upload`, `run`; and `size` in bytes."""
    head = f"POST /api/fleet/generate HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    rows = []
    with socket.create_connection(("localhost", port), timeout=_CALL_SECONDS) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(_WARM_UP + calls):
            seconds, job_id, size = _call(connection, request)
            timings = _job(port, job_id)["timings"]
            parts = {name: 1000 * (timings[f"{name}_seconds"] or 0) for name in ("queued", "upload", "run")}
            own = 1000 * seconds - parts["run"]
            if number >= _WARM_UP:
                rows.append({"own": own, "size": size, **parts})
    return rows


def _call(connection: socket.socket, request: bytes) -> tuple[float, str, int]:
    """Seconds to the first byte, the job's id, the body's length; all of the body is read."""
    connection.sendall(request)
    start = time.perf_counter()
    received = connection.recv(65536)
    seconds = time.perf_counter() - start
    while b"\r\n\r\n" not in received:
        received += _more(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"the call failed:\n{head.decode()}\n{body[:2000].decode(errors='replace')}")
    headers = dict(line.lower().split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:])
    length, got = int(headers["content-length"]), len(body)
    while got < length:
        got += len(_more(connection))
    return seconds, headers["x-job-id"], length


def _more(connection: socket.socket) -> bytes:
    chunk = connection.recv(1 << 20)
    if not chunk:
        raise SystemExit("the server closed the connection")
    return chunk


def _job(port: int, job_id: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://localhost:{port}/api/queue/jobs/{job_id}", timeout=10) as reply:
        job: dict[str, Any] = json.load(reply)
        if job["resolved_model"] != "fixed":
            raise SystemExit(f"the job ran on {job['resolved_model']}, not on the engine `fixed`")
        return job


def line(rows: Sequence[dict[str, float]], target: float) -> str:
    """One row of the table: medians, with the range and the 90th percentile of our own time."""
    own = sorted(row["own"] for row in rows)
    medians = {
        name: statistics.median(row[name] for row in rows) for name in ("own", "queued", "upload", "run", "size")
    }
    p90 = own[int(0.9 * (len(own) - 1))]
    met = "met" if medians["own"] <= target else "missed"
    times = f"{medians['own']:.1f} [{own[0]:.1f} - {own[-1]:.1f}], p90 {p90:.1f}"
    parts = " | ".join(f"{medians[name]:.1f}" for name in ("queued", "upload", "run"))
    return f"| {medians['size']:,.0f} bytes | {times} | {parts} | <= {target:g} | {met} |\n"


if __name__ == "__main__":
    main()
