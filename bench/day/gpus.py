"""The five GPUs and the six models: what fits where, how fast it runs, how long it takes to load."""

from __future__ import annotations

from dataclasses import dataclass

from fleet_server.domain.feasibility import WEIGHTS_SHARE
from fleet_server.domain.node import ModelView, NodeStatus, NodeView

GB = 1_000_000_000
GIB = 1 << 30
START_SECONDS = 4.0
"""Of each load, whatever the file's size."""

LORA_SECONDS = 1.0


@dataclass(frozen=True)
class Gpu:
    """`speed` is relative to the RTX 4090; models are read at `disk` bytes a second."""

    name: str
    speed: float
    memory: int
    disk: float


@dataclass(frozen=True)
class Model:
    """`speed`: pixels x steps a second on the RTX 4090. `share` of the jobs, `seconds` of a usual one there."""

    name: str
    size: int
    speed: float
    share: float
    seconds: float
    loras: bool = False


GPUS = (
    Gpu("rtx4090", 1.0, 24 * GIB, 1.8 * GB),
    Gpu("rtx3090", 0.55, 24 * GIB, 1.2 * GB),
    Gpu("rtx4070", 0.50, 12 * GIB, 1.2 * GB),
    Gpu("p40", 0.17, 24 * GIB, 0.4 * GB),
    Gpu("orin", 0.14, 60 * GIB, 0.7 * GB),
)

MODELS = (
    Model("sdxl", int(6.9 * GB), 7e6, 0.30, 12, loras=True),
    Model("sd15", int(2.1 * GB), 16e6, 0.20, 6),
    Model("flux-fp8", int(17.2 * GB), 2.2e6, 0.14, 25),
    Model("pony", int(6.9 * GB), 7e6, 0.14, 12, loras=True),
    Model("realvis", int(6.5 * GB), 7e6, 0.14, 12, loras=True),
    Model("svd", int(9.6 * GB), 5e6, 0.08, 60),
)

LORAS = ("ink", "film", "toon")
BY_NAME = {model.name: model for model in MODELS}


def speed(gpu: Gpu, model: Model) -> float:
    """Pixels x steps a second. The P40 has no fast half precision: what needs it is slower there."""
    quirk = 0.7 if gpu.name == "p40" and model.name == "flux-fp8" else 1.0
    return gpu.speed * model.speed * quirk


def cold_seconds(gpu: Gpu, model: Model) -> float:
    """To load the model with nothing of it in memory."""
    return START_SECONDS + model.size / gpu.disk


def memory_of(model: Model) -> int:
    """GPU memory that it takes, as the filter of dispatch has it."""
    return int(model.size * WEIGHTS_SHARE)


def capacity() -> float:
    """Jobs a second that the fleet could end if nothing ever had to be loaded and all ran everywhere."""
    mean = sum(model.share * model.seconds for model in MODELS)
    return sum(gpu.speed for gpu in GPUS) / mean


def view(gpu: Gpu) -> NodeView:
    """The GPU as a node of the fleet, idle and empty."""
    files = [ModelView(model.name, size_bytes=model.size, engine="diffusers") for model in MODELS]
    files += [ModelView(name, kind="lora", size_bytes=200_000_000, engine="diffusers") for name in LORAS]
    return NodeView(
        gpu.name,
        NodeStatus.ONLINE,
        clusters=frozenset({"vision"}),
        job_types=frozenset({"image_gen"}),
        engines=frozenset({"diffusers"}),
        slots=1,
        slots_free=1,
        models={file.name: file for file in files},
        gpu_memory_bytes=gpu.memory,
    )
