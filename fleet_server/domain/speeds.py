"""How fast each node is, learned from finished work, and how long its models take to load. Pure: no clock, no I/O.

A speed is work a second of one (node, model, engine), as an exponentially weighted mean of what was measured. A node
that has not run a model yet is guessed from the others: what the fleet does with the model, times how this node
compares with the fleet on what it has run.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fleet_server.domain.job import Lane
from fleet_server.domain.node import NodeView

SPEED_SHARE = 0.3
"""Weight of the newest measurement of a speed."""

LOAD_SHARE = 0.5
WORK_SHARE = 0.2
FACTOR_SHARE = 0.2
_LANES_KEPT = 1_024
_MODELS_KEPT = 512
_LEAST_SECONDS = 0.001


class Unit(enum.StrEnum):
    """What work is counted in."""

    PIXEL_STEPS = "pixel_steps"
    TOKENS = "tokens"
    JOBS = "jobs"
    """Where nothing better is known of a kind of work: each job is one."""


@dataclass(frozen=True, slots=True)
class Work:
    """How much there is to do in one job. `amount` is above 0."""

    unit: Unit
    amount: float


class Timing(Protocol):
    """What placement asks about time. None: not known."""

    def run_seconds(self, node: NodeView, lane: Lane) -> float | None:
        """How long a typical job of the lane runs on the node, its model in memory."""
        ...

    def usual_seconds(self, lane: Lane) -> float | None:
        """How long it runs on the fleet's usual node."""
        ...

    def factor(self, node: NodeView) -> float:
        """How much faster the node is than the fleet's usual one; 1 where that is not known."""
        ...

    def cold_seconds(self, node: NodeView, model: str) -> float | None:
        """How long the node takes to load the model, as measured there or on others."""
        ...

    def measured_cold_seconds(self, node: NodeView, model: str) -> float | None:
        """How long it took that very node."""
        ...

    def fetch_speed(self, node: NodeView) -> float | None:
        """Bytes a second at which the node brings files from the buckets, as measured there or on others."""
        ...


class NoTiming:
    """Nothing has been measured."""

    def run_seconds(self, node: NodeView, lane: Lane) -> float | None:
        return None

    def usual_seconds(self, lane: Lane) -> float | None:
        return None

    def factor(self, node: NodeView) -> float:
        return 1.0

    def cold_seconds(self, node: NodeView, model: str) -> float | None:
        return None

    def measured_cold_seconds(self, node: NodeView, model: str) -> float | None:
        return None

    def fetch_speed(self, node: NodeView) -> float | None:
        return None


def _mean(old: float | None, new: float, share: float) -> float:
    return new if old is None else old + share * (new - old)


SpeedKey = tuple[str, str, str]
"""Model, engine, unit."""


