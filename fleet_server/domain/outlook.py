"""What becomes of one job: each node's verdict, and the node that dispatch would choose. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fleet_server.domain.eta import ahead_seconds, start_seconds
from fleet_server.domain.feasibility import Feasibility, Refusal, feasible
from fleet_server.domain.fetching import NO_SHELF, Shelf, ShelfFile, cold_fetch_seconds, fetch_plan, fetch_seconds
from fleet_server.domain.job import Lane
from fleet_server.domain.node import NodeView
from fleet_server.domain.placement import Situation, load_seconds, place
from fleet_server.domain.speeds import Timing


@dataclass(frozen=True, slots=True)
class Verdict:
    """One node and one job. Seconds are None where unknown; `rank` and the seconds are None where it is refused."""

    node_id: str
    refusal: Refusal | None = None
    rank: int | None = None
    load_seconds: float | None = None
    start_seconds: float | None = None
    eta_seconds: float | None = None
    detail: str = ""
    fetches: bool = False
    """It would bring files from the buckets first, as no node could run the job without."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """All verdicts, feasible ones by rank, then the others by name. `chosen`: a slot of it would be given now."""

    verdicts: tuple[Verdict, ...]
    chosen: bool = False

    @property
    def best(self) -> Verdict | None:
        """The expected node's; None if no node could run it."""
        first = next(iter(self.verdicts), None)
        return first if first is not None and first.refusal is None else None


def look(
    nodes: Sequence[NodeView],
    lane: Lane,
    situation: Situation,
    *,
    timing: Timing,
    run_seconds: Callable[[NodeView], float | None],
    ahead: int = 0,
    next_in_lane: bool = True,
    shelf: Shelf = NO_SHELF,
) -> Outlook:
    """Judges all `nodes` for one job of the lane that has `ahead` jobs before it in its cluster.

    `situation` is the round that dispatch would take now, the job counted in; `run_seconds` is how long this very job
    runs on a node. The expected node is the one that the round gives the lane if the job is the lane's next, else the
    one where it should end first. Files of `shelf` count where no online node can do without them.
    """
    verdicts = Feasibility()
    chosen = ""
    if next_in_lane:
        plan = place(situation, timing=timing, verdicts=verdicts)
        chosen = next((one.node_id for one in plan.placed if one.lane_id == lane.lane_id), "")
    online = [node for node in nodes if node.online]
    before = ahead_seconds(online, lane, ahead, timing, verdicts)
    able: list[Verdict] = []
    unable: list[Verdict] = []
    at_hand = any(feasible(node, lane) is None for node in online)
    for node in nodes:
        wish = fetch_plan(node, lane, shelf)
        refusal = wish if isinstance(wish, Refusal) else feasible(node, lane) if at_hand else None
        if refusal is not None:
            unable.append(Verdict(node.node_id, refusal, detail=refusal.detail))
            continue
        files = () if isinstance(wish, Refusal) else wish
        load = cold_fetch_seconds(node, lane, files, timing) if files else load_seconds(node, lane, timing)
        start = start_seconds(node, situation.now_ms)
        run = run_seconds(node)
        eta = None
        if start is not None and before is not None and run is not None:
            eta = start + before + load + run
        able.append(
            Verdict(
                node.node_id,
                load_seconds=load,
                start_seconds=start,
                eta_seconds=eta,
                detail=_fetch_detail(node, files, timing) if files else _detail(node, lane, load, start),
                fetches=bool(files),
            )
        )

    def order(verdict: Verdict) -> tuple[bool, bool, float, str]:
        soon = verdict.eta_seconds
        if soon is None:
            soon = (verdict.start_seconds or 0.0) + (verdict.load_seconds or 0.0)
        return verdict.node_id != chosen, verdict.start_seconds is None, soon, verdict.node_id

    able.sort(key=order)
    unable.sort(key=lambda verdict: verdict.node_id)
    ranked = [replace(verdict, rank=number) for number, verdict in enumerate(able, 1)]
    return Outlook((*ranked, *unable), chosen=bool(chosen))


def _fetch_detail(node: NodeView, files: Sequence[ShelfFile], timing: Timing) -> str:
    names = " and ".join(file.name for file in files)
    size = sum(file.size_bytes for file in files)
    return f"brings {names} from S3 first: {size / 1e6:,.0f} MB, about {fetch_seconds(node, files, timing):.0f} s"


def _detail(node: NodeView, lane: Lane, load: float, start: float | None) -> str:
    if not lane.model:
        has = "no model to load"
    elif load <= 0:
        has = "model loaded"
    elif node.loaded_model(lane.model) is not None:
        has = "model loaded, LoRAs not"
    else:
        has = "model on its disk"
    if start is None:
        return f"{has}, no free slot"
    return has if start <= 0 else f"{has}, busy for about {start:.0f} s"
