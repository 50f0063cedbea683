"""The server's settings: sources, limits and the refusal of unsafe binds."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from fleet_server.callbacks import Callbacks
from fleet_server.services.callbacks import CallbackRules
from fleet_server.settings import Settings, is_loopback

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


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


def test_callbacks_have_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings()
    assert (settings.callback_allow, settings.webhook_secret) == (None, None)
    assert settings.webhook_schedule_seconds[:3] == (5, 300, 1800)
    monkeypatch.setenv("FLEET_CALLBACK_ALLOW", "public, 10.0.0.0/8")
    monkeypatch.setenv("FLEET_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("FLEET_WEBHOOK_SCHEDULE_SECONDS", "0.5 2 3")
    settings = Settings()
    assert settings.callback_allow == ("public", "10.0.0.0/8")
    assert settings.webhook_schedule_seconds == (0.5, 2, 3)
    assert settings.webhook_secret is not None and settings.webhook_secret.get_secret_value() == SECRET
    assert SECRET not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("callback_allow", "private"),
        ("webhook_secret", "whsec_dG9vIHNob3J0"),
        ("webhook_secret", "no-prefix-dG9vIHNob3J0"),
        ("webhook_schedule_seconds", "5 soon"),
        ("webhook_schedule_seconds", "-1"),
        ("webhook_lease_seconds", "20"),
    ],
)
def test_callback_settings_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"FLEET_{name.upper()}", value)
    with pytest.raises(ValidationError, match=name) as caught:
        Settings()
    assert "dG9vIHNob3J0" not in str(caught.value)


def test_loopback_receivers_are_welcome_on_a_keyless_loopback_bind_alone(tmp_path: Path) -> None:
    key = SecretStr("a-key-of-our-own")

    def rules(**settings: Any) -> CallbackRules:
        return Callbacks(Settings(data_dir=tmp_path, webhook_secret=SecretStr(SECRET), **settings)).rules

    assert (rules().loopback, rules().public) == (True, True)
    for settings in ({"api_key": key}, {"api_key": key, "host": "0.0.0.0"}, {"api_keys_file": tmp_path / "keys"}):
        assert (rules(**settings).loopback, rules(**settings).public) == (False, True)
    # The list, where one is given, is the whole list.
    assert (rules(callback_allow="public").loopback, rules(callback_allow="public").public) == (False, True)
    narrow = rules(callback_allow="10.0.0.0/8")
    assert (narrow.loopback, narrow.public, len(narrow.allowed)) == (False, False, 1)
    assert rules(api_key=key, callback_allow="loopback").loopback


def test_our_own_ports_and_addresses_are_known_to_the_rules(tmp_path: Path) -> None:
    callbacks = Callbacks(Settings(data_dir=tmp_path, webhook_secret=SecretStr(SECRET), port=0, comfy_port=None))
    callbacks.own_port(40_123)
    assert callbacks.rules.own_ports == {40_123, 50_051, 9_010}
    assert ipaddress.ip_address("127.0.0.1") in callbacks.rules.own_addresses
