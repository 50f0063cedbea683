"""How much a node should want each lane. Pure.

Scores are seconds of urgency. Their parts are bounded: together they move a lane by at most `MOST_SECONDS`, which is
what lies between two priorities, so no lane is passed by for longer by lanes whose owners have had no more. One part is
larger and for lanes of like priority alone: what another node serves is left to it (`SECOND_COPY_SECONDS`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fleet_server.domain.comfy import weights_of
from fleet_server.domain.feasibility import WEIGHTS_SHARE, Feasibility, feasible
from fleet_server.domain.job import BOOST_MS, Lane, Priority
from fleet_server.domain.node import NodeView
from fleet_server.domain.speeds import NoTiming, Timing

PRESSURE_PER_JOB_SECONDS = 10.0
"""What each job that waits for a model adds to the urgency of its lanes, in seconds of waiting."""

PRESSURE_LIMIT_SECONDS = 120.0
"""The most that the number of waiting jobs adds: a long line must not starve a short one."""

SWAP_WEIGHT = 40.0
"""How many times its load seconds a lane must be more urgent before a node swaps models for it. A swap back costs as
much again, and is the likelier the shorter the stay was."""

SWAP_LIMIT_SECONDS = 360.0

SECOND_COPY_SECONDS = 3_600.0
"""So much more urgent a lane must be whose model another node serves, before one that is busy with models that it has
swaps for it. Only work of the same or a higher priority keeps a node so."""

KEEP_SECONDS = 60.0
"""For so long after its last use a model that no other node has in memory is worth its load seconds."""

SLOW_LIMIT_SECONDS = 30.0
"""The most that a node's speed, compared with the fleet's, adds or takes."""

FREE_LAG_JOBS = 8.0
"""An owner may be given so many jobs more than another who waits before that counts."""

LAG_SECONDS = 10.0
"""What each further job takes off."""

MOST_LAG_JOBS = 24.0
"""From so many on the other's lanes go first, whatever else; but a turn alone makes no second copy of a model."""

OUT_OF_TURN_SECONDS = 1_000.0

LOAD_LIMIT_SECONDS = 60.0
"""No load counts for more, however large the file."""

LORA_LOAD_SECONDS = 1.0
UNKNOWN_LOAD_SECONDS = 10.0
LOAD_BYTES_PER_SECOND = 400e6
"""How fast a model is read into memory, until it is measured."""

# The sum of all that is bounded.
MOST_SECONDS = PRESSURE_LIMIT_SECONDS + SWAP_LIMIT_SECONDS + LOAD_LIMIT_SECONDS + 2 * SLOW_LIMIT_SECONDS

NO_TIMING = NoTiming()


