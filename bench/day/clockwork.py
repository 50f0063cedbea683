"""The day itself: events in the order of their times, no clock, no waiting."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.day.gpus import BY_NAME, GPUS, LORA_SECONDS, Gpu, cold_seconds, speed, view
from bench.day.workload import DayJob
from fleet_server.domain.job import Lane
from fleet_server.domain.placement import feasible


@dataclass
class Node:
    """A GPU at a moment. It holds one checkpoint and the LoRAs that were put on it since."""

    gpu: Gpu
    job: DayJob | None = None
    model: str = ""
    loras: frozenset[str] = frozenset()
    used_at: float = -1e9
    busy_until: float = 0.0


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a job. Times are seconds since midnight."""

    job: DayJob
    node: int
    began: float
    load: float
    cold: bool
    run: float

    @property
    def wait(self) -> float:
        """From submit to the first step, loading included."""
        return self.began + self.load - self.job.at

    @property
    def ended(self) -> float:
        return self.began + self.load + self.run

    @property
    def turnaround(self) -> float:
        return self.ended - self.job.at


class Rule(Protocol):
    """Who takes what. Nodes are numbers, as in GPUS."""

    def arrive(self, job: DayJob, now: float) -> None:
        """A job was submitted."""
        ...

    def choose(self, nodes: Sequence[Node], now: float) -> list[tuple[int, DayJob]]:
        """Jobs for free nodes, at most one each. Asked again until there are none."""
        ...

    def ended(self, ran: Ran) -> None:
        """A job ended."""
        ...

    def look_again(self) -> float | None:
        """When to ask again if nothing happens before."""
        ...


@dataclass
class Day:
    """What a day came to."""

    ran: list[Ran] = field(default_factory=list)
    idle_seconds: float = 0.0
    """Seconds of a GPU that idled while a job that it could run had waited longer than the model's load time there."""

    @property
    def swaps(self) -> int:
        """Loads of a checkpoint."""
        return sum(one.cold for one in self.ran)

    def waits(self) -> list[float]:
        return sorted(one.wait for one in self.ran)

    def turnarounds(self) -> list[float]:
        return sorted(one.turnaround for one in self.ran)


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values."""
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def _fits(gpu: Gpu, model: str) -> bool:
    return feasible(view(gpu), Lane(model, "vision", "image_gen", model)) is None


FITS = {(number, name): _fits(gpu, name) for number, gpu in enumerate(GPUS) for name in BY_NAME}
"""Which GPU (by number) can run which model: the filters of dispatch."""

COLD = {(number, name): cold_seconds(gpu, model) for number, gpu in enumerate(GPUS) for name, model in BY_NAME.items()}


class Clockwork:
    """Runs a list of jobs through a rule."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._nodes = [Node(gpu) for gpu in GPUS]
        self._events: list[tuple[float, int, Ran | DayJob | None]] = []
        self._order = itertools.count()
        self._waiting: dict[str, dict[int, float]] = {name: {} for name in BY_NAME}
        self._day = Day()

    def run(self, jobs: Sequence[DayJob]) -> Day:
        """The whole day, to the end of its last job."""
        for job in jobs:
            self._at(job.at, job)
        before = 0.0
        while self._events:
            now, _, what = heapq.heappop(self._events)
            self._count_idle(before, now)
            before = now
            match what:
                case DayJob():
                    self._waiting[what.model][what.number] = what.at
                    self._rule.arrive(what, now)
                case Ran():
                    node = self._nodes[what.node]
                    node.job, node.used_at = None, now
                    self._day.ran.append(what)
                    self._rule.ended(what)
            if self._events and self._events[0][0] == now:
                continue
            while chosen := self._rule.choose(self._nodes, now):
                for number, job in chosen:
                    self._begin(number, job, now)
            again = self._rule.look_again()
            if again is not None and again > now:
                self._at(again, None)
        return self._day

    def _at(self, time: float, what: Ran | DayJob | None) -> None:
        heapq.heappush(self._events, (time, next(self._order), what))

    def _begin(self, number: int, job: DayJob, now: float) -> None:
        node = self._nodes[number]
        if node.job is not None or not FITS[number, job.model]:
            raise AssertionError(f"{node.gpu.name} was given {job} while it ran {node.job}")
        del self._waiting[job.model][job.number]
        cold = node.model != job.model
        missing = [name for name in job.lane.loras if cold or name not in node.loras]
        load = (COLD[number, job.model] if cold else 0.0) + len(missing) * LORA_SECONDS
        run = job.work / speed(node.gpu, BY_NAME[job.model]) * job.noise
        node.job, node.model, node.busy_until = job, job.model, now + load + run
        node.loras = (frozenset() if cold else node.loras) | frozenset(job.lane.loras)
        node.used_at = now
        ran = Ran(job, number, now, load, cold, run)
        self._at(ran.ended, ran)

    def _count_idle(self, before: float, now: float) -> None:
        """Between two events nothing changes but ages."""
        for number, node in enumerate(self._nodes):
            if node.job is not None:
                continue
            worst = 0.0
            for name, line in self._waiting.items():
                if line and FITS[number, name]:
                    oldest = next(iter(line.values()))
                    worst = max(worst, now - max(before, oldest + COLD[number, name]))
            # Times are kept in whole milliseconds by dispatch.
            if worst > 0.002:
                self._day.idle_seconds += worst
