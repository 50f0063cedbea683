"""Readings: the host's are real, the GPUs' come from stand-ins for what this machine may not have."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from fleet.v1 import types_pb2

from fleet_agent.metrics.host import HostReader
from fleet_agent.metrics.jetson import JetsonReader
from fleet_agent.metrics.nvml import NvmlReader
from fleet_agent.metrics.reader import SOURCES, MetricsReader, Source
from fleet_agent.metrics.sysfs import NoGpuFilesError, SysfsReader
from tests.waiting import wait_until

NVML, SYSFS, NONE = types_pb2.METRICS_SOURCE_NVML, types_pb2.METRICS_SOURCE_SYSFS, types_pb2.METRICS_SOURCE_NONE


class FakeNvml:
    """The part of pynvml that the reader calls. `missing` readings raise; `gone` makes every call raise."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_GRAPHICS, NVML_CLOCK_MEM = 0, 0, 2

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self, gpus: int = 1, missing: frozenset[str] = frozenset(), broken: frozenset[int] = frozenset()):
        self.gpus, self.missing, self.broken = gpus, missing, broken
        self.gone = False

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            if self.gone or name in self.missing:
                raise self.NVMLError("Not Supported")
            return self.answer(name, *arguments)

        return call

    def answer(self, name: str, *arguments: Any) -> Any:
        if name == "nvmlDeviceGetHandleByIndex" and arguments[0] in self.broken:
            raise self.NVMLError("GPU is lost")
        return {
            "nvmlInit": None,
            "nvmlDeviceGetCount": self.gpus,
            "nvmlDeviceGetHandleByIndex": arguments[0] if arguments else None,
            "nvmlDeviceGetName": b"NVIDIA GeForce RTX 4090",
            "nvmlDeviceGetUUID": "GPU-1234",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24 << 30, used=6 << 30),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=73),
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetPowerUsage": 312_500,
            "nvmlDeviceGetEnforcedPowerLimit": 450_000,
            "nvmlDeviceGetClockInfo": 2520 if arguments[1:] == (0,) else 10501,
            "nvmlDeviceGetComputeRunningProcesses": [
                SimpleNamespace(pid=os.getpid(), usedGpuMemory=5 << 30),
                SimpleNamespace(pid=2**22 + 5, usedGpuMemory=None),
            ],
        }[name]


def source(make: Any, kind: types_pb2.MetricsSource.ValueType = NVML) -> Source:
    return ("stand-in", kind, make)


def test_the_hosts_readings_are_those_of_this_machine(tmp_path: Path) -> None:
    host = HostReader(tmp_path).read()
    assert host.memory_total_bytes == psutil.virtual_memory().total
    assert 0 < host.memory_used_bytes < host.memory_total_bytes
    assert host.cpu_count == psutil.cpu_count()
    assert 0 <= host.cpu_percent <= 100
    assert host.disk_total_bytes == psutil.disk_usage(str(tmp_path)).total
    assert 0 < host.disk_free_bytes <= host.disk_total_bytes
    assert abs(host.uptime_seconds - (time.time() - psutil.boot_time())) < 5


class Clock:
    """The reader's clock, moved by hand."""

    now = 100.0
    time = staticmethod(time.time)

    def monotonic(self) -> float:
        return self.now


def test_network_rates_are_of_the_time_since_the_reading_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = SimpleNamespace(bytes_recv=1000, bytes_sent=5000)
    clock = Clock()
    monkeypatch.setattr(psutil, "net_io_counters", lambda: counters)
    monkeypatch.setattr("fleet_agent.metrics.host.time", clock)
    reader = HostReader(tmp_path)
    first = reader.read()
    assert not first.HasField("network_receive_bytes_per_second")
    clock.now += 2
    counters.bytes_recv += 3000
    counters.bytes_sent -= 1
    second = reader.read()
    assert second.network_receive_bytes_per_second == 1500
    assert second.network_transmit_bytes_per_second == 0


def test_nvml_readings() -> None:
    gpus, warnings = NvmlReader(FakeNvml(gpus=2)).read()
    assert warnings == []
    assert [gpu.index for gpu in gpus] == [0, 1]
    gpu = gpus[0]
    assert (gpu.name, gpu.uuid) == ("NVIDIA GeForce RTX 4090", "GPU-1234")
    assert (gpu.memory_total_bytes, gpu.memory_used_bytes) == (24 << 30, 6 << 30)
    assert (gpu.utilization_percent, gpu.temperature_celsius) == (73, 61)
    assert (gpu.power_watts, gpu.power_limit_watts) == (312.5, 450)
    assert (gpu.graphics_clock_mhz, gpu.memory_clock_mhz) == (2520, 10501)
    ours, gone = gpu.processes
    assert (ours.pid, ours.name, ours.memory_used_bytes) == (os.getpid(), psutil.Process().name(), 5 << 30)
    assert (gone.name, gone.memory_used_bytes) == ("unknown", 0)


