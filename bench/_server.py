"""A `fleet up` without an agent, in a process of its own, on a folder and ports that outlive a kill."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_READY = re.compile(r"ready at http://localhost:(\d+) .*gRPC: localhost:(\d+)")
_START_SECONDS = 60.0


class ServerProcess:
    """Starts on free ports, and after a `kill` again on the same ones. Its log is in `folder`."""

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[str] | None = None
        self.port = 0
        self.grpc_port = 0

    def start(self) -> float:
        """Returns when it is ready, with the seconds that took. Raises SystemExit with the end of its log."""
        begun = time.monotonic()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
        ports = [
            "--port",
            str(self.port),
            "--grpc-port",
            str(self.grpc_port),
            "--comfy-port",
            "off",
            "--s3-port",
            "off",
        ]
        command = [sys.executable, "-m", "fleet_client", "up", "--no-agent", *ports]
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [*command, "--data-dir", str(self._folder / "data")],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**kept, "FLEET_LOG_LEVEL": "warning", **self._settings},
            )
        watchdog = threading.Timer(_START_SECONDS, self._process.kill)
        watchdog.start()
        try:
            assert self._process.stdout is not None
            found = next(filter(None, map(_READY.search, self._process.stdout)), None)
        finally:
            watchdog.cancel()
        if found is None:
            raise SystemExit(f"`fleet up` did not start:\n{(self._folder / 'log').read_text()[-3000:]}")
        self.port, self.grpc_port = int(found[1]), int(found[2])
        return time.monotonic() - begun

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU time, user and system, of the server and of its store, since they were started."""
        assert self._process is not None
        server = psutil.Process(self._process.pid)
        return _cpu(server), sum(_cpu(child) for child in server.children())

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL: the store, its child, goes with it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that takes too long."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
