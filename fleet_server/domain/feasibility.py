"""Which node may run what: the filters, each a small function with a reason. Pure.

Dispatch, the explanation of a waiting job and the dry run ask the same functions.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from fleet_server.domain.comfy import ENGINE
from fleet_server.domain.job import Lane
from fleet_server.domain.node import NodeView

GIB = 1 << 30

WEIGHTS_SHARE = 1.1
"""GPU memory that a model takes at least, by the size of its file: its weights and a little to work with."""

_LANES_KEPT = 4_096


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
    if lane.engine and lane.engine not in node.engines:
        return Refusal(Refused.CAPABILITY_MISSING, f"it has no ready engine {lane.engine}")
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
    asked = lane.vram_class * GIB
    if node.gpu_memory_bytes is None:
        # What is not known refuses only where a lane asks for a certain size.
        return Refusal(Refused.VRAM_TOO_SMALL, _too_small(asked, 0)) if asked else None
    model = node.models.get(lane.model) if lane.model else None
    needed = max(asked, int(model.size_bytes * WEIGHTS_SHARE) if model is not None else 0)
    if needed <= node.gpu_memory_bytes:
        return None
    return Refusal(Refused.VRAM_TOO_SMALL, _too_small(needed, node.gpu_memory_bytes))


def _too_small(needed: int, has: int) -> str:
    return f"needs {needed / GIB:.1f} GiB of GPU memory, has {has / GIB:.1f} GiB"


def _quarantine(node: NodeView, lane: Lane) -> Refusal | None:
    if not lane.model or lane.model not in node.quarantined:
        return None
    return Refusal(Refused.QUARANTINED, f"the model {lane.model} has failed on it again and again")


def _graph(node: NodeView, lane: Lane) -> Refusal | None:
    if not lane.needs:
        return None
    if ENGINE not in node.engines:
        return Refusal(Refused.CAPABILITY_MISSING, "no ready engine of it runs ComfyUI graphs")
    if node.offers is None:
        return Refusal(Refused.CAPABILITY_MISSING, "what its ComfyUI has is not known yet")
    missing = next(node.offers.missing(lane.needs), None)
    return None if missing is None else Refusal(Refused.CAPABILITY_MISSING, f"its ComfyUI lacks {missing.words}")


_FILTERS: tuple[Callable[[NodeView, Lane], Refusal | None], ...] = (
    _offline,
    _draining,
    _cordoned,
    _pinned,
    _labels,
    _capability,
    _graph,
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


class Feasibility:
    """Remembers verdicts, so that a round of dispatch costs look-ups and not filters.

    Says what `feasible` says, as long as a lane's id always means the same definition. A node's verdicts are forgotten
    when anything that they rest on has changed; heartbeats and free slots are no such thing.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, tuple[NodeView, dict[str, Refusal | None]]] = {}

    def refusal(self, node: NodeView, lane: Lane) -> Refusal | None:
        """None if the node may run jobs of the lane, else why not."""
        verdicts = self._verdicts(node)
        try:
            return verdicts[lane.lane_id]
        except KeyError:
            if len(verdicts) >= _LANES_KEPT:
                verdicts.clear()
            verdict = verdicts[lane.lane_id] = feasible(node, lane)
            return verdict

    def _verdicts(self, node: NodeView) -> dict[str, Refusal | None]:
        known = self._nodes.get(node.node_id)
        if known is not None:
            if known[0] is node:
                return known[1]
            if _same(known[0], node):
                # The next look at this very view is quicker.
                self._nodes[node.node_id] = (node, known[1])
                return known[1]
        verdicts: dict[str, Refusal | None] = {}
        self._nodes[node.node_id] = (node, verdicts)
        return verdicts


def _same(one: NodeView, other: NodeView) -> bool:
    """Whether all filters see the same in both."""
    return (
        one.status is other.status
        and one.cordoned == other.cordoned
        and one.draining == other.draining
        and one.gpu_memory_bytes == other.gpu_memory_bytes
        and one.quarantined == other.quarantined
        and one.clusters == other.clusters
        and one.job_types == other.job_types
        and one.engines == other.engines
        and (one.labels is other.labels or one.labels == other.labels)
        and (one.models is other.models or one.models == other.models)
        and one.offers is other.offers
    )
