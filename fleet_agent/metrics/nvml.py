"""NVIDIA GPUs by NVML (nvidia-ml-py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
import pynvml  # type: ignore[import-untyped]
from fleet.v1 import types_pb2


class NvmlReader:
    """Reads every GPU. Raises pynvml.NVMLError where there is no driver; `nvml` may be a stand-in in tests."""

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        nvml.nvmlInit()

    def read(self) -> tuple[list[types_pb2.Gpu], list[str]]:
        """The GPUs by index, and what could not be read of them."""
        gpus: list[types_pb2.Gpu] = []
        warnings: list[str] = []
        for index in range(self._nvml.nvmlDeviceGetCount()):
            try:
                gpus.append(self._gpu(index, warnings))
            except self._nvml.NVMLError as error:
                warnings.append(f"gpu {index}: {error}")
        return gpus, warnings

    def _gpu(self, index: int, warnings: list[str]) -> types_pb2.Gpu:
        nvml = self._nvml
        missing: dict[str, list[str]] = {}
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        gpu = types_pb2.Gpu(index=index, name=_text(nvml.nvmlDeviceGetName(handle)))
        with self._optional("uuid", missing):
            gpu.uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        with self._optional("memory", missing):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            gpu.memory_total_bytes, gpu.memory_used_bytes = memory.total, memory.used
        with self._optional("utilization", missing):
            gpu.utilization_percent = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        with self._optional("temperature", missing):
            gpu.temperature_celsius = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        with self._optional("power", missing):
            gpu.power_watts = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        with self._optional("power limit", missing):
            gpu.power_limit_watts = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
        with self._optional("graphics clock", missing):
            gpu.graphics_clock_mhz = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_GRAPHICS)
        with self._optional("memory clock", missing):
            gpu.memory_clock_mhz = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)
        with self._optional("processes", missing):
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                gpu.processes.add(pid=process.pid, name=_name(process.pid), memory_used_bytes=process.usedGpuMemory)
        warnings += [f"gpu {index}: no {', '.join(names)}: {why}" for why, names in missing.items()]
        return gpu

    @contextlib.contextmanager
    def _optional(self, name: str, missing: dict[str, list[str]]) -> Iterator[None]:
        """A reading that this GPU may not have; then the field stays null, and the warnings say so."""
        try:
            yield
        except self._nvml.NVMLError as error:
            missing.setdefault(str(error), []).append(name)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _name(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).name()
    return "unknown"