def test_a_reading_that_a_gpu_does_not_have_is_null() -> None:
    names = ["UUID", "MemoryInfo", "UtilizationRates", "Temperature", "PowerUsage", "EnforcedPowerLimit", "ClockInfo"]
    missing = frozenset(f"nvmlDeviceGet{name}" for name in [*names, "ComputeRunningProcesses"])
    (gpu,), warnings = NvmlReader(FakeNvml(missing=missing)).read()
    assert [field.name for field, _ in gpu.ListFields()] == ["name"]
    words = "uuid, memory, utilization, temperature, power, power limit, graphics clock, memory clock, processes"
    assert warnings == [f"gpu 0: no {words}: Not Supported"]


def test_a_lost_gpu_is_a_warning_and_the_others_are_read() -> None:
    gpus, warnings = NvmlReader(FakeNvml(gpus=3, broken=frozenset({1}))).read()
    assert [gpu.index for gpu in gpus] == [0, 2]
    assert warnings == ["gpu 1: GPU is lost"]


def jetson(root: Path) -> Path:
    """The files of a Jetson's kernel."""
    files = {
        "sys/devices/platform/gpu.0/load": "437\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "41000\n",
        "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "52250\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "1300500000\n",
        "sys/class/hwmon/hwmon3/in1_label": "VDD_CPU_CV\n",
        "sys/class/hwmon/hwmon3/in2_label": "VDD_GPU_SOC\n",
        "sys/class/hwmon/hwmon3/in2_input": "19000\n",
        "sys/class/hwmon/hwmon3/curr2_input": "1500\n",
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin\0",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_sysfs_readings_of_a_jetson(tmp_path: Path) -> None:
    (gpu,), warnings = SysfsReader(jetson(tmp_path), lambda: (32 << 30, 8 << 30)).read()
    assert warnings == []
    assert (gpu.index, gpu.name, gpu.unified_memory) == (0, "NVIDIA Jetson AGX Orin", True)
    assert gpu.utilization_percent == 43.7
    assert gpu.temperature_celsius == 52.25
    assert (gpu.memory_total_bytes, gpu.memory_used_bytes) == (32 << 30, 8 << 30), "the machine's own"
    assert (gpu.graphics_clock_mhz, gpu.power_watts) == (1300, 28.5)


def test_sysfs_files_that_cannot_be_read_are_warnings(tmp_path: Path) -> None:
    reader = SysfsReader(jetson(tmp_path))
    (tmp_path / "sys/devices/platform/gpu.0/load").write_text("busy")
    (tmp_path / "sys/class/thermal/thermal_zone1/temp").unlink()
    (tmp_path / "sys/class/hwmon/hwmon3/curr2_input").unlink()
    (gpu,), warnings = reader.read()
    assert not gpu.HasField("utilization_percent")
    assert not gpu.HasField("temperature_celsius")
    assert [warning.split(":")[1].strip() for warning in warnings] == ["load", "temperature", "power"]


def test_what_a_kernel_does_not_show_is_said(tmp_path: Path) -> None:
    path = tmp_path / "sys/devices/gpu.0/load"
    path.parent.mkdir(parents=True)
    path.write_text("10")
    (gpu,), warnings = SysfsReader(tmp_path).read()
    assert gpu.utilization_percent == 1
    assert [warning.split(":")[1].strip() for warning in warnings] == ["temperature", "clock", "power"]


class FakeJtop:
    """The part of jetson-stats' jtop that the reader uses, as a Jetson AGX Orin gives it."""

    alive = True

    def __init__(self) -> None:
        self.gpu = {"ga10b": {"type": "integrated", "status": {"load": 97.5}, "freq": {"cur": 1300500}}}
        self.memory = {"RAM": {"tot": 32 << 20, "used": 8 << 20}, "EMC": {"cur": 3199000}}
        self.temperature = {"CPU": {"temp": 50.0, "online": True}, "gpu": {"temp": 61.5, "online": True}}
        self.power: dict[str, Any] = {"rail": {"VDD_GPU_SOC": {"power": 28400}}, "tot": {"power": 41000}}
        self.board = {"hardware": {"Model": "NVIDIA Jetson AGX Orin"}}
        self.processes = [[4711, "root", "I", "Graphic", 20, "S", 1.0, 100, 7 << 20, "python"]]

    def start(self) -> None:
        return None

    def ok(self, spin: bool = False) -> bool:
        return self.alive and spin


def test_jetson_stats_readings() -> None:
    (gpu,), warnings = JetsonReader(SimpleNamespace(jtop=FakeJtop)).read()
    assert warnings == []
    assert (gpu.name, gpu.unified_memory, gpu.utilization_percent) == ("NVIDIA Jetson AGX Orin", True, 97.5)
    assert (gpu.memory_total_bytes, gpu.memory_used_bytes) == (32 << 30, 8 << 30)
    assert (gpu.temperature_celsius, gpu.power_watts) == (61.5, 28.4)
    assert (gpu.graphics_clock_mhz, gpu.memory_clock_mhz) == (1300, 3199)
    (process,) = gpu.processes
    assert (process.pid, process.name, process.memory_used_bytes) == (4711, "python", 7 << 30)


def test_what_jetson_stats_does_not_give_is_said_and_its_end_too() -> None:
    class Poor(FakeJtop):
        def __init__(self) -> None:
            super().__init__()
            self.power = {"rail": {}}
            self.temperature = {"gpu": {"temp": -256, "online": False}}

    reader = JetsonReader(SimpleNamespace(jtop=Poor))
    (gpu,), warnings = reader.read()
    assert not gpu.HasField("power_watts")
    assert warnings == ["gpu 0: jetson-stats does not give temperature_celsius, power_watts"]
    reader._jtop.alive = False
    with pytest.raises(RuntimeError, match="has ended"):
        reader.read()


def test_without_jetson_stats_that_is_said() -> None:
    with pytest.raises(ImportError, match="jetson-stats is not installed"):
        JetsonReader()


def test_a_kernel_without_a_gpu_load_file_has_no_sysfs_reader(tmp_path: Path) -> None:
    with pytest.raises(NoGpuFilesError):
        SysfsReader(tmp_path)


def test_the_sources_that_are_tried() -> None:
    assert [(name, kind) for name, kind, _ in SOURCES] == [
        ("jetson-stats", types_pb2.METRICS_SOURCE_JETSON),
        ("NVML", NVML),
        ("sysfs", SYSFS),
    ]


async def test_a_machine_without_any_gpu_says_why(tmp_path: Path) -> None:
    def without_driver() -> NvmlReader:
        nvml = FakeNvml()
        nvml.gone = True
        return NvmlReader(nvml)

    sources: list[Source] = [("NVML", NVML, without_driver), ("sysfs", SYSFS, lambda: SysfsReader(tmp_path))]
    readings = await MetricsReader(tmp_path, 5, sources).read()
    assert (readings.source, readings.gpus) == (NONE, [])
    assert readings.warnings == [
        "no GPU readings by NVML: Not Supported",
        "no GPU readings by sysfs: the kernel shows no GPU load file",
    ]
    assert readings.host.memory_total_bytes > 0


async def test_sysfs_is_used_where_nvml_is_not(tmp_path: Path) -> None:
    nvml = FakeNvml(missing=frozenset({"nvmlInit"}))
    jet = jetson(tmp_path)
    sources: list[Source] = [("NVML", NVML, lambda: NvmlReader(nvml)), ("sysfs", SYSFS, lambda: SysfsReader(jet))]
    readings = await MetricsReader(tmp_path, 5, sources).read()
    assert (readings.source, len(readings.gpus), readings.warnings) == (SYSFS, 1, [])


async def test_a_driver_that_is_reset_is_found_again(tmp_path: Path) -> None:
    nvml = FakeNvml()
    reader = MetricsReader(tmp_path, 5, [source(lambda: NvmlReader(nvml))])
    assert (await reader.read()).source == NVML
    nvml.gone = True
    readings = await reader.read()
    assert (readings.gpus, readings.warnings) == ([], ["no GPU readings: Not Supported"])
    readings = await reader.read()
    assert (readings.source, readings.warnings) == (NONE, ["no GPU readings by stand-in: Not Supported"])
    nvml.gone = False
    readings = await reader.read()
    assert (readings.source, len(readings.gpus), readings.warnings) == (NVML, 1, [])


async def test_a_driver_that_hangs_gives_the_last_readings_and_no_second_thread(tmp_path: Path) -> None:
    go, calls = threading.Event(), []

    class Hanging:
        def read(self) -> tuple[list[types_pb2.Gpu], list[str]]:
            calls.append(1)
            if len(calls) > 1:
                go.wait(40)
            return [types_pb2.Gpu(index=0, name="one")], []

    reader = MetricsReader(tmp_path, 0.02, [source(Hanging)])
    reader._seconds = 20
    assert len((await reader.read()).gpus) == 1
    reader._seconds = 0.02
    for _ in range(3):
        readings = await reader.read()
        assert [gpu.name for gpu in readings.gpus] == ["one"]
        assert "have not answered within 0.02 s" in readings.warnings[-1]
        assert len(readings.warnings) == 1
        # A busy machine may take longer than that to begin it.
        await wait_until(lambda: len(calls) > 1)
    assert len(calls) == 2
    go.set()
    reader._seconds = 20
    assert (await reader.read()).warnings == []


async def test_a_reading_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = MetricsReader(tmp_path, 5, [])
    good = await reader.read()

    def failing(self: HostReader) -> types_pb2.Host:
        raise OSError("the folder is gone")

    monkeypatch.setattr(HostReader, "read", failing)
    readings = await reader.read()
    assert readings.host == good.host
    assert readings.warnings == ["no new readings: the folder is gone"]
