"""What a node is to placement and to readers: one immutable view. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from fleet_server.domain.comfy import Catalogue


class NodeStatus(enum.StrEnum):
    """Whether a node can be reached; values as in the API."""

    ONLINE = "online"
    DISCONNECTED = "disconnected"
    DOWN = "down"


CLUSTER_OF_TYPE: Mapping[str, str] = {
    "image_gen": "vision",
    "video_gen": "vision",
    "llm_inference": "llm",
    "transcription": "llm",
    "training": "compute",
    "custom": "compute",
}
"""The cluster in which a job type runs where none is named."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model file on a node. `kind` is checkpoint or lora; `sha256` is empty while it is being computed."""

    name: str
    kind: str = "checkpoint"
    size_bytes: int = 0
    sha256: str = ""
    architecture: str = ""
    format: str = ""
    trigger_words: tuple[str, ...] = ()
    job_types: tuple[str, ...] = ()
    engine: str = ""


@dataclass(frozen=True, slots=True)
class LoadedView:
    """A model in a node's memory. Times are Unix ms by the server's clock.

    `pixel_steps_per_second` is what its engine measured before the first job.
    """

    name: str
    engine: str = ""
    gpu_index: int | None = None
    memory_bytes: int = 0
    loras: tuple[str, ...] = ()
    load_ms: int = 0
    used_ms: int = 0
    pinned: bool = False
    pixel_steps_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Loadable:
    """What an engine of a node could load, if the file were there."""

    engine: str
    architectures: tuple[str, ...]
    job_types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node at one moment. `slots_free` is what dispatch may fill: work on its way to the node counts as taken.

    `engines` are the names of the ready ones, `job_types` what those run. `gpu_memory_bytes` is the largest GPU's, None
    where none was reported. `quarantined` are models that this node gets no work for. `free_at_ms` is when
    each taken slot is expected to be free (Unix ms), the soonest first, as far as known. `loadable` is what it would
    bring from the buckets, nothing where empty, in files of `largest_file_bytes` at most (0: any).
    """

    node_id: str
    status: NodeStatus = NodeStatus.DOWN
    cordoned: bool = False
    draining: bool = False
    clusters: frozenset[str] = frozenset()
    job_types: frozenset[str] = frozenset()
    engines: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    slots: int = 0
    slots_free: int = 0
    models: Mapping[str, ModelView] = field(default_factory=dict)
    loaded: tuple[LoadedView, ...] = ()
    session: str = ""
    gpu_memory_bytes: int | None = None
    quarantined: frozenset[str] = frozenset()
    free_at_ms: tuple[int, ...] = ()
    loadable: tuple[Loadable, ...] = ()
    largest_file_bytes: int = 0
    offers: Catalogue | None = None
    """What its ComfyUI has, as far as known."""

    @property
    def online(self) -> bool:
        return self.status is NodeStatus.ONLINE

    def loaded_model(self, name: str) -> LoadedView | None:
        """The model of this name in memory, else None."""
        return next((loaded for loaded in self.loaded if loaded.name == name), None)
