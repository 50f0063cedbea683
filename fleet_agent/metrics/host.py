"""CPU, memory, disk and network of the machine, by psutil."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
from fleet.v1 import types_pb2


class HostReader:
    """Reads the machine. Rates are of the time since the reading before; null in the first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._network: tuple[float, int, int] | None = None
        psutil.cpu_percent()

    def read(self) -> types_pb2.Host:
        """One reading; blocks for some milliseconds."""
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(str(self._folder))
        host = types_pb2.Host(
            uptime_seconds=int(time.time() - psutil.boot_time()),
            cpu_percent=psutil.cpu_percent(),
            memory_total_bytes=memory.total,
            memory_used_bytes=memory.total - memory.available,
            disk_total_bytes=disk.total,
            disk_free_bytes=disk.free,
        )
        count = psutil.cpu_count()
        if count:
            host.cpu_count = count
        self._read_network(host)
        return host

    def _read_network(self, host: types_pb2.Host) -> None:
        counters = psutil.net_io_counters()
        if counters is None:
            return
        now = time.monotonic()
        if self._network is not None:
            then, received, sent = self._network
            seconds = max(now - then, 1e-3)
            host.network_receive_bytes_per_second = max(0.0, (counters.bytes_recv - received) / seconds)
            host.network_transmit_bytes_per_second = max(0.0, (counters.bytes_sent - sent) / seconds)
        self._network = (now, counters.bytes_recv, counters.bytes_sent)
