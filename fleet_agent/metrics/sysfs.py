"""The GPU of a Jetson by the kernel's files: load, temperature, clock, power, name. Its memory is the host's.

`load` is in tenths of a percent, thermal zones in thousandths of a degree, devfreq in Hz, hwmon in mV and mA, as the
kernel's drivers give them. Which processes use the GPU, no file says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from fleet.v1 import types_pb2

_LOADS = (
    "sys/devices/gpu.0/load",
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/*.gpu/load",
    "sys/devices/platform/bus@0/*.gpu/load",
)
_ZONES = "sys/class/thermal/thermal_zone*"
_CLOCKS = (
    "sys/class/devfreq/*gpu*/cur_freq",
    "sys/class/devfreq/*.ga10b/cur_freq",
    "sys/class/devfreq/*.gv11b/cur_freq",
)
_RAILS = "sys/class/hwmon/hwmon*/in*_label"
_MODEL = "proc/device-tree/model"


class NoGpuFilesError(RuntimeError):
    """This kernel shows no GPU load file."""


def _memory() -> tuple[int, int]:
    """Bytes of the machine and how many of them are used."""
    found = psutil.virtual_memory()
    return found.total, found.total - found.available


class SysfsReader:
    """Reads the files below `root`. Raises NoGpuFilesError where there is no load file."""

    def __init__(self, root: Path = Path("/"), memory: Callable[[], tuple[int, int]] = _memory) -> None:
        self._root = root
        self._memory = memory
        load = _first(root, *_LOADS)
        if load is None:
            raise NoGpuFilesError("the kernel shows no GPU load file")
        self._load = load
        self._zone = _gpu_zone(root)
        self._clock = _first(root, *_CLOCKS)
        self._rail = _gpu_rail(root)

    def read(self) -> tuple[list[types_pb2.Gpu], list[str]]:
        """The one GPU, and what could not be read of it."""
        gpu = types_pb2.Gpu(index=0, name=_text(self._root / _MODEL) or "GPU", unified_memory=True)
        gpu.memory_total_bytes, gpu.memory_used_bytes = self._memory()
        warnings: list[str] = []
        with _told(warnings, "load"):
            gpu.utilization_percent = int(self._load.read_text()) / 10
        with _told(warnings, "temperature"):
            gpu.temperature_celsius = _number(self._zone and self._zone / "temp") / 1000
        with _told(warnings, "clock"):
            gpu.graphics_clock_mhz = int(_number(self._clock) / 1e6)
        with _told(warnings, "power"):
            gpu.power_watts = self._power()
        return [gpu], warnings

    def _power(self) -> float:
        if self._rail is None:
            raise LookupError("the kernel shows no such file")
        current = self._rail.with_name(self._rail.name.replace("in", "curr", 1))
        return _number(self._rail) * _number(current) / 1e6


@contextlib.contextmanager
def _told(warnings: list[str], what: str) -> Iterator[None]:
    """A reading that may fail; then the field stays null and the warnings say why."""
    try:
        yield
    except (OSError, ValueError, LookupError) as error:
        warnings.append(f"gpu 0: {what}: {error}")


def _number(path: Path | None) -> int:
    if path is None:
        raise LookupError("the kernel shows no such file")
    return int(path.read_text())


def _first(root: Path, *patterns: str) -> Path | None:
    return next((path for pattern in patterns for path in sorted(root.glob(pattern))), None)


def _gpu_zone(root: Path) -> Path | None:
    """The thermal zone whose type names the GPU: GPU-therm, gpu-thermal."""
    return next((zone for zone in sorted(root.glob(_ZONES)) if _text(zone / "type").lower().startswith("gpu")), None)


def _gpu_rail(root: Path) -> Path | None:
    """The file with the volts of the rail that feeds the GPU; that with its amperes lies beside it."""
    for label in sorted(root.glob(_RAILS)):
        if "GPU" in _text(label).upper():
            return label.with_name(label.name.replace("_label", "_input"))
    return None


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip("\0\n ")
    return ""
