"""Which node may run what, and what a free slot should take next. Pure.

The dispatcher, the dry run and the explanation of a waiting job ask the same functions.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from fleet_server.domain.job import Lane
from fleet_server.domain.node import NodeView

GIB = 1 << 30

PRESSURE_PER_JOB_SECONDS = 10.0
"""What each waiting job adds to the urgency of its lane, in seconds of waiting."""

PRESSURE_LIMIT_SECONDS = 120.0
"""The most that the number of waiting jobs adds: a long line must not starve a short one."""

SWAP_WEIGHT = 3.0
"""How many times its cold-load seconds a lane must be more urgent before a node swaps models for it."""

COLD_LOAD_LIMIT_SECONDS = 60.0
LORA_LOAD_SECONDS = 1.0
UNKNOWN_LOAD_SECONDS = 10.0
LOAD_BYTES_PER_SECOND = 400e6
"""How fast a model is read into memory, until speeds are measured."""


class Refused(enum.StrEnum):
    """Why a node cannot run a lane; the words of the API's Explanation."""

    OFFLINE = "OFFLINE"
    CORDONED = "CORDONED"
    DRAINING = "DRAINING"
    PINNED_ELSEWHERE = "PINNED_ELSEWHERE"
    LABELS_DIFFER = "LABELS_DIFFER"
    CAPABILITY_MISSING = "CAPABILITY_MISSING"
    MODEL_MISSING = "MODEL_MISSING"
    LORA_MISSING = "LORA_MISSING"
    VRAM_TOO_SMALL = "VRAM_TOO_SMALL"
    QUARANTINED = "QUARANTINED"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A node's no: the reason and a sentence for people."""

    reason: Refused
    detail: str


