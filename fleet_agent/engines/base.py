"""The plug-in protocol between an agent's slot and an engine.

An engine runs in a child process of its own, one task at a time, so every method is synchronous and may block:
the agent lives in another process. A plug-in is an entry point of the group `fleet.engines` whose value is a
factory `(EngineSettings) -> Engine`; it needs nothing of this package but the dataclasses below.

Cancellation is cooperative: every call of the `Reporter` raises `Cancelled` once the slot was told to stop. An
engine lets that exception pass and calls one of them at least every 100 ms while it works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

ENTRY_POINT_GROUP = "fleet.engines"

ModelKind = Literal["checkpoint", "lora"]


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that a reference of the payload stands for, on this machine's disk; to be read, never changed.

    `name` is the one that it had where it came from, as data: a name, no path; "" where it had none.
    """

    path: Path
    content_type: str
    name: str = ""


class Reason(StrEnum):
    """Why a task failed, in the words of the API's error reasons."""

    EXIT_NONZERO = "EXIT_NONZERO"
    IMAGE_NOT_FOUND = "IMAGE_NOT_FOUND"
    MOUNT_FORBIDDEN = "MOUNT_FORBIDDEN"
    PRIVILEGE_FORBIDDEN = "PRIVILEGE_FORBIDDEN"
    DOCKER_UNAVAILABLE = "DOCKER_UNAVAILABLE"
    GPU_UNAVAILABLE = "GPU_UNAVAILABLE"
    REGISTRY_UNAVAILABLE = "REGISTRY_UNAVAILABLE"
    ENGINE_FAILED = "ENGINE_FAILED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    LORA_NOT_FOUND = "LORA_NOT_FOUND"
    INPUT_NOT_FOUND = "INPUT_NOT_FOUND"
    DISK_FULL = "DISK_FULL"
    INVALID_FIELD = "INVALID_FIELD"


class EngineError(Exception):
    """A task or a load that failed, for a reason the caller can act on.

    `detail` is shown to the user and names the field or file; `retryable` says whether the same task may succeed
    later or on another node. Any other exception of an engine counts as ENGINE_FAILED, retryable.
    """

    def __init__(
        self, reason: Reason | str, detail: str, retryable: bool = False, *, result: EngineResult | None = None
    ) -> None:
        """`result`: what there is in spite of the failure, such as an exit code, or an engine's own record."""
        super().__init__(reason, detail, retryable)
        self.reason = Reason(reason)
        self.detail = detail
        self.retryable = retryable
        self.result = result

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Cancelled(Exception):  # noqa: N818 - not an error: the slot was told to stop
    """Raised by a `Reporter` when the task was cancelled; an engine lets it pass."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A checkpoint or LoRA. `path` is None for a model built into its engine; `sha256` None while not yet known."""

    name: str
    path: Path | None
    kind: ModelKind
    size_bytes: int = 0
    sha256: str | None = None
    architecture: str | None = None
    trigger_words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoraUse:
    """A LoRA and its weight, -2 to 2. Weight 0 gives exactly the picture without it."""

    file: ModelFile
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is. `architectures` are those of the model files it loads; `builtin_models` need no file.

    `builtin_loras` need none either: a program that the engine speaks to has them. `refresh_seconds`: what is said here
    may change, and is asked again so often; a failed engine is asked again too.
    """

    name: str
    version: str
    job_types: tuple[str, ...]
    default_model: str | None = None
    detail: str | None = None
    architectures: tuple[str, ...] = ()
    builtin_models: tuple[str, ...] = ()
    builtin_loras: tuple[str, ...] = ()
    refresh_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What a factory is given: the model folder, a folder to keep things in, and its own options."""

    models_folder: Path
    data_folder: Path
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """One attempt of one job. `fields` is the payload with defaults filled in; outputs go to `output_folder`.

    `inputs` has the files of each reference in `fields`, such as `job:<job_id>`: where one is wanted, the first.
    """

    job_id: str
    job_type: str
    model: ModelFile | None
    loras: tuple[LoraUse, ...]
    fields: Mapping[str, object]
    seed: int
    output_folder: Path
    previews: bool = False
    inputs: Mapping[str, tuple[InputFile, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, with the LoRAs that are loaded beside it.

    `pixel_steps_per_second` is how fast one picture is made with it, where the engine has measured that.
    """

    name: str
    memory_bytes: int
    load_seconds: float
    loras: tuple[str, ...] = ()
    pixel_steps_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class EngineFile:
    """A file as the engine's own program calls it: of ComfyUI, where it stands in the outputs of its history."""

    node_id: str
    kind: str
    filename: str
    subfolder: str
    type: str


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """A finished file inside the task's output folder, closed and complete."""

    path: Path
    content_type: str
    width: int | None = None
    height: int | None = None
    duration_seconds: float | None = None
    seed: int | None = None
    engine_file: EngineFile | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a transcription."""

    start_seconds: float
    end_seconds: float
    text: str


@dataclass(frozen=True, slots=True)
class EngineResult:
    """What a task gave. `usage` counts tokens (prompt_tokens, completion_tokens, total_tokens).

    `finish_reason` is stop or length; `record_json` is the engine's own record of the run, kept for those who speak its
    protocol.
    """

    outputs: tuple[EngineOutput, ...] = ()
    text: str | None = None
    usage: Mapping[str, int] | None = None
    exit_code: int | None = None
    finish_reason: str | None = None
    segments: tuple[Segment, ...] = ()
    record_json: str | None = None


class Reporter(Protocol):
    """How a running task speaks to its slot. Each method raises `Cancelled` once the slot was told to stop."""

    def check(self) -> None:
        """Send nothing; only raise when cancelled."""

    def progress(self, step: int, steps: int, message: str | None = None) -> None:
        """Say that `step` of `steps` is done. Called after the work, never before; never falls."""

    def preview(self, content_type: str, data: bytes) -> None:
        """Show the picture as it is now: at most 64 KiB. The slot may drop it."""

    def text(self, text: str) -> None:
        """Show what the task has written since the last call; the whole is in the result all the same."""

    def frame(self, frame: str | bytes) -> None:
        """Pass on a frame of the engine's own protocol, in its order; at most 1 MiB. Pictures may be dropped."""


@runtime_checkable
class Engine(Protocol):
    """One engine in one slot. Never called from two threads at once."""

    def info(self) -> EngineInfo:
        """Return what the engine is; raises EngineError where it cannot work on this machine."""

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        """Load a model (None: the engine's default) and these LoRAs; a model that is loaded returns at once."""

    def unload(self, model: str) -> None:
        """Free the model of that name and the LoRAs beside it; no error when it is not loaded."""

    def loaded(self) -> list[LoadedModel]:
        """Return the models in memory, sorted by name."""

    def estimate(self, task: Task) -> int:
        """Return the bytes of memory (of the GPU, where it uses one) that the task needs beyond its model."""

    def run(self, task: Task, report: Reporter) -> EngineResult:
        """Run the task to its end. Raises EngineError, or lets `Cancelled` pass leaving no output file behind."""


EngineFactory = Callable[[EngineSettings], Engine]
