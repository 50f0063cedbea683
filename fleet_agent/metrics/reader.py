"""One reading of everything, from whatever sources this machine has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import structlog
from fleet.v1 import types_pb2

from fleet_agent.daemon import in_daemon
from fleet_agent.metrics.host import HostReader
from fleet_agent.metrics.jetson import JetsonReader
from fleet_agent.metrics.nvml import NvmlReader
from fleet_agent.metrics.sysfs import SysfsReader

_log = structlog.get_logger("fleet.agent.metrics")


class GpuReader(Protocol):
    """A source of GPU readings."""

    def read(self) -> tuple[list[types_pb2.Gpu], list[str]]:
        """The GPUs by index, and what could not be read of them."""


@dataclass(frozen=True, slots=True)
class Readings:
    """What a heartbeat carries."""

    host: types_pb2.Host
    gpus: list[types_pb2.Gpu] = field(default_factory=list)
    source: types_pb2.MetricsSource.ValueType = types_pb2.METRICS_SOURCE_NONE
    warnings: list[str] = field(default_factory=list)


Source = tuple[str, types_pb2.MetricsSource.ValueType, Callable[[], GpuReader]]
SOURCES: Sequence[Source] = (
    # Before NVML, which knows a Jetson's GPU by its name alone.
    ("jetson-stats", types_pb2.METRICS_SOURCE_JETSON, JetsonReader),
    ("NVML", types_pb2.METRICS_SOURCE_NVML, NvmlReader),
    ("sysfs", types_pb2.METRICS_SOURCE_SYSFS, SysfsReader),
)


class MetricsReader:
    """Reads host and GPUs in a thread, at most one at a time, since drivers may block.

    The first of `sources` that this machine has is used; while none is there, or after it failed, all are tried again
    at the next reading: a driver may come, and may be reset.
    """

    def __init__(self, folder: Path, seconds: float, sources: Sequence[Source] = SOURCES) -> None:
        self._host = HostReader(folder)
        self._seconds = seconds
        self._sources = sources
        self._gpus: GpuReader | None = None
        self._source: types_pb2.MetricsSource.ValueType = types_pb2.METRICS_SOURCE_NONE
        self._last = Readings(types_pb2.Host())
        self._under_way: asyncio.Future[Readings] | None = None

    async def read(self) -> Readings:
        """One reading; where none comes in time, the one before, with a warning.

        Raises nothing: a heartbeat must go.
        """
        if self._under_way is None:
            self._under_way = in_daemon(self._read, "readings")
        task = self._under_way
        await asyncio.wait({task}, timeout=self._seconds)
        if not task.done():
            return _stale(self._last, f"no new readings: the drivers have not answered within {self._seconds:g} s")
        self._under_way = None
        error = task.exception()
        if error is not None:
            _log.warning("no readings", error=repr(error))
            return _stale(self._last, f"no new readings: {error}")
        self._last = task.result()
        return self._last

    def _read(self) -> Readings:
        warnings = self._find() if self._gpus is None else []
        gpus: list[types_pb2.Gpu] = []
        if self._gpus is not None:
            try:
                gpus, more = self._gpus.read()
                warnings += more
            except Exception as error:
                # NVML's errors are made when it is loaded, so none can be named here.
                warnings.append(f"no GPU readings: {error}")
                self._gpus = None
        return Readings(self._host.read(), gpus, self._source, warnings)

    def _find(self) -> list[str]:
        """Takes the first source there is; why the others are not, where there is none."""
        missing = []
        for name, source, make in self._sources:
            try:
                self._gpus, self._source = make(), source
            except Exception as error:
                missing.append(f"no GPU readings by {name}: {error}")
                continue
            return []
        self._source = types_pb2.METRICS_SOURCE_NONE
        return missing


def _stale(readings: Readings, warning: str) -> Readings:
    return replace(readings, warnings=[*readings.warnings, warning])