class Demand(Protocol):
    """A lane with what waits in it; store.LaneView is one. `head_effective_ms` is the head's time after its boost."""

    @property
    def lane(self) -> Lane: ...
    @property
    def waiting(self) -> int: ...
    @property
    def head_effective_ms(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Ranked:
    """A lane that a node can run.

    `score` is urgency in seconds less what a swap costs. `load_seconds` 0: all is in memory.
    """

    demand: Demand
    score: float
    load_seconds: float

    @property
    def warm(self) -> bool:
        return self.load_seconds == 0


def _offline(node: NodeView, lane: Lane) -> Refusal | None:
    if node.online:
        return None
    return Refusal(Refused.OFFLINE, f"its agent is {node.status.value}")


def _cordoned(node: NodeView, lane: Lane) -> Refusal | None:
    return Refusal(Refused.CORDONED, "it is cordoned: uncordon it to give it work") if node.cordoned else None


def _draining(node: NodeView, lane: Lane) -> Refusal | None:
    return Refusal(Refused.DRAINING, "it is being emptied or shut down") if node.draining else None


def _pinned(node: NodeView, lane: Lane) -> Refusal | None:
    if not lane.node_id or lane.node_id == node.node_id:
        return None
    return Refusal(Refused.PINNED_ELSEWHERE, f"the job runs on {lane.node_id} only")


def _labels(node: NodeView, lane: Lane) -> Refusal | None:
    missing = [f"{name}={value}" for name, value in lane.labels if node.labels.get(name) != value]
    return Refusal(Refused.LABELS_DIFFER, f"it lacks the label {missing[0]}") if missing else None


def _capability(node: NodeView, lane: Lane) -> Refusal | None:
    if lane.job_type not in node.job_types:
        return Refusal(Refused.CAPABILITY_MISSING, f"no ready engine of it runs {lane.job_type}")
    if lane.cluster not in node.clusters:
        return Refusal(Refused.CAPABILITY_MISSING, f"it does not serve the cluster {lane.cluster}")
    return None


def _model(node: NodeView, lane: Lane) -> Refusal | None:
    if not lane.model:
        return None
    model = node.models.get(lane.model)
    if model is None or model.kind != "checkpoint":
        return Refusal(Refused.MODEL_MISSING, f"it does not have the model {lane.model}")
    if model.engine and model.engine not in node.engines:
        return Refusal(Refused.CAPABILITY_MISSING, f"its engine {model.engine}, which runs {lane.model}, is not ready")
    if model.job_types and lane.job_type not in model.job_types:
        return Refusal(Refused.CAPABILITY_MISSING, f"its model {lane.model} is not for {lane.job_type}")
    return None


def _loras(node: NodeView, lane: Lane) -> Refusal | None:
    for name in lane.loras:
        lora = node.models.get(name)
        if lora is None or lora.kind != "lora":
            return Refusal(Refused.LORA_MISSING, f"it does not have the LoRA {name}")
    return None


def _memory(node: NodeView, lane: Lane) -> Refusal | None:
    needed = lane.vram_class * GIB
    if not needed:
        return None
    has = node.gpu_memory_bytes or 0
    if has >= needed:
        return None
    return Refusal(Refused.VRAM_TOO_SMALL, f"needs {needed / GIB:.1f} GiB of GPU memory, has {has / GIB:.1f} GiB")


def _quarantine(node: NodeView, lane: Lane) -> Refusal | None:
    if not lane.model or lane.model not in node.quarantined:
        return None
    return Refusal(Refused.QUARANTINED, f"the model {lane.model} has failed on it again and again")


_FILTERS: tuple[Callable[[NodeView, Lane], Refusal | None], ...] = (
    _offline,
    _cordoned,
    _draining,
    _pinned,
    _labels,
    _capability,
    _model,
    _loras,
    _memory,
    _quarantine,
)


def feasible(node: NodeView, lane: Lane) -> Refusal | None:
    """None if the node may run jobs of the lane, else the first reason why not. Free slots do not matter here."""
    for judge in _FILTERS:
        refusal = judge(node, lane)
        if refusal is not None:
            return refusal
    return None


def load_seconds(node: NodeView, lane: Lane) -> float:
    """What must be read into memory before the lane's jobs run there, in seconds; 0: nothing."""
    if not lane.model:
        return 0.0
    loaded = node.loaded_model(lane.model)
    if loaded is not None:
        missing = sum(1 for name in lane.loras if name not in loaded.loras)
        return missing * LORA_LOAD_SECONDS
    model = node.models.get(lane.model)
    size = model.size_bytes if model is not None else 0
    seconds = size / LOAD_BYTES_PER_SECOND if size else UNKNOWN_LOAD_SECONDS
    return min(seconds + len(lane.loras) * LORA_LOAD_SECONDS, COLD_LOAD_LIMIT_SECONDS)


def score(node: NodeView, demand: Demand, now_ms: int) -> Ranked:
    """How much the node should want the lane.

    Urgency is the head's age in seconds after its boost plus the pressure of the line behind it; a swap takes off
    three times its load seconds. Bonus and malus together stay below the 600 s between two priorities, so urgent
    means next on any node, and no lane is passed by for longer than that.
    """
    head = demand.head_effective_ms
    age = (now_ms - head) / 1000 if head is not None else 0.0
    pressure = min(demand.waiting * PRESSURE_PER_JOB_SECONDS, PRESSURE_LIMIT_SECONDS)
    load = load_seconds(node, demand.lane)
    return Ranked(demand, age + pressure - SWAP_WEIGHT * load, load)


def rank(node: NodeView, lanes: Iterable[Demand], now_ms: int) -> list[Ranked]:
    """The lanes with waiting jobs that the node can run, the best first; ties by lane id: all replicas agree."""
    able = [demand for demand in lanes if demand.waiting > 0 and feasible(node, demand.lane) is None]
    ranked = [score(node, demand, now_ms) for demand in able]
    ranked.sort(key=lambda one: (-one.score, one.demand.lane.lane_id))
    return ranked


def share_out(
    nodes: Iterable[NodeView], lanes: Iterable[Demand], now_ms: int, *, avoided: Collection[tuple[str, str]] = ()
) -> list[tuple[str, str]]:
    """Fills free slots: (node_id, lane_id) for each claim, never more than a node's free slots or a lane's jobs.

    The most wanted pair of all goes first, so a warm node takes a lane before a cold one does; nodes that want a lane
    alike share its jobs evenly, the emptiest first. Pairs of `avoided` (node_id, lane_id) do not come together.
    """
    demands = list(lanes)
    open_nodes = nodes_with_room(nodes)
    room = {node.node_id: node.slots_free for node in open_nodes}
    left = {demand.lane.lane_id: demand.waiting for demand in demands}
    pairs = [(one, node.node_id) for node in open_nodes for one in rank(node, demands, now_ms)]
    pairs.sort(key=lambda pair: (*_want(pair), -room[pair[1]], pair[1]))
    chosen: list[tuple[str, str]] = []
    for (_, _, lane_id), alike in groupby(pairs, key=_want):
        takers = [node_id for _, node_id in alike if room[node_id] > 0 and (node_id, lane_id) not in avoided]
        while takers and left[lane_id] > 0:
            for node_id in takers[: left[lane_id]]:
                chosen.append((node_id, lane_id))
                room[node_id] -= 1
                left[lane_id] -= 1
            takers = [node_id for node_id in takers if room[node_id] > 0]
    return chosen


def _want(pair: tuple[Ranked, str]) -> tuple[float, float, str]:
    ranked = pair[0]
    return -ranked.score, ranked.load_seconds, ranked.demand.lane.lane_id


def nodes_with_room(nodes: Iterable[NodeView]) -> list[NodeView]:
    """Those that could take a job now."""
    return [node for node in nodes if node.online and node.slots_free > 0]
