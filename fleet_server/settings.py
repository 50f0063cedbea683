"""Every setting of the server: from flags, then FLEET_* variables, then defaults."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PUBLISHED_KEYS = frozenset({"fleet-commander-2024", "minioadmin123"})
"""Secrets that stand in public documents; good for a loopback bind alone."""

Port = Annotated[int, Field(ge=0, le=65535)]


def _off(value: object) -> object:
    return None if isinstance(value, str) and value.lower() == "off" else value


OptionalPort = Annotated[Port | None, BeforeValidator(_off)]
Names = Annotated[tuple[str, ...], NoDecode]


def is_loopback(host: str) -> bool:
    """Whether a bind address is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Settings(BaseSettings):
    """Settings of `fleet up` and `fleet server`. Port 0 takes a free one; `off` closes an optional door."""

    model_config = SettingsConfigDict(env_prefix="FLEET_", extra="ignore", hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: Port = 8765
    grpc_port: Port = 50051
    comfy_port: OptionalPort = 8188
    s3_port: OptionalPort = 9010
    data_dir: Path = Path("~/.fleet")
    redis_url: str | None = None
    api_key: SecretStr | None = None
    api_keys_file: Path | None = None
    """Lines `name:key` or `name:key:admin`; read again when it changes or at SIGHUP."""
    allowed_hosts: Names = ()
    allowed_origins: Names = ()
    default_model: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    agent: bool = True
    """Start an agent of this machine beside the server."""
    agent_slots: Annotated[int, Field(ge=1, le=64)] = 1
    engines: Names = ()
    """Engines of that agent; all that are installed when empty."""

    generate_timeout_seconds: Annotated[float, Field(gt=0)] = 300
    heartbeat_seconds: Annotated[float, Field(gt=0)] = 5
    lease_seconds: Annotated[float, Field(gt=0)] = 30
    accept_seconds: Annotated[float, Field(gt=0)] = 10
    reap_grace_seconds: Annotated[float, Field(ge=0)] = 60
    """After a start of the server no lease is reaped for so long."""
    reap_interval_seconds: Annotated[float, Field(gt=0)] = 1
    retry_backoff_seconds: Annotated[float, Field(ge=0)] = 2
    stop_grace_seconds: Annotated[float, Field(ge=0)] = 10
    store_memory_bytes: Annotated[int, Field(ge=64 << 20)] = 2 << 30
    disk_floor_bytes: Annotated[int, Field(ge=0)] = 512 << 20
    """Below this much free disk no job is accepted."""

    @field_validator("data_dir", "api_keys_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("allowed_hosts", "allowed_origins", "engines", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(word for word in value.replace(",", " ").split() if word)
        return value

    @field_validator("api_key")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().strip():
            raise ValueError("must not be blank: leave it out to run without a key")
        return value

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if not is_loopback(self.host):
            if not self.keyed:
                raise ValueError(
                    f"FLEET_HOST={self.host} is reachable by others, so a key is required: "
                    "set FLEET_API_KEY (or FLEET_API_KEYS_FILE), or bind 127.0.0.1"
                )
            if self.api_key is not None and self.api_key.get_secret_value() in PUBLISHED_KEYS:
                raise ValueError(
                    "FLEET_API_KEY is a published example: choose one of your own, "
                    "for instance from `openssl rand -hex 32`"
                )
        return self

    @property
    def keyed(self) -> bool:
        """Whether callers need a key."""
        return self.api_key is not None or self.api_keys_file is not None

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def mode(self) -> Literal["embedded", "production"]:
        """`embedded` where the store is a child process of ours."""
        return "embedded" if self.redis_url is None else "production"
