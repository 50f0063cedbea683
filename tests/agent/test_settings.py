"""Settings of an agent."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fleet_agent.settings import AgentSettings, _host_name


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = AgentSettings()
    assert (settings.server, settings.slots, settings.clusters, settings.engines) == ("127.0.0.1:50051", 1, (), ())
    assert settings.data_dir == Path("~/.fleet/agent").expanduser()
    assert settings.models_folder == settings.data_dir / "models"
    assert (settings.reconnect_seconds, settings.write_seconds, settings.stable_seconds) == (10, 10, 30)
    assert settings.disk_floor_bytes == 2 << 30
    assert settings.api_key is None


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "FLEET_AGENT_SERVER": "fleet:50051",
        "FLEET_AGENT_CLUSTERS": "studio, night",
        "FLEET_AGENT_LABELS": "zone=a,gpu=4090",
        "FLEET_AGENT_ENGINES": "sketch",
        "FLEET_AGENT_MODELS_DIR": "/mnt/models",
        "FLEET_API_KEY": "fc_secret",
    }.items():
        monkeypatch.setenv(name, value)
    settings = AgentSettings()
    assert settings.clusters == ("studio", "night")
    assert settings.labels == {"zone": "a", "gpu": "4090"}
    assert settings.models_folder == Path("/mnt/models")
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "fc_secret"
    assert "fc_secret" not in repr(settings)


def test_arguments_go_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_AGENT_SLOTS", "3")
    assert AgentSettings(slots=2).slots == 2
    assert AgentSettings().slots == 3


@pytest.mark.parametrize(
    "given",
    [
        {"node_id": "heartbeats"},
        {"node_id": "tokens"},
        {"node_id": ""},
        {"node_id": "a b"},
        {"node_id": "a\n"},
        {"node_id": "x" * 64},
        {"slots": 0},
        {"slots": 65},
        {"labels": "zone"},
        {"labels": "=a"},
        {"reconnect_seconds": 0},
        {"log_level": "loud"},
    ],
    ids=str,
)
def test_what_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(given))):
        AgentSettings(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("gpu-01.lan", "gpu-01.lan"),
        ("büro", "b-ro"),
        ("-x", "x"),
        ("", "node"),
        ("tokens", "node"),
        ("a" * 90, "a" * 63),
    ],
)
def test_the_hosts_name_makes_a_node_id(monkeypatch: pytest.MonkeyPatch, host: str, name: str) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert _host_name() == name
    assert AgentSettings().node_id == name
