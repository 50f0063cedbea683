"""Starts each contender as processes of its own, and stops them."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.peers.sample import API_KEY, JOB_ID

_ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Contender:
    """A running server: its name, its address and its processes."""

    name: str
    url: str
    processes: Sequence[psutil.Process]

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far."""
        times = [process.cpu_times() for process in self.processes]
        return sum(each.user + each.system for each in times)


@contextlib.contextmanager
def contenders(folder: Path) -> Iterator[list[Contender]]:
    """Our bridge and its peers, ready to answer; `folder` takes their configuration and logs."""
    with contextlib.ExitStack() as stack:

        def start(name: str, *command: str) -> subprocess.Popen[str]:
            return stack.enter_context(_process(folder / f"{name}.log", command))

        def ready(name: str, port: int, *running: subprocess.Popen[str]) -> Contender:
            url = f"http://127.0.0.1:{port}"
            _await_answer(f"{url}/v1/jobs/{JOB_ID}", running, folder)
            return Contender(name, url, [psutil.Process(each.pid) for each in running])

        ours = start("ours", sys.executable, "-m", "bench.peers.ours")
        fastapi_port = _free_port()
        arguments = ("--port", str(fastapi_port), "--loop", "uvloop", "--http", "httptools", "--no-access-log")
        app = "bench.peers.fastapi_app:app"
        fastapi = start("fastapi", sys.executable, "-m", "uvicorn", app, *arguments, "--log-level", "warning")
        backend = start("grpc", sys.executable, "-m", "bench.peers.grpc_backend")
        envoy_port = _free_port()
        envoy = start("envoy", *_envoy(folder, envoy_port, _printed_port(backend)))
        yield [
            ready("ours", _printed_port(ours), ours),
            ready("FastAPI + pydantic", fastapi_port, fastapi),
            ready("Envoy -> grpc.aio", envoy_port, envoy, backend),
        ]


def _envoy(folder: Path, port: int, grpc_port: int) -> list[str]:
    from bench.peers.envoy import write_config  # Late: it runs protoc.

    config = write_config(folder, port, grpc_port)
    # The wheel's own program is a parent that waits; what it starts is what shall be measured.
    program = Path(str(importlib.resources.files("envoy") / "_bin" / "envoy"))
    return [str(program), "-c", str(config), "--use-dynamic-base-id", "--concurrency", "1", "-l", "error"]


@contextlib.contextmanager
def _process(log: Path, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "clients" / "python")])}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _printed_port(process: subprocess.Popen[str]) -> int:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line.strip().isdigit():
        raise SystemExit(f"a server did not start: {process.args!r}")
    return int(line)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_answer(url: str, running: Sequence[subprocess.Popen[str]], folder: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    request = urllib.request.Request(url, headers={"X-API-Key": API_KEY})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (OSError, urllib.error.URLError) as error:
            if time.monotonic() > end or any(each.poll() is not None for each in running):
                logs = "".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))
                raise SystemExit(f"{url} does not answer ({error})\n{logs}") from error
        time.sleep(0.1)
