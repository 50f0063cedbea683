"""One reading of everything, from whatever sources this machine has."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pynvml  # type: ignore[import-untyped]
from fleet.v1 import types_pb2

from fleet_agent.metrics.host import HostReader
from fleet_agent.metrics.nvml import GpuReader, NvmlReader


@dataclass(frozen=True, slots=True)
class Readings:
    """What a heartbeat carries."""

    host: types_pb2.Host
    gpus: list[types_pb2.Gpu]
    source: types_pb2.MetricsSource.ValueType
    warnings: list[str] = field(default_factory=list)


class MetricsReader:
    """Finds its sources once; `read` works in a thread, since drivers may block."""

    def __init__(self, folder: Path) -> None:
        self._host = HostReader(folder)
        self._gpus: GpuReader | None = None
        self._source = types_pb2.METRICS_SOURCE_NONE
        self._missing: list[str] = []
        try:
            self._gpus = NvmlReader().read
            self._source = types_pb2.METRICS_SOURCE_NVML
        except pynvml.NVMLError as error:
            self._missing.append(f"no GPU readings: NVML: {error}")

    async def read(self) -> Readings:
        """One reading."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> Readings:
        warnings = list(self._missing)
        gpus: list[types_pb2.Gpu] = []
        if self._gpus is not None:
            try:
                gpus, more = self._gpus()
                warnings += more
            except pynvml.NVMLError as error:
                warnings.append(f"no GPU readings: NVML: {error}")
        return Readings(self._host.read(), gpus, self._source, warnings)
