"""Every setting of an agent: from flags, then FLEET_* variables, then defaults."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from fleet_agent.containers.mounts import bad_root

_NODE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_RESERVED = frozenset({"heartbeats", "tokens"})
Names = Annotated[tuple[str, ...], NoDecode]
Paths = Annotated[tuple[Path, ...], NoDecode]
Labels = Annotated[dict[str, str], NoDecode]


def _host_name() -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")[:63]
    return name if name and name not in _RESERVED else "node"


class AgentSettings(BaseSettings):
    """Settings of `fleet agent`. Lists are words parted by commas or blanks, labels are name=value."""

    model_config = SettingsConfigDict(env_prefix="FLEET_AGENT_", extra="ignore", populate_by_name=True)

    server: str = "127.0.0.1:50051"
    node_id: str = Field(default_factory=_host_name)
    data_dir: Path = Path("~/.fleet/agent")
    models_dir: Path | None = None
    slots: Annotated[int, Field(ge=1, le=64)] = 1
    batch: Annotated[int, Field(ge=1, le=64)] = 1
    """Tasks that each slot takes at once, for an engine that runs like ones together."""
    batch_wait_seconds: Annotated[float, Field(ge=0, le=10)] = 0.05
    """What a slot waits for more tasks like the first."""
    clusters: Names = ()
    labels: Labels = Field(default_factory=dict)
    engines: Names = ()
    join: SecretStr | None = None
    """A join token; used once, where this machine has no identity yet."""
    ca_file: Path | None = None
    """The server's authority, where its gRPC port speaks TLS and this agent has a key and no certificate."""
    api_key: SecretStr | None = Field(default=None, validation_alias="FLEET_API_KEY")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    ready_json: bool = False
    """Say in one line of JSON that the server has welcomed it, the first time."""

    reconnect_seconds: Annotated[float, Field(gt=0)] = 10
    """The first reconnect waits a random part of this."""
    stable_seconds: Annotated[float, Field(gt=0)] = 30
    """After a session that long the next reconnect counts as the first."""
    welcome_seconds: Annotated[float, Field(gt=0)] = 15
    """From dialling to the server's Welcome."""
    write_seconds: Annotated[float, Field(gt=0)] = 10
    """A write stuck for so long ends the session."""
    cancel_grace_seconds: Annotated[float, Field(gt=0)] = 5
    """An engine that has not stopped by then is killed."""
    stop_grace_seconds: Annotated[float, Field(ge=0)] = 5
    """Time to say goodbye at the end."""
    exclusive_share: Annotated[float, Field(gt=0, le=1)] = 25 / 30
    """Exclusive work ends when so much of its lease has passed since the last acknowledged heartbeat."""
    upload_timeout_seconds: Annotated[float, Field(gt=0)] = 600
    upload_retry_seconds: Annotated[float, Field(gt=0)] = 10
    """Longest pause between tries of an upload."""
    inline_bytes: Annotated[int, Field(ge=0, le=65_536)] = 65_536
    """Outputs that have no more together ride in the end of their attempt: no uploads, no files of their own."""
    resend_seconds: Annotated[float, Field(gt=0)] = 15
    """An end that is not acknowledged is said again so often."""
    rescan_seconds: Annotated[float, Field(gt=0)] = 5
    """Between looks at the model folder."""
    describe_seconds: Annotated[float, Field(gt=0)] = 120
    """For the engines to say what they are."""
    docker_host: str | None = None
    """The Docker engine, unix:///path. Unset: DOCKER_HOST, else the socket of this machine."""
    mount_roots: Paths = (Path("/mnt/s3-models"), Path("/srv/fleet"))
    """Folders of this node that containers may see, with all below them; empty: none."""
    image_roots: Names = ()
    """Registries and repositories, with all below them, that images of containers may come from; empty: any."""
    container_pids: Annotated[int, Field(ge=16)] = 4096
    """Processes and threads that a container may have."""
    docker_threads: Annotated[int, Field(ge=1, le=256)] = 16
    """Calls of the Docker engine at once."""
    docker_seconds: Annotated[float, Field(gt=0)] = 5
    """Between looks at the Docker engine and, on a manager, at the services of its swarm."""
    metrics_seconds: Annotated[float, Field(gt=0)] = 2
    """A heartbeat does not wait longer for its readings: a driver may hang."""
    disk_floor_bytes: Annotated[int, Field(ge=0)] = 2 << 30
    """With less free disk no work is taken, and no model is brought."""
    models_budget_bytes: Annotated[int, Field(ge=0)] = 0
    """Model files may have so much together, those put there by hand counted in; 0: what the disk has."""
    models_evict_any: bool = False
    """Files that were put into the model folder by hand may be removed for others too."""
    download_patience_seconds: Annotated[float, Field(gt=0)] = 600
    """A download that gets no byte for so long is given up; what is there is kept for the next."""
    download_sync_bytes: Annotated[int, Field(ge=1 << 20)] = 16 << 20
    """After so many bytes what was brought is surely on the disk: after a crash it goes on from there."""
    load_timeout_seconds: Annotated[float, Field(gt=0)] = 900
    """An engine that loads a model for longer is killed."""

    comfyui_url: str = ""
    """The node's ComfyUI, such as http://127.0.0.1:8188; empty: none."""
    openai_url: str = ""
    """An OpenAI-compatible server of the node, such as http://127.0.0.1:8000/v1; empty: none."""
    openai_api_key: SecretStr | None = None
    """Sent to that server, where it asks for one."""
    sdxl_trt_urls: Names = ()
    """The node's SDXL-TRT workers, such as http://127.0.0.1:8080; empty: none."""
    sdxl_trt_path: str = "/api/fleet/generate"
    """Where these workers take requests."""
    engine_refresh_seconds: Annotated[float, Field(gt=0)] = 30
    """Engines that speak to a program of their own are asked again so often what they can do."""
    engine_memory_bytes: Annotated[int, Field(ge=0)] = 0
    """An engine's process that takes more memory than this, with its children, is ended; 0: as much as there is."""
    options: Labels = Field(default_factory=dict)
    """Options of engines, name=value parted by commas; see docs/engines.md."""

    @field_validator("data_dir", "models_dir", "ca_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("node_id")
    @classmethod
    def _name(cls, value: str) -> str:
        if not _NODE_ID.match(value) or value in _RESERVED:
            raise ValueError("must be 1 to 63 letters, digits, '.', '_' or '-', and not `heartbeats` or `tokens`")
        return value

    @field_validator("clusters", "engines", "sdxl_trt_urls", "image_roots", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(word for word in value.replace(",", " ").split() if word)
        return value

    @field_validator("mount_roots", mode="before")
    @classmethod
    def _paths(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(Path(word) for word in value.replace(",", ":").split(":") if word)
        return value

    @field_validator("docker_host")
    @classmethod
    def _local(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("unix:///"):
            raise ValueError("must be a socket of this machine, unix:///path: over a network it gives the machine away")
        return value

    @field_validator("mount_roots")
    @classmethod
    def _safe_roots(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        for root in value:
            if (why := bad_root(root)) is not None:
                raise ValueError(f"{root} {why}")
        return value

    @field_validator("labels", "options", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [word.partition("=") for word in value.replace(",", " ").split() if word]
        if any(not name or not equals for name, equals, _ in pairs):
            raise ValueError("must be name=value pairs parted by commas")
        return {name: text for name, _, text in pairs}

    def engine_options(self) -> dict[str, str]:
        """What engines are told besides their folders; what is empty is left out."""
        key = self.openai_api_key
        own = {
            "comfyui_url": self.comfyui_url,
            "openai_url": self.openai_url,
            "openai_api_key": "" if key is None else key.get_secret_value(),
            "sdxl_trt_urls": ",".join(self.sdxl_trt_urls),
            "sdxl_trt_path": self.sdxl_trt_path,
            "slots": str(self.slots),
            "node_id": self.node_id,
            "memory_bytes": str(self.engine_memory_bytes or ""),
            "docker": self._docker(),
            "docker_host": self.docker_host or "",
            "mount_roots": ",".join(map(str, self.mount_roots)),
            "image_roots": ",".join(self.image_roots),
            "container_pids": str(self.container_pids),
        }
        return {name: value for name, value in own.items() if value} | self.options

    @property
    def capacity(self) -> int:
        """Jobs that run here at once."""
        return self.slots * self.batch

    def _docker(self) -> str:
        """Where the Docker engine is that jobs may use; "" where there is none."""
        socket = Path("/var/run/docker.sock")
        return self.docker_host or (str(socket) if os.access(socket, os.R_OK | os.W_OK) else "")

    @property
    def models_folder(self) -> Path:
        """Where model files lie: `checkpoints` and `loras` under it."""
        return self.models_dir or self.data_dir / "models"