class Demand(Protocol):
    """A lane with what waits in it.

    `head_effective_ms` is the head's enqueue time less the boost of `head_priority`. `high_waiting`: a `high` job is in
    line, head or not. `head_owner_lag`: served jobs by which the head's owner is ahead of the owner who had least.
    """

    @property
    def lane(self) -> Lane: ...
    @property
    def waiting(self) -> int: ...
    @property
    def head_effective_ms(self) -> int | None: ...
    @property
    def head_priority(self) -> Priority | None: ...
    @property
    def oldest_enqueued_ms(self) -> int | None: ...
    @property
    def high_waiting(self) -> bool: ...
    @property
    def head_owner_lag(self) -> float: ...
    @property
    def paused(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Ranked:
    """A lane that a node can run. `load_seconds` 0: all is in memory. `run_seconds` 0: not known."""

    demand: Demand
    score: float
    load_seconds: float
    run_seconds: float
    urgent: bool

    @property
    def warm(self) -> bool:
        return self.load_seconds == 0

    @property
    def finish_seconds(self) -> float:
        """From now to the end of a job that begins at once."""
        return self.load_seconds + self.run_seconds


def cold_seconds(node: NodeView, lane: Lane, timing: Timing = NO_TIMING) -> float:
    """What the lane's model and LoRAs take to load with nothing in memory: measured, else by the file's size."""
    if not lane.model:
        return _graph_seconds(node, lane, cold=True) if lane.needs else 0.0
    measured = timing.cold_seconds(node, lane.model)
    if measured is None:
        model = node.models.get(lane.model)
        size = model.size_bytes if model is not None else 0
        measured = size / LOAD_BYTES_PER_SECOND if size else UNKNOWN_LOAD_SECONDS
    return min(measured + len(lane.loras) * LORA_LOAD_SECONDS, LOAD_LIMIT_SECONDS)


def load_seconds(node: NodeView, lane: Lane, timing: Timing = NO_TIMING) -> float:
    """What must be read into memory before the lane's jobs run there, in seconds; 0: nothing."""
    if lane.needs and not lane.model:
        return _graph_seconds(node, lane)
    loaded = node.loaded_model(lane.model) if lane.model else None
    if loaded is None:
        return cold_seconds(node, lane, timing)
    if not lane.loras:
        return 0.0
    return sum(1 for name in lane.loras if name not in loaded.loras) * LORA_LOAD_SECONDS


def _graph_seconds(node: NodeView, lane: Lane, *, cold: bool = False) -> float:
    """The same of a graph, which may name several models, or none. Nobody measures what they take alone."""
    models, loras = weights_of(lane.needs)
    loaded = [] if cold else [one for one in map(node.loaded_model, models) if one is not None]
    there = {name for one in loaded for name in one.loras}
    seconds = (len(models) - len(loaded)) * UNKNOWN_LOAD_SECONDS
    seconds += sum(1 for name in loras if name not in there) * LORA_LOAD_SECONDS if models else 0.0
    return min(seconds, LOAD_LIMIT_SECONDS)


def age(demand: Demand, now_ms: int) -> float:
    """The head's age in seconds after its boost."""
    head = demand.head_effective_ms
    return (now_ms - head) / 1000 if head is not None else 0.0


def rank(
    node: NodeView,
    demands: Iterable[Demand],
    now_ms: int,
    *,
    timing: Timing = NO_TIMING,
    verdicts: Feasibility | None = None,
    copies: Counter[str] | None = None,
    served: Collection[str] = (),
    turns: bool = True,
) -> list[Ranked]:
    """The lanes with waiting jobs that the node can run, the best first; ties by lane id: all replicas agree.

    `copies` counts the online nodes that have a model in memory; one that has it and can run a lane of `served` is
    among them. Without `turns` a lane with a `high` job goes before all others.
    """
    judge = verdicts.refusal if verdicts is not None else feasible
    able = [one for one in demands if one.waiting > 0 and not one.paused and judge(node, one.lane) is None]
    late = _lateness(able, now_ms)
    busy_with = max((_rank_of(one.head_priority) for one in able if _warm(node, one.lane)), default=-1)
    line: Counter[str] = Counter()
    for demand in able:
        line[demand.lane.chief_model or demand.lane.lane_id] += demand.waiting
    copies = copies if copies is not None else Counter(loaded.name for loaded in node.loaded)
    ranked = []
    for demand in able:
        load = load_seconds(node, demand.lane, timing)
        run = timing.run_seconds(node, demand.lane)
        usual = timing.usual_seconds(demand.lane) if run is not None else None
        slower = 0.0 if run is None or usual is None else run - usual
        model = demand.lane.chief_model
        warm = _warm(node, demand.lane)
        jobs: float = line[model or demand.lane.lane_id]
        if model:
            # What waits is shared by the nodes that have the model, this one counted in.
            jobs /= max(1, copies[model] + (not warm))
        worth = (
            age(demand, now_ms)
            + min(jobs * PRESSURE_PER_JOB_SECONDS, PRESSURE_LIMIT_SECONDS)
            - late.get(demand.lane.lane_id, 0.0)
            - min(SWAP_WEIGHT * load, SWAP_LIMIT_SECONDS)
            - max(-SLOW_LIMIT_SECONDS, min(slower, SLOW_LIMIT_SECONDS))
        )
        if not warm:
            worth -= _kept_worth(node, model, copies, now_ms, timing)
            if demand.lane.lane_id in served and _rank_of(demand.head_priority) <= busy_with:
                worth -= SECOND_COPY_SECONDS
        urgent = not turns and demand.high_waiting
        ranked.append(Ranked(demand, worth, load, run or 0.0, urgent))
    ranked.sort(key=lambda one: (not one.urgent, -one.score, one.demand.lane.lane_id))
    return ranked


def _warm(node: NodeView, lane: Lane) -> bool:
    return not lane.chief_model or node.loaded_model(lane.chief_model) is not None


def _rank_of(priority: Priority | None) -> int:
    """`low` is below the others. `high` is not above: it goes next by a rule of its own."""
    return 0 if priority is Priority.LOW else 1


def _lateness(able: Sequence[Demand], now_ms: int) -> dict[str, float]:
    """Seconds to take off the lanes whose heads' owners have had more than others who wait for this node.

    Such a lane counts as no older than the oldest of those whose turn it is, so that a long backlog buys nothing.
    """
    if all(demand.head_owner_lag == 0 for demand in able):
        return {}
    least: dict[str, float] = {}
    for demand in able:
        cluster = demand.lane.cluster
        least[cluster] = min(least.get(cluster, demand.head_owner_lag), demand.head_owner_lag)

    def ahead(demand: Demand) -> float:
        return demand.head_owner_lag - least[demand.lane.cluster] - FREE_LAG_JOBS

    oldest = max((_age(demand, now_ms) for demand in able if ahead(demand) <= 0), default=0.0)
    return {
        demand.lane.lane_id: max(0.0, _age(demand, now_ms) - oldest)
        + LAG_SECONDS * ahead(demand)
        + (OUT_OF_TURN_SECONDS if ahead(demand) + FREE_LAG_JOBS >= MOST_LAG_JOBS else 0.0)
        for demand in able
        if ahead(demand) > 0
    }


def _age(demand: Demand, now_ms: int) -> float:
    """The head's age without its boost."""
    if demand.head_effective_ms is None or demand.head_priority is None:
        return 0.0
    return (now_ms - demand.head_effective_ms - BOOST_MS[demand.head_priority]) / 1000


def _kept_worth(node: NodeView, model: str, copies: Counter[str], now_ms: int, timing: Timing) -> float:
    """What is lost with the models that the load of another puts out of memory: those of few nodes, used just now."""
    worth = 0.0
    room = _room_after(node, model)
    for loaded in sorted(node.loaded, key=lambda one: -one.used_ms):
        room -= loaded.memory_bytes
        recent = 1 - (now_ms - loaded.used_ms) / 1000 / KEEP_SECONDS
        if room < 0 and recent > 0:
            cost = timing.cold_seconds(node, loaded.name)
            worth = max(worth, (UNKNOWN_LOAD_SECONDS if cost is None else cost) * recent / max(1, copies[loaded.name]))
    return min(worth, LOAD_LIMIT_SECONDS)


def _room_after(node: NodeView, model: str) -> float:
    """GPU memory that is left for others beside the model; -1 where that is not known: all may have to leave."""
    file = node.models.get(model)
    if node.gpu_memory_bytes is None or file is None or not file.size_bytes:
        return -1.0
    return node.gpu_memory_bytes - file.size_bytes * WEIGHTS_SHARE
