"""The server's settings: sources, limits and the refusal of unsafe binds."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from fleet_server.settings import Settings, is_loopback


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("FLEET_"):
            monkeypatch.delenv(name)


def test_defaults_are_the_documented_ports_on_loopback() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.grpc_port) == ("127.0.0.1", 8765, 50051)
    assert (settings.comfy_port, settings.s3_port) == (8188, 9010)
    assert settings.data_dir == Path.home() / ".fleet"
    assert settings.mode == "embedded"


def test_variables_are_read_and_flags_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLEET_PORT", "9001")
    monkeypatch.setenv("FLEET_GRPC_PORT", "9002")
    monkeypatch.setenv("FLEET_COMFY_PORT", "off")
    monkeypatch.setenv("FLEET_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("FLEET_REDIS_URL", "redis://127.0.0.1:6379/0")
    monkeypatch.setenv("FLEET_ALLOWED_HOSTS", "fleet.lan, gpu.lan")
    settings = Settings(port=9003)
    assert (settings.port, settings.grpc_port, settings.comfy_port) == (9003, 9002, None)
    assert settings.data_dir == tmp_path
    assert settings.mode == "production"
    assert settings.allowed_hosts == ("fleet.lan", "gpu.lan")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "fleet.lan"])
def test_an_open_bind_needs_a_key(host: str) -> None:
    with pytest.raises(ValidationError, match="FLEET_API_KEY"):
        Settings(host=host)
    assert not Settings(host=host, api_key=SecretStr("a-key-of-our-own")).loopback


def test_a_published_key_is_refused_on_an_open_bind_alone() -> None:
    with pytest.raises(ValidationError, match="published"):
        Settings(host="0.0.0.0", api_key=SecretStr("fleet-commander-2024"))
    assert Settings(api_key=SecretStr("fleet-commander-2024")).api_key is not None


def test_a_key_never_shows() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(api_key=SecretStr("s3cret-value"), port=70000)
    assert "s3cret-value" not in str(caught.value)
    assert "s3cret-value" not in repr(Settings(api_key=SecretStr("s3cret-value")))


def test_a_blank_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="blank"):
        Settings(api_key=SecretStr(" "))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.9.9", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
