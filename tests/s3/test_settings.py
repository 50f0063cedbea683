"""Settings of S3: addresses, published keys, and how the embedded server is reached and by which keys."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from fleet_server.http import PortTakenError
from fleet_server.objects import opened_s3
from fleet_server.settings import Settings
from fleet_server.storage.s3 import S3Store
from tests.ports import free_port

Opened = tuple[S3Store, tuple[str, str]]
OPEN = {"host": "0.0.0.0", "api_key": SecretStr("a-key-of-our-own")}


@contextlib.asynccontextmanager
async def opened(settings: Settings, folder: Path) -> AsyncIterator[Opened]:
    """The store of these settings, and the keys that it uses."""
    with (folder / "lock").open("w") as lock:
        async with opened_s3(settings, lock_fd=lock.fileno()) as store:
            assert store._config is not None
            yield store, (store._config.access_key, store._config.secret_key)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://10.0.0.5:9010", "http://10.0.0.5:9010"),
        ("10.0.0.5:9010", "http://10.0.0.5:9010"),
        ("https://s3.example.com/", "https://s3.example.com"),
        ("http://[::1]:9010", "http://[::1]:9010"),
    ],
)
def test_addresses(given: str, meant: str) -> None:
    assert Settings(s3_endpoint=given).s3_endpoint == meant


@pytest.mark.parametrize(
    "given", ["", "ftp://x", "http://", "http://a:b@x", "http://x/bucket", "http://x?y", "http://x:0"]
)
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(ValidationError, match="s3_endpoint"):
        Settings(s3_endpoint=given)
    assert Settings(s3_public_url="https://fleet.example/s3/").s3_public_url == "https://fleet.example/s3"


@pytest.mark.parametrize("secret", ["minioadmin123", "minioadmin"])
@pytest.mark.parametrize("endpoint", [None, "http://10.0.0.5:9010"])
def test_published_keys_are_for_loopback_alone(secret: str, endpoint: str | None) -> None:
    assert Settings(s3_secret_key=SecretStr(secret), s3_endpoint=endpoint).loopback
    with pytest.raises(ValidationError, match="FLEET_S3_SECRET_KEY"):
        Settings(**OPEN, s3_secret_key=SecretStr(secret), s3_endpoint=endpoint)  # type: ignore[arg-type]


def test_a_server_of_yours_on_an_open_bind_needs_its_own_keys() -> None:
    assert Settings(s3_endpoint="http://10.0.0.5:9010").s3_secret_key is None
    with pytest.raises(ValidationError, match="FLEET_S3_SECRET_KEY"):
        Settings(**OPEN, s3_endpoint="http://10.0.0.5:9010")  # type: ignore[arg-type]


async def test_on_loopback_the_documented_keys_open_ours(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, s3_port=0)
    async with opened(settings, tmp_path) as (store, keys):
        await store.settled(20)
        assert keys == ("minioadmin", "minioadmin123")
        assert store.status == (True, None)
        assert store.url("fleet-outputs", "a.png").startswith("http://localhost:")


async def test_elsewhere_ours_draws_a_secret_once_and_keeps_it_from_others(tmp_path: Path) -> None:
    settings = Settings(**OPEN, data_dir=tmp_path, s3_port=0)  # type: ignore[arg-type]
    secrets = set()
    for _ in range(2):
        async with opened(settings, tmp_path) as (store, keys):
            secrets.add(keys[1])
            await store.settled(20)
            assert store.status == (True, None)
            assert "localhost" not in store.url("fleet-outputs", "a.png")
    (secret,) = secrets
    assert len(secret) == 40
    assert (tmp_path / "s3-secret-key").read_text().strip() == secret
    assert (tmp_path / "s3-secret-key").stat().st_mode & 0o777 == 0o600


async def test_a_taken_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its default we go on without and say so; asked for, it is refused naming port and flag."""
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(PortTakenError, match=f"{port}.*--s3-port"):
            async with opened_s3(Settings(data_dir=tmp_path, s3_port=port), lock_fd=-1):
                pass
        monkeypatch.setattr(Settings.model_fields["s3_port"], "default", port)
        Settings.model_rebuild(force=True)
        async with opened_s3(Settings(data_dir=tmp_path), lock_fd=-1) as store:
            state, why = store.part_status
            assert state == "unavailable" and why is not None and f"{port}" in why and "--s3-port" in why
            assert store.notices() == [why]
    monkeypatch.undo()
    Settings.model_rebuild(force=True)
    assert Settings().s3_port == 9010


async def test_off(tmp_path: Path) -> None:
    async with opened_s3(Settings(data_dir=tmp_path, s3_port="off"), lock_fd=-1) as store:  # type: ignore[arg-type]
        assert store.part_status == ("off", None)
        assert store.notices() == []
    assert not (tmp_path / "s3").exists()
