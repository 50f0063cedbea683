"""What the routes work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fleet_server.comfy.sockets import Sockets
from fleet_server.services.comfy_files import ComfyFiles
from fleet_server.services.comfy_nodes import ComfyNodes
from fleet_server.services.comfy_prompts import ComfyPrompts
from fleet_server.services.comfy_tracker import ComfyTracker
from fleet_server.services.gallery import Download


@dataclass(frozen=True, slots=True)
class ComfySettings:
    """Limits of requests; the time in which nodes are asked for what only they know."""

    prompt_bytes: int = 16 << 20
    upload_bytes: int = 100 << 20
    body_bytes: int = 1 << 20
    stats_seconds: float = 2.0
    picture_pixels: int = 64_000_000


class Downloads(Protocol):
    """Outputs of the fleet: services.gallery."""

    async def download(self, filename: str, *, width: int | None, headers: Mapping[str, str]) -> Download:
        """The bytes of an output. Raises OUTPUT_NOT_FOUND, RANGE_NOT_SATISFIABLE."""
        ...


@dataclass(frozen=True, slots=True)
class ComfyParts:
    """The use cases behind the routes."""

    prompts: ComfyPrompts
    tracker: ComfyTracker
    nodes: ComfyNodes
    files: ComfyFiles
    downloads: Downloads
    sockets: Sockets
    settings: ComfySettings
