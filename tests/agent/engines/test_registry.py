"""Finding engines: built-in ones and plug-ins, and what a broken plug-in may and may not do."""

from __future__ import annotations

import pickle
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from PIL import Image

from fleet_agent.engines.base import ENTRY_POINT_GROUP, EngineError, EngineSettings, Reason
from fleet_agent.engines.fixed import FixedEngine
from fleet_agent.engines.registry import create, discover
from tests.agent.engines.helpers import Recorder, task_of

PLUGIN = """
from fleet_agent.engines.fixed import FixedEngine
from fleet_agent.engines.base import EngineInfo

class Good(FixedEngine):
    def info(self):
        return EngineInfo("good", "2.0", ("llm_inference",))

class NoInfo(FixedEngine):
    def info(self):
        return None

def raising(settings):
    raise RuntimeError("no such device")

def leaving(settings):
    raise SystemExit(3)

def not_an_engine(settings):
    return object()

NOT_CALLABLE = 3
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSettings:
    (tmp_path / "a_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "a_plugin", raising=False)
    return EngineSettings(tmp_path / "models", tmp_path / "data")


def _entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, ENTRY_POINT_GROUP)


def test_sketch_is_there_and_fixed_only_when_asked(settings: EngineSettings) -> None:
    registry = discover(settings, plugins=[])
    assert list(registry.engines) == ["sketch"]
    assert registry.statuses[0].status == "ready"
    assert registry.for_job_type("image_gen") == "sketch"
    assert registry.for_job_type("transcription") is None
    assert list(discover(settings, ["fixed"], plugins=[]).engines) == ["fixed"]


def test_a_plugin_works_beside_the_built_in_engines(settings: EngineSettings) -> None:
    registry = discover(settings, plugins=[_entry("good", "a_plugin:Good")])
    assert sorted(registry.engines) == ["good", "sketch"]
    assert registry.for_job_type("llm_inference") == "good"


@pytest.mark.parametrize(
    ("name", "value", "detail"),
    [
        ("bad", "a_plugin:raising", "RuntimeError: no such device"),
        ("bad", "a_plugin:leaving", "SystemExit: 3"),
        ("bad", "a_plugin:not_an_engine", "not an Engine"),
        ("bad", "a_plugin:NoInfo", "must return an EngineInfo"),
        ("bad", "a_plugin:NOT_CALLABLE", "not callable"),
        ("bad", "a_plugin:nonesuch", "nonesuch"),
        ("bad", "no_such_module:x", "no_such_module"),
        ("sketch", "a_plugin:Good", "name of a built-in engine"),
    ],
)
def test_a_broken_plugin_is_reported_and_left_out(settings: EngineSettings, name: str, value: str, detail: str) -> None:
    registry = discover(settings, plugins=[_entry(name, value), _entry("good", "a_plugin:Good")])
    status = next(status for status in registry.statuses if status.name == name)
    assert status.status == "failed"
    assert status.detail is not None and detail in status.detail
    assert name not in registry.engines and "good" in registry.engines


def test_two_plugins_of_one_name_are_refused(settings: EngineSettings) -> None:
    both = [_entry("good", "a_plugin:Good"), _entry("good", "a_plugin:NoInfo")]
    registry = discover(settings, plugins=both)
    assert "good" not in registry.engines
    assert any("uninstall all but one" in (status.detail or "") for status in registry.statuses)


def test_an_engine_that_is_not_there_is_reported(settings: EngineSettings) -> None:
    status = discover(settings, ["nonesuch"], plugins=[]).statuses[0]
    assert status.status == "failed" and "install a package" in (status.detail or "")
    with pytest.raises(EngineError, match="nonesuch"):
        create("nonesuch", settings)
    assert create("sketch", settings).info().name == "sketch"


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(EngineError("DISK_FULL", "no room", retryable=True)))
    assert (error.reason, error.detail, error.retryable) == (Reason.DISK_FULL, "no room", True)


@pytest.mark.parametrize("size", [10_000, 1_500_000])
def test_the_fixed_engine_gives_a_picture_of_that_size(tmp_path: Path, size: int) -> None:
    engine = FixedEngine(EngineSettings(tmp_path, tmp_path, {"size_bytes": str(size)}))
    report = Recorder()
    output = engine.run(task_of(tmp_path), report).outputs[0]
    assert abs(output.path.stat().st_size - size) < size * 0.03
    with Image.open(output.path) as image:
        image.load()
        assert image.size == (output.width, output.height)
    assert report.steps == [(0, 1), (1, 1)]


def test_the_fixed_engine_refuses_a_size_that_makes_no_sense(tmp_path: Path) -> None:
    registry = discover(EngineSettings(tmp_path, tmp_path, {"size_bytes": "1"}), ["fixed"], plugins=[])
    assert "size_bytes" in (registry.statuses[0].detail or "")
