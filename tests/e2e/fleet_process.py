"""Fleet Commander as a user starts it: `fleet up` in a process of its own, on free ports and a folder of the test's."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.waiting import wait_until_now

READY = re.compile(r"ready at http://localhost:(\d+) .*gRPC: localhost:(\d+)")
READY_SECONDS = 150.0
FAST = {
    # Durations that would make a test wait, shortened; everything else is as in production.
    "FLEET_HEARTBEAT_SECONDS": "0.5",
    # A machine that is busy with other tests may stand still for seconds: that is no lost node.
    "FLEET_LEASE_SECONDS": "8",
    # Of a server that is started again: its agents are back by then.
    "FLEET_REAP_GRACE_SECONDS": "15",
    "FLEET_REAP_INTERVAL_SECONDS": "0.2",
    "FLEET_RETRY_BACKOFF_SECONDS": "0.1",
    "FLEET_AGENT_RECONNECT_SECONDS": "0.3",
    "FLEET_AGENT_DISK_FLOOR_BYTES": "1000000",
    "FLEET_DISK_FLOOR_BYTES": "1000000",
    # Doors at their documented ports would be fought over by tests beside each other.
    "FLEET_AGENTS_PORT": "0",
    "FLEET_S3_PORT": "off",
    "FLEET_COMFY_PORT": "off",
    # The machine's own Docker engine, if it has one, is nobody's to play with.
    "FLEET_AGENT_DOCKER_HOST": "unix:///nonexistent/docker.sock",
}


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of Fleet Commander, and with those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
    return {**kept, **(more or {})}


@contextlib.contextmanager
def slowed(pid: int) -> Iterator[None]:
    """The process gets a fifth of its time, so that what happens in its course is seen in time on any machine."""
    over = threading.Event()

    def pace() -> None:
        while not over.wait(0.08):
            os.kill(pid, signal.SIGCONT)
            over.wait(0.02)
            os.kill(pid, signal.SIGSTOP)

    os.kill(pid, signal.SIGSTOP)
    pacing = threading.Thread(target=pace)
    pacing.start()
    try:
        yield
    finally:
        over.set()
        pacing.join()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


class FleetProcess:
    """One `fleet` process. Its standard error goes to `log`."""

    pattern = READY
    """Of the ready line: the ports of HTTP and of gRPC."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = ("up", "--port", "0", "--grpc-port", "0"),
    ) -> None:
        self.folder = folder
        self.log = folder.parent / f"{folder.name}.log"
        self._command = [sys.executable, "-m", "fleet_client", *command, "--data-dir", str(folder), *arguments]
        self._environment = clean_environment({**FAST, **(environment or {})})
        self.process: subprocess.Popen[str] | None = None
        self.port = 0
        self.grpc_port = 0
        self.ready = ""
        """The line that says that it is ready."""

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, seconds: float = READY_SECONDS) -> Self:
        """Starts it and waits for the ready line; kills it after `seconds`."""
        self.spawn()
        assert self.process is not None and self.process.stdout is not None
        killer = threading.Timer(seconds, self.process.kill)
        killer.start()
        try:
            for line in self.process.stdout:
                found = self.pattern.search(line)
                if found:
                    self.port, self.grpc_port, self.ready = int(found[1]), int(found[2]), line
                    return self
            raise AssertionError(f"never ready:\n{self.log.read_text()[-4000:]}")
        except BaseException:
            # Nothing of it is left to tests that come after.
            self.kill()
            raise
        finally:
            killer.cancel()

    def spawn(self) -> None:
        """Starts it; does not wait."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, env=self._environment, text=True
            )

    def children(self) -> list[psutil.Process]:
        """All processes under it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def pids(self, word: str) -> list[int]:
        """Processes under it whose command line has that word: valkey-server, fleet_agent, fleet_agent.slot. Not what
        such a one has just begun: that has its parent's command line until it is a program of its own."""
        found: list[int] = []
        for child in self.children():
            with contextlib.suppress(psutil.Error):
                if child.ppid() not in found and (word in child.cmdline() or word in Path(child.exe()).name):
                    found.append(child.pid)
        return found

    def slot(self) -> int:
        """The one process in which engines work. One that only describes them, every so often, is none."""
        return wait_until_now(self._slot, seconds=100)

    def _slot(self) -> int | None:
        found = []
        for child in self.children():
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                if "fleet_agent.slot" in words and "--describe" not in words:
                    found.append(child.pid)
        return found[0] if len(found) == 1 else None

    def stop(self, seconds: float = 100) -> int:
        """SIGTERM; the exit code. Kills it after `seconds`."""
        assert self.process is not None
        process = self.process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"did not stop in {seconds} s:\n{self.log.read_text()[-4000:]}") from None
        finally:
            if process.stdout is not None:
                process.stdout.close()

    def kill(self) -> None:
        """SIGKILL of the server process."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
