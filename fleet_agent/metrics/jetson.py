"""The GPU of a Jetson by jetson-stats (the package with `jtop` and its service), where it is installed.

It gives frequencies in kHz, memory in kB and power in mW; its temperatures are in degrees.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from fleet.v1 import types_pb2

_GPU_RAILS = ("GPU", "VDD_GPU", "VDD_GPU_SOC", "POM_5V_GPU", "VDD_CPU_GPU_CV")


class JetsonReader:
    """Keeps a connection to the service. Raises what jetson-stats raises where it is not there (ImportError) or does
    not answer; `module` may be a stand-in in tests."""

    def __init__(self, module: Any = None) -> None:
        if module is None:
            try:
                module = importlib.import_module("jtop")
            except ImportError:
                raise ImportError("jetson-stats is not installed") from None
        self._jtop = module.jtop()
        self._jtop.start()

    def read(self) -> tuple[list[types_pb2.Gpu], list[str]]:
        """The GPUs in the service's order, and what could not be read of them. Raises where the service has gone."""
        if not self._jtop.ok(spin=True):
            raise RuntimeError("the jetson-stats service has ended: systemctl restart jtop")
        warnings: list[str] = []
        gpus = [
            self._gpu(index, name, given, warnings) for index, (name, given) in enumerate(dict(self._jtop.gpu).items())
        ]
        return gpus, warnings

    def _gpu(self, index: int, name: str, given: Mapping[str, Any], warnings: list[str]) -> types_pb2.Gpu:
        gpu = types_pb2.Gpu(index=index, name=self._model() or name, unified_memory=True)
        found = {
            "utilization_percent": _at(given, "status", "load"),
            "memory_total_bytes": _times(_at(self._jtop.memory, "RAM", "tot"), 1024),
            "memory_used_bytes": _times(_at(self._jtop.memory, "RAM", "used"), 1024),
            "temperature_celsius": _temperature(self._jtop.temperature),
            "power_watts": _over(_rail(self._jtop.power), 1000),
            "graphics_clock_mhz": _over(_at(given, "freq", "cur"), 1000),
            "memory_clock_mhz": _over(_at(self._jtop.memory, "EMC", "cur"), 1000),
        }
        for field, value in found.items():
            if value is not None:
                kind = int if isinstance(getattr(gpu, field), int) else float
                setattr(gpu, field, kind(value))
        missing = [field for field, value in found.items() if value is None]
        if missing:
            warnings.append(f"gpu {index}: jetson-stats does not give {', '.join(missing)}")
        for process in self._jtop.processes:
            self._add_process(gpu, process)
        return gpu

    def _model(self) -> str:
        return str(_at(self._jtop.board, "hardware", "Model") or "")

    @staticmethod
    def _add_process(gpu: types_pb2.Gpu, process: Sequence[Any]) -> None:
        """PID, user, GPU, type, priority, state, CPU, memory, GPU memory (kB), name."""
        if len(process) >= 10:
            gpu.processes.add(pid=int(process[0]), name=str(process[9]), memory_used_bytes=int(process[8]) * 1024)


def _at(tree: Any, *path: str) -> Any:
    """What lies there, None where nothing does."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def _times(value: Any, factor: float) -> float | None:
    return None if value is None else value * factor


def _over(value: Any, divisor: float) -> float | None:
    return None if value is None else value / divisor


def _temperature(sensors: Mapping[str, Any]) -> Any:
    for name, sensor in sensors.items():
        if name.lower().startswith("gpu") and _at(sensor, "online") is not False:
            return _at(sensor, "temp")
    return None


def _rail(power: Any) -> Any:
    """The rail of the GPU, in mW: boards name it differently, and some have none of its own."""
    rails = _at(power, "rail")
    if not isinstance(rails, Mapping):
        return None
    return next((_at(rails[name], "power") for name in _GPU_RAILS if name in rails), None)
