"""The GPU of a Jetson by the kernel's files: load, temperature, name. Its memory is the host's, so none is given.

`load` is in tenths of a percent and thermal zones are in thousandths of a degree, as the kernel's drivers give them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from fleet.v1 import types_pb2

_LOADS = ("sys/devices/gpu.0/load", "sys/devices/platform/gpu.0/load", "sys/devices/platform/bus@0/*.gpu/load")
_ZONES = "sys/class/thermal/thermal_zone*"
_MODEL = "proc/device-tree/model"


class NoGpuFilesError(RuntimeError):
    """This kernel shows no GPU load file."""


class SysfsReader:
    """Reads the files below `root`. Raises NoGpuFilesError where there is no load file."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        found = [path for pattern in _LOADS for path in sorted(root.glob(pattern))]
        if not found:
            raise NoGpuFilesError("the kernel shows no GPU load file")
        self._load = found[0]
        self._zone = _gpu_zone(root)

    def read(self) -> tuple[list[types_pb2.Gpu], list[str]]:
        """The one GPU, and what could not be read of it."""
        gpu = types_pb2.Gpu(index=0, name=_text(self._root / _MODEL) or "GPU", unified_memory=True)
        warnings = []
        try:
            gpu.utilization_percent = int(self._load.read_text()) / 10
        except (OSError, ValueError) as error:
            warnings.append(f"gpu 0: load: {error}")
        if self._zone is not None:
            try:
                gpu.temperature_celsius = int((self._zone / "temp").read_text()) / 1000
            except (OSError, ValueError) as error:
                warnings.append(f"gpu 0: temperature: {error}")
        return [gpu], warnings


def _gpu_zone(root: Path) -> Path | None:
    """The thermal zone whose type names the GPU: GPU-therm, gpu-thermal."""
    return next((zone for zone in sorted(root.glob(_ZONES)) if _text(zone / "type").lower().startswith("gpu")), None)


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip("\0\n ")
    return ""
