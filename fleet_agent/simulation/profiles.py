"""What a simulated fleet is made of: kinds of GPUs, model files, mixes of jobs. Tables, and pure functions on them.

Speeds are pixels x steps per second at the cost of SDXL (cost 1); they are rough figures of these cards, good for
proportions alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GIB = 1 << 30
IMAGE, LLM, CUSTOM = "image_gen", "llm_inference", "custom"


@dataclass(frozen=True, slots=True)
class GpuClass:
    """A kind of GPU. `speed` in pixels x steps a second, `read_bytes` a second when a model is loaded."""

    name: str
    title: str
    memory_gib: int
    speed: float
    tokens_per_second: float
    read_bytes: float
    slots: int = 1
    unified: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model file. `cost` is the work of one pixel x step, SDXL being 1; `kind` is checkpoint or lora."""

    name: str
    job_types: tuple[str, ...]
    size_gib: float
    memory_gib: float
    cost: float = 1.0
    kind: str = "checkpoint"


@dataclass(frozen=True, slots=True)
class JobKind:
    """A kind of job in a mix. `share` is relative; `units` are pixels x steps, tokens, or seconds of a custom job."""

    share: float
    job_type: str
    model: str = ""
    side: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loras: tuple[str, ...] = ()

    @property
    def pixel_steps(self) -> float:
        return float(self.side * self.side * self.steps)


@dataclass(frozen=True, slots=True)
class Profile:
    """A fleet: kinds of GPUs with their shares (or one after the other where `in_turn`), and the jobs that it gets."""

    name: str
    title: str
    gpus: Sequence[tuple[float, str]]
    jobs: Sequence[JobKind]
    models_share: float
    """How likely a node has each model that fits into its memory; it always has at least one of each job type."""
    in_turn: bool = False


GPUS: Mapping[str, GpuClass] = {
    gpu.name: gpu
    for gpu in (
        GpuClass("h100", "NVIDIA H100 80GB", 80, 14e6, 180, 2.5e9, slots=4),
        GpuClass("rtx-4090", "NVIDIA GeForce RTX 4090", 24, 7e6, 110, 2.0e9),
        GpuClass("rtx-3090", "NVIDIA GeForce RTX 3090", 24, 3.8e6, 85, 1.2e9),
        GpuClass("rtx-4070", "NVIDIA GeForce RTX 4070", 12, 3.4e6, 60, 1.5e9),
        GpuClass("rtx-3060", "NVIDIA GeForce RTX 3060", 12, 1.6e6, 40, 0.8e9),
        GpuClass("gtx-1080ti", "NVIDIA GeForce GTX 1080 Ti", 11, 0.8e6, 25, 0.4e9),
        GpuClass("agx-orin", "Jetson AGX Orin 64GB", 64, 0.75e6, 22, 0.7e9, unified=True),
        GpuClass("orin-nx", "Jetson Orin NX 16GB", 16, 0.35e6, 12, 0.4e9, unified=True),
        GpuClass("orin-nano", "Jetson Orin Nano 8GB", 8, 0.15e6, 7, 0.3e9, unified=True),
    )
}

MODELS: Mapping[str, ModelSpec] = {
    model.name: model
    for model in (
        ModelSpec("sim-sd15.safetensors", (IMAGE,), 2.0, 3.0, 0.25),
        ModelSpec("sim-sdxl-fp8.safetensors", (IMAGE,), 3.5, 5.5, 0.9),
        ModelSpec("sim-sdxl.safetensors", (IMAGE,), 6.5, 9.0, 1.0),
        ModelSpec("sim-sdxl-turbo.safetensors", (IMAGE,), 6.5, 9.0, 1.0),
        ModelSpec("sim-flux.safetensors", (IMAGE,), 16.0, 20.0, 4.0),
        ModelSpec("sim-llm-8b.safetensors", (LLM,), 5.0, 7.0),
        ModelSpec("sim-style.safetensors", (IMAGE,), 0.2, 0.2, kind="lora"),
        ModelSpec("sim-detail.safetensors", (IMAGE,), 0.4, 0.4, kind="lora"),
    )
}

_PICTURES = (
    JobKind(30, IMAGE, "sim-sd15.safetensors", side=512, steps=20),
    JobKind(20, IMAGE, "sim-sdxl-fp8.safetensors", side=1024, steps=20),
    JobKind(20, IMAGE, "sim-sdxl.safetensors", side=1024, steps=30),
    JobKind(10, IMAGE, "sim-sdxl.safetensors", side=1024, steps=25, loras=("sim-style.safetensors",)),
    JobKind(10, IMAGE, "sim-sdxl-turbo.safetensors", side=512, steps=4),
)

PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            "mixed",
            "a large fleet of all sorts, pictures, text and custom jobs",
            (
                (5, "h100"),
                (15, "rtx-4090"),
                (20, "rtx-3090"),
                (20, "rtx-4070"),
                (20, "rtx-3060"),
                (5, "gtx-1080ti"),
                (10, "agx-orin"),
                (5, "orin-nx"),
            ),
            (
                *_PICTURES,
                JobKind(5, IMAGE, "sim-flux.safetensors", side=1024, steps=20),
                JobKind(10, LLM, "sim-llm-8b.safetensors", tokens=200),
                JobKind(5, CUSTOM, seconds=1.0),
            ),
            0.6,
        ),
        Profile(
            "homelab",
            "five unequal GPUs: 4090, 3090, 3060, 1080 Ti and an Orin, again and again",
            tuple((1, name) for name in ("rtx-4090", "rtx-3090", "rtx-3060", "gtx-1080ti", "agx-orin")),
            _PICTURES,
            0.8,
            in_turn=True,
        ),
        Profile(
            "jetsons",
            "Jetsons of three sizes, small models",
            ((50, "agx-orin"), (30, "orin-nx"), (20, "orin-nano")),
            (_PICTURES[0], _PICTURES[1], JobKind(10, LLM, "sim-llm-8b.safetensors", tokens=100)),
            0.9,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class NodePlan:
    """A node before it is started. `pace` multiplies its class's speed; `failing` is a model that never works there."""

    node_id: str
    gpu: GpuClass
    models: tuple[ModelSpec, ...]
    pace: float = 1.0
    failing: str = ""

    @property
    def job_types(self) -> tuple[str, ...]:
        """What it runs: custom always, others where it has a model for them."""
        found = {word for model in self.models if model.kind == "checkpoint" for word in model.job_types}
        return (*sorted(found), CUSTOM)


def plan_fleet(profile: Profile, nodes: int, rng: random.Random) -> list[NodePlan]:
    """The nodes of a fleet; the same seed gives the same ones, and more nodes begin with the same ones."""
    names = [name for _, name in profile.gpus]
    weights = [share for share, _ in profile.gpus]
    plans = []
    for number in range(nodes):
        name = names[number % len(names)] if profile.in_turn else rng.choices(names, weights)[0]
        gpu = GPUS[name]
        # Two cards of a kind are never quite alike.
        plans.append(NodePlan(f"sim-{number:04}-{name}", gpu, _models(profile, gpu, rng), rng.uniform(0.9, 1.1)))
    return plans


def _models(profile: Profile, gpu: GpuClass, rng: random.Random) -> tuple[ModelSpec, ...]:
    wanted = {name for job in profile.jobs for name in (job.model, *job.loras) if name}
    fitting = [model for model in MODELS.values() if model.name in wanted and model.memory_gib <= gpu.memory_gib]
    chosen = [model for model in fitting if rng.random() < profile.models_share]
    for word in (IMAGE, LLM):
        able = [model for model in fitting if word in model.job_types and model.kind == "checkpoint"]
        if able and not any(model in chosen for model in able):
            chosen.append(rng.choice(able))
    return tuple(sorted(chosen, key=lambda model: model.name))


def run_seconds(plan: NodePlan, job_type: str, model: str, size: float) -> float:
    """How long the plan's GPU works on a job; `size` in pixels x steps, tokens or seconds, by its type."""
    if job_type == IMAGE:
        spec = MODELS.get(model)
        return size * (spec.cost if spec is not None else 1.0) / (plan.gpu.speed * plan.pace)
    if job_type == LLM:
        return size / (plan.gpu.tokens_per_second * plan.pace)
    return size


def load_seconds(plan: NodePlan, model: str) -> float:
    """How long it takes to bring a model into the plan's memory."""
    spec = MODELS.get(model)
    return 0.0 if spec is None else spec.size_gib * GIB / plan.gpu.read_bytes


def capacity(profile: Profile, plans: Sequence[NodePlan]) -> float:
    """Jobs a second that the fleet could do of the profile's mix if every slot were always busy and never swapped."""
    shares = sum(job.share for job in profile.jobs)
    total = 0.0
    for plan in plans:
        there = {model.name for model in plan.models}
        able = [job for job in profile.jobs if not job.model or job.model in there]
        if able:
            weight = sum(job.share for job in able)
            mean = sum(job.share * run_seconds(plan, job.job_type, job.model, size_of(job)) for job in able) / weight
            total += plan.gpu.slots / mean * (weight / shares)
    return total


def size_of(job: JobKind) -> float:
    """The work of a job, in the units of its type."""
    return {IMAGE: job.pixel_steps, LLM: float(job.tokens)}.get(job.job_type, job.seconds)
