"""Every setting of the server: from flags, then FLEET_* variables, then defaults."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from fleet_server.domain.webhook import SCHEDULE_SECONDS
from fleet_server.domain.webhook_signature import parse_secrets
from fleet_server.services.callbacks import allow_rules

DOCUMENTED_S3_SECRET = "minioadmin123"
PUBLISHED_KEYS = frozenset({"fleet-commander-2024", DOCUMENTED_S3_SECRET, "minioadmin"})
"""Secrets that stand in public documents; good for a loopback bind alone."""

Port = Annotated[int, Field(ge=0, le=65535)]


def _off(value: object) -> object:
    return None if isinstance(value, str) and value.lower() == "off" else value


OptionalPort = Annotated[Port | None, BeforeValidator(_off)]
Names = Annotated[tuple[str, ...], NoDecode]
Numbers = Annotated[tuple[Annotated[float, Field(ge=0)], ...], NoDecode]


def s3_address(value: str, *, path: bool = False) -> str:
    """An S3 server's address as we use it; `host:port` alone is http. Raises ValueError."""
    parts = urlsplit(value if "://" in value else f"http://{value}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError("must be http://HOST:PORT or https://HOST, without a user")
    if parts.query or parts.fragment or (parts.path.strip("/") and not path):
        raise ValueError("must end with host and port: buckets are addressed as HOST/BUCKET")
    if parts.port == 0:
        raise ValueError("must not have port 0")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


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
    agents_port: Port = 50052
    """Where agents with certificates come; open where TLS is."""
    comfy_port: OptionalPort = 8188
    s3_port: OptionalPort = 9010
    data_dir: Path = Path("~/.fleet")
    redis_url: str | None = None
    registry_url: str = "http://localhost:5000"
    """The registry whose images are listed."""
    registry_username: str = ""
    registry_password: SecretStr | None = None
    autoscale_seconds: Annotated[float, Field(gt=0)] = 5
    """Between looks at the jobs that wait for the services that grow with them."""
    autoscale_calm_seconds: Annotated[float, Field(ge=0)] = 60
    """A service shrinks when fewer replicas have been enough for so long."""
    api_key: SecretStr | None = None
    api_keys_file: Path | None = None
    """Lines `name:key` or `name:key:admin`; read again when it changes or at SIGHUP."""
    lan: bool = False
    """Listen on all addresses, with TLS for gRPC and a key that is made at the first start."""
    insecure_no_auth: bool = False
    """Everybody may read and submit without a key, on whatever address; all else still needs one."""
    tls: bool | None = None
    """TLS on the gRPC ports; where unset, on all binds but loopback."""
    tls_names: Names = ()
    """Further names and addresses for the server's certificate."""
    pki_dir: Path | None = None
    """Folder of the fleet's own authority (ca.pem, ca.key), which replicas share; `pki` in `data_dir` where unset."""
    advertise: Names = ()
    """Addresses that join tokens tell agents to dial; where unset, those of this machine."""
    certificate_days: Annotated[float, Field(gt=0, le=365)] = 30
    """How long a node's certificate is good; agents renew theirs when two thirds have passed."""
    allowed_hosts: Names = ()
    allowed_origins: Names = ()
    default_model: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    ready_json: bool = False
    """Say that it is ready in one line of JSON."""

    agent: bool = True
    """Start an agent of this machine beside the server."""
    agent_slots: Annotated[int, Field(ge=1, le=64)] = 1
    agent_batch: Annotated[int, Field(ge=1, le=64)] = 1
    """Jobs that each of its slots takes at once, for an engine that runs like ones together."""
    engines: Names = ()
    """Engines of that agent; all that are installed when empty."""

    generate_timeout_seconds: Annotated[float, Field(gt=0)] = 300
    heartbeat_seconds: Annotated[float, Field(gt=0)] = 5
    lease_seconds: Annotated[float, Field(gt=0)] = 30
    accept_seconds: Annotated[float, Field(gt=0)] = 10
    reap_grace_seconds: Annotated[float, Field(ge=0)] = 60
    """After a start of the server no lease is reaped for so long."""
    reap_interval_seconds: Annotated[float, Field(gt=0)] = 1
    retry_backoff_seconds: Annotated[float, Field(ge=0)] = 1
    """Before the first automatic retry of a failed job; twice as long before each next one, at most a minute."""
    stop_grace_seconds: Annotated[float, Field(ge=0)] = 10

    callback_allow: Names | None = None
    """All that callbacks may go to: `public`, `loopback`, addresses, networks. Unset: public, and loopback too where
    the server binds loopback without a key."""
    webhook_secret: SecretStr | None = None
    """Signs callbacks: whsec_<base64>, or several of them. Unset: the one in the file webhook-secret of `data_dir`."""
    webhook_secrets_file: Path | None = None
    """Lines `<address> whsec_<base64>` for receivers with secrets of their own; the longest address counts."""
    webhook_schedule_seconds: Numbers = SCHEDULE_SECONDS
    """Waits after the failed tries of a callback, the first at its head; after one try more it is given up."""
    webhook_timeout_seconds: Annotated[float, Field(gt=0, le=300)] = 15
    webhook_retry_after_seconds: Annotated[float, Field(ge=0)] = 86_400
    """The longest wait that a receiver may ask for."""
    webhook_lease_seconds: Annotated[float, Field(gt=0)] = 60
    """After so long another sender takes a callback over from one that died."""
    webhook_defer_seconds: Annotated[float, Field(gt=0)] = 300
    """The longest that callbacks to a busy or dead receiver are put off before it is looked at again."""
    webhook_poll_seconds: Annotated[float, Field(gt=0)] = 1
    webhook_concurrency: Annotated[int, Field(ge=1, le=1_000)] = 64
    webhook_host_concurrency: Annotated[int, Field(ge=1, le=1_000)] = 8

    output_sync_seconds: Annotated[float, Field(gt=0)] = 900
    """Between copies of outputs to S3."""
    output_sync_eager: bool | None = None
    """Copy each output as soon as it is stored. Unset: only with a store of yours, which other servers may share."""
    output_max_age_hours: Annotated[float, Field(gt=0, le=87_600)] = 24
    """Local files of outputs are kept so long, and for as long as S3 has not verifiably got them."""
    output_reserve_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    """Outputs and inputs leave so much of the disk free."""
    input_ttl_seconds: Annotated[float, Field(gt=0)] = 86_400
    """What POST /api/inputs brought is kept so long."""
    s3_endpoint: str | None = None
    """Your S3 server, http(s)://host[:port]. Unset: `fleet up` runs one on `s3_port`."""
    s3_access_key: Annotated[str, Field(min_length=3)] = "minioadmin"
    s3_secret_key: SecretStr | None = None
    """Unset: the documented one on a loopback bind; elsewhere the embedded S3 draws one and keeps it in `data_dir`."""
    s3_region: str = "us-east-1"
    s3_public_url: str | None = None
    """Where callers reach the S3 server, where that is not its endpoint."""

    models_refresh_seconds: Annotated[float, Field(gt=0)] = 30
    """Between looks at the buckets fleet-models and fleet-loras."""
    store_memory_bytes: Annotated[int, Field(ge=64 << 20)] = 2 << 30
    disk_floor_bytes: Annotated[int, Field(ge=0)] = 512 << 20
    """Below this much free disk no job is accepted."""
    decisions_file: Path | None = None
    """Every decision of dispatch is written here, for `fleet replay`; the file is made anew at each start."""

    @field_validator("data_dir", "api_keys_file", "webhook_secrets_file", "pki_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator(
        "allowed_hosts",
        "allowed_origins",
        "tls_names",
        "advertise",
        "engines",
        "callback_allow",
        "webhook_schedule_seconds",
        mode="before",
    )
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

    @field_validator("callback_allow")
    @classmethod
    def _known(cls, value: Names | None) -> Names | None:
        allow_rules(value or ())
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _signs(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_secrets(value.get_secret_value())
        return value

    @field_validator("s3_endpoint", "s3_public_url")
    @classmethod
    def _address(cls, value: str | None, field: ValidationInfo) -> str | None:
        return None if value is None else s3_address(value, path=field.field_name == "s3_public_url")

    @model_validator(mode="after")
    def _long_leases(self) -> Self:
        if self.webhook_lease_seconds < 2 * self.webhook_timeout_seconds:
            raise ValueError("webhook_lease_seconds: must be at least twice webhook_timeout_seconds")
        return self

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.lan and is_loopback(self.host) and "host" not in self.model_fields_set:
            self.host = "0.0.0.0"
        if not is_loopback(self.host):
            if not (self.keyed or self.lan or self.insecure_no_auth):
                raise ValueError(
                    f"FLEET_HOST={self.host} is reachable by others, so a key is required: "
                    "start with --lan, which makes one, set FLEET_API_KEY (or FLEET_API_KEYS_FILE), or bind 127.0.0.1"
                )
            if self.api_key is not None and self.api_key.get_secret_value() in PUBLISHED_KEYS:
                raise ValueError(
                    "FLEET_API_KEY is a published example: choose one of your own, "
                    "for instance from `openssl rand -hex 32`"
                )
            secret = None if self.s3_secret_key is None else self.s3_secret_key.get_secret_value()
            if secret in PUBLISHED_KEYS or (secret is None and self.s3_endpoint is not None):
                raise ValueError(
                    f"FLEET_HOST={self.host} is reachable by others, so the published FLEET_S3_SECRET_KEY will not do: "
                    "set FLEET_S3_ACCESS_KEY and FLEET_S3_SECRET_KEY of your own"
                )
        return self

    @property
    def keyed(self) -> bool:
        """Whether callers need a key."""
        return self.api_key is not None or self.api_keys_file is not None

    @property
    def tls_on(self) -> bool:
        """Whether the gRPC ports speak TLS."""
        return not self.loopback if self.tls is None else self.tls

    @property
    def pki_folder(self) -> Path:
        return self.pki_dir or self.data_dir / "pki"

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def embedded_s3(self) -> bool:
        """Whether an S3 server of ours is wanted."""
        return self.s3_endpoint is None and self.s3_port is not None

    @property
    def mode(self) -> Literal["embedded", "production"]:
        """`embedded` where the store is a child process of ours."""
        return "embedded" if self.redis_url is None else "production"
