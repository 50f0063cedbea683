"""Our rule: the store's order inside lanes, placement's functions between them, speeds learned as the day goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.day.clockwork import Node, Ran
from bench.day.gpus import BY_NAME, GPUS, memory_of, view
from bench.day.lines import Line, Shares
from bench.day.workload import DayJob
from fleet_server.domain.node import LoadedView, NodeView
from fleet_server.domain.placement import Feasibility, Situation, load_seconds, place
from fleet_server.domain.ranking import LORA_LOAD_SECONDS
from fleet_server.domain.speeds import SpeedBook, Unit, Work

UNKNOWN_RUN_SECONDS = 10.0
NUMBER_OF = {gpu.name: number for number, gpu in enumerate(GPUS)}


class Ours:
    """What the dispatcher does, less the store and the streams."""

    def __init__(self) -> None:
        self.book = SpeedBook()
        self._verdicts = Feasibility()
        self._shares = Shares()
        self._lines: dict[str, Line] = {}
        self._views = [view(gpu) for gpu in GPUS]
        self._after_urgent: set[str] = set()
        self._again: float | None = None
        self._expected = [0] * len(GPUS)

    def arrive(self, job: DayJob, now: float) -> None:
        line = self._lines.get(job.lane.lane_id)
        if line is None:
            line = self._lines[job.lane.lane_id] = Line(job.lane, self._shares)
        line.add(job)

    def choose(self, nodes: Sequence[Node], now: float) -> list[tuple[int, DayJob]]:
        self._again = None
        if all(node.job is not None for node in nodes):
            return []
        demands = [line.demand() for line in self._lines.values() if line.waiting]
        if not demands:
            return []
        now_ms = int(now * 1000)
        views = []
        for number, node in enumerate(nodes):
            loaded = tuple(
                LoadedView(
                    name,
                    memory_bytes=memory_of(BY_NAME[name]),
                    loras=tuple(held.loras),
                    used_ms=int(held.used_at * 1000),
                )
                for name, held in node.memory.items()
            )
            busy = node.job is not None
            free_at = (self._expected[number],) if busy else ()
            views.append(replace(self._views[number], loaded=loaded, slots_free=0 if busy else 1, free_at_ms=free_at))
        situation = Situation(views, demands, now_ms, (), frozenset(self._after_urgent))
        plan = place(situation, timing=self.book, verdicts=self._verdicts)
        if plan.look_again_ms is not None:
            # Placement's clock has whole milliseconds.
            self._again = max(plan.look_again_ms / 1000, now + 0.001)
        chosen = []
        for placed in plan.placed:
            job = self._lines[placed.lane_id].claim()
            (self._after_urgent.add if placed.urgent else self._after_urgent.discard)(placed.node_id)
            number = NUMBER_OF[placed.node_id]
            self._note(number, views[number], job, now_ms)
            chosen.append((number, job))
        return chosen

    def _note(self, number: int, node: NodeView, job: DayJob, now_ms: int) -> None:
        work = Work(Unit.PIXEL_STEPS, job.work)
        self.book.saw_job(job.lane.lane_id, work)
        run = self.book.seconds(node, job.model, work)
        seconds = load_seconds(node, job.lane, self.book) + (UNKNOWN_RUN_SECONDS if run is None else run)
        self._expected[number] = now_ms + int(seconds * 1000)

    def ended(self, ran: Ran) -> None:
        name = GPUS[ran.node].name
        self.book.ran(name, ran.job.model, "diffusers", Work(Unit.PIXEL_STEPS, ran.job.work), ran.run)
        if ran.cold:
            self.book.loaded(name, ran.job.model, ran.load - len(ran.job.lane.loras) * LORA_LOAD_SECONDS)

    def look_again(self) -> float | None:
        return self._again
