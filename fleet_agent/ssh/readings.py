"""Readings of a node that is reached by SSH: one look at its kernel's files and, where there is one, its nvidia-smi."""

from __future__ import annotations

import time
from pathlib import Path

from fleet.v1 import types_pb2

from fleet_agent.metrics.reader import MetricsReader, Readings
from fleet_agent.ssh.link import LinkError, SshLink

_LOOK = r"""
cat /proc/uptime
grep -c ^processor /proc/cpuinfo
head -n 1 /proc/stat
awk '/^MemTotal:/ {t=$2} /^MemAvailable:/ {a=$2} END {print t, a}' /proc/meminfo
df -Pk / | awk 'NR==2 {print $2, $4}'
awk 'NR>2 && $1 != "lo:" {gsub(":", " "); r+=$2; s+=$10} END {print r+0, s+0}' /proc/net/dev
q=index,uuid,name,utilization.gpu,memory.total,memory.used,temperature.gpu,power.draw,power.limit
nvidia-smi --query-gpu=$q,clocks.gr,clocks.mem --format=csv,noheader,nounits 2>/dev/null || echo none
"""
_GPU = (
    ("utilization_percent", 1.0),
    ("memory_total_bytes", 1 << 20),
    ("memory_used_bytes", 1 << 20),
    ("temperature_celsius", 1.0),
    ("power_watts", 1.0),
    ("power_limit_watts", 1.0),
    ("graphics_clock_mhz", 1.0),
    ("memory_clock_mhz", 1.0),
)


class SshReadings(MetricsReader):
    """Never raises: a heartbeat must go."""

    def __init__(self, link: SshLink, seconds: float) -> None:
        super().__init__(Path("/"), seconds, sources=())
        self._link = link
        self._cpu: tuple[int, int] | None = None
        self._net: tuple[float, int, int] | None = None
        self._seen = Readings(types_pb2.Host())

    async def read(self) -> Readings:
        """One reading, else the one before and why."""
        try:
            lines = (await self._link.ask(_LOOK, seconds=self._seconds)).splitlines()
            self._seen = self._parsed(lines)
        except (LinkError, ValueError, IndexError) as error:
            return Readings(self._seen.host, self._seen.gpus, self._seen.source, [f"no new readings: {error}"])
        return self._seen

    def _parsed(self, lines: list[str]) -> Readings:
        total, available = (int(word) * 1024 for word in lines[3].split())
        size, free = (int(word) * 1024 for word in lines[4].split())
        host = types_pb2.Host(
            uptime_seconds=int(float(lines[0].split()[0])),
            cpu_count=int(lines[1]),
            memory_total_bytes=total,
            memory_used_bytes=total - available,
            disk_total_bytes=size,
            disk_free_bytes=free,
        )
        self._rates(host, [int(word) for word in lines[2].split()[1:]], [int(float(word)) for word in lines[5].split()])
        warnings: list[str] = []
        gpus = [_gpu(line, warnings) for line in lines[6:] if line != "none"]
        if not gpus:
            return Readings(host, [], types_pb2.METRICS_SOURCE_NONE, ["no GPU readings: nvidia-smi gives none there"])
        return Readings(host, gpus, types_pb2.METRICS_SOURCE_NVML, warnings)

    def _rates(self, host: types_pb2.Host, ticks: list[int], network: list[int]) -> None:
        idle, whole, now = ticks[3] + ticks[4], sum(ticks[:8]), time.monotonic()
        if self._cpu is not None and whole > self._cpu[1]:
            host.cpu_percent = round(100 * (1 - (idle - self._cpu[0]) / (whole - self._cpu[1])), 1)
        if self._net is not None:
            seconds = max(now - self._net[0], 1e-3)
            host.network_receive_bytes_per_second = max(0.0, (network[0] - self._net[1]) / seconds)
            host.network_transmit_bytes_per_second = max(0.0, (network[1] - self._net[2]) / seconds)
        self._cpu, self._net = (idle, whole), (now, network[0], network[1])


def _gpu(line: str, warnings: list[str]) -> types_pb2.Gpu:
    words = [word.strip() for word in line.split(",")]
    gpu = types_pb2.Gpu(index=int(words[0]), uuid=words[1], name=words[2])
    missing = []
    for (name, factor), word in zip(_GPU, words[3:], strict=True):
        try:
            value = float(word) * factor
        except ValueError:
            missing.append(name)
            continue
        setattr(gpu, name, int(value) if isinstance(getattr(gpu, name), int) else value)
    if missing:
        warnings.append(f"gpu {gpu.index}: nvidia-smi does not give {', '.join(missing)}")
    return gpu