class SpeedBook:
    """The measurements of all nodes. Bounded: a node keeps its latest 512 models, the book 1,024 lanes."""

    def __init__(self) -> None:
        self._speeds: dict[str, OrderedDict[SpeedKey, float]] = {}
        self._loads: dict[str, OrderedDict[str, float]] = {}
        self._factors: dict[str, float] = {}
        self._fetches: dict[str, float] = {}
        self._fleet_fetches: float | None = None
        self._fleet: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._fleet_loads: OrderedDict[str, float] = OrderedDict()
        self._works: OrderedDict[str, Work] = OrderedDict()

    # Learning.

    def saw_job(self, lane_id: str, work: Work) -> None:
        """A job of the lane has so much work: what is typical of it follows."""
        known = self._works.get(lane_id)
        amount = work.amount
        if known is not None and known.unit is work.unit:
            amount = _mean(known.amount, amount, WORK_SHARE)
        _keep(self._works, lane_id, Work(work.unit, amount), _LANES_KEPT)

    def ran(self, node_id: str, model: str, engine: str, work: Work, seconds: float) -> None:
        """A job ran for `seconds`, loading not counted."""
        key = (model, engine, work.unit.value)
        measured = work.amount / max(seconds, _LEAST_SECONDS)
        speeds = self._speeds.setdefault(node_id, OrderedDict())
        self._compare(node_id, key, measured)
        _keep(speeds, key, _mean(speeds.get(key), measured, SPEED_SHARE), _MODELS_KEPT)

    def warmed(self, node_id: str, model: str, engine: str, unit: Unit, speed: float) -> bool:
        """The engine measured itself before its first job: counts until a job has run. Whether that was news."""
        key = (model, engine, unit.value)
        speeds = self._speeds.setdefault(node_id, OrderedDict())
        if key in speeds or not speed > 0:
            return False
        self._compare(node_id, key, speed)
        _keep(speeds, key, speed, _MODELS_KEPT)
        return True

    def _compare(self, node_id: str, key: SpeedKey, speed: float) -> None:
        """Sets a speed beside the fleet's."""
        model = (key[0], key[2])
        usual = self._fleet.get(model)
        if usual is not None:
            self._factors[node_id] = _mean(self._factors.get(node_id), speed / usual, FACTOR_SHARE)
        _keep(self._fleet, model, _mean(usual, speed, WORK_SHARE), _MODELS_KEPT)

    def loaded(self, node_id: str, model: str, seconds: float) -> None:
        """The model was read into the node's memory within `seconds`."""
        loads = self._loads.setdefault(node_id, OrderedDict())
        _keep(loads, model, _mean(loads.get(model), seconds, LOAD_SHARE), _MODELS_KEPT)
        _keep(self._fleet_loads, model, _mean(self._fleet_loads.get(model), seconds, WORK_SHARE), _MODELS_KEPT)

    def fetched(self, node_id: str, size_bytes: int, seconds: float) -> None:
        """The node brought so many bytes from the buckets within `seconds`."""
        speed = size_bytes / max(seconds, _LEAST_SECONDS)
        self._fetches[node_id] = _mean(self._fetches.get(node_id), speed, LOAD_SHARE)
        self._fleet_fetches = _mean(self._fleet_fetches, speed, WORK_SHARE)

    # Asking.

    def speed(self, node_id: str, model: str, engine: str, unit: Unit) -> float | None:
        """Work a second; None where neither this node nor any other has run the model."""
        speeds = self._speeds.get(node_id)
        own = speeds.get((model, engine, unit.value)) if speeds is not None else None
        if own is not None:
            return own
        usual = self._fleet.get((model, unit.value))
        return None if usual is None else usual * self._factors.get(node_id, 1.0)

    def seconds(self, node: NodeView, model: str, work: Work) -> float | None:
        """How long the work runs on the node."""
        file = node.models.get(model)
        speed = self.speed(node.node_id, model, file.engine if file is not None else "", work.unit)
        return None if speed is None else work.amount / speed

    def run_seconds(self, node: NodeView, lane: Lane) -> float | None:
        """How long a typical job of the lane runs on the node, its model in memory."""
        work = self._works.get(lane.lane_id)
        return None if work is None else self.seconds(node, lane.model, work)

    def usual_seconds(self, lane: Lane) -> float | None:
        """How long a typical job of the lane runs on the fleet's usual node."""
        work = self._works.get(lane.lane_id)
        if work is None:
            return None
        speed = self._fleet.get((lane.model, work.unit.value))
        return None if speed is None else work.amount / speed

    def factor(self, node: NodeView) -> float:
        """How much faster the node is than the fleet's usual one; 1 where that is not known."""
        return self._factors.get(node.node_id, 1.0)

    def cold_seconds(self, node: NodeView, model: str) -> float | None:
        """How long the node takes to load the model: as measured there, else on other nodes."""
        own = self.measured_cold_seconds(node, model)
        return own if own is not None else self._fleet_loads.get(model)

    def measured_cold_seconds(self, node: NodeView, model: str) -> float | None:
        """How long it took that very node."""
        loads = self._loads.get(node.node_id)
        return loads.get(model) if loads is not None else None

    def fetch_speed(self, node: NodeView) -> float | None:
        """Bytes a second at which the node brings files from the buckets, as measured there, else on others."""
        return self._fetches.get(node.node_id, self._fleet_fetches)

    # Keeping.

    def dump(self, node_id: str) -> dict[str, Any]:
        """What is known of a node, as plain values for JSON."""
        kept: dict[str, Any] = {
            "speeds": [[*key, value] for key, value in self._speeds.get(node_id, {}).items()],
            "loads": dict(self._loads.get(node_id, {})),
        }
        if node_id in self._fetches:
            kept["fetch"] = self._fetches[node_id]
        return kept

    def restore(self, node_id: str, kept: Mapping[str, Any]) -> None:
        """Takes over what `dump` gave; anything else in it is passed over, and what is known already stays."""
        speeds = self._speeds.setdefault(node_id, OrderedDict())
        for row in kept.get("speeds", ()):
            model, engine, unit, value = row
            key = (str(model), str(engine), str(unit))
            if value > 0 and key not in speeds:
                self._compare(node_id, key, float(value))
                _keep(speeds, key, float(value), _MODELS_KEPT)
        loads = self._loads.setdefault(node_id, OrderedDict())
        for model, seconds in dict(kept.get("loads", {})).items():
            if model not in loads:
                self.loaded(node_id, model, float(seconds))
        fetch = kept.get("fetch")
        if fetch and node_id not in self._fetches:
            self.fetched(node_id, int(fetch), 1.0)

    def forget(self, node_id: str) -> None:
        """The node was deleted."""
        for kept in (self._speeds, self._loads, self._factors, self._fetches):
            kept.pop(node_id, None)


def _keep(kept: OrderedDict[Any, Any], key: object, value: object, most: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
