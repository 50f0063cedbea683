"""The day itself: events in the order of their times, no clock, no waiting."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.day.gpus import BY_NAME, GPUS, LORA_SECONDS, Gpu, Model, cold_seconds, memory_of, speed, view
from bench.day.workload import DayJob
from fleet_server.domain.job import Lane
from fleet_server.domain.placement import feasible


@dataclass
class Held:
    """A checkpoint in memory, with the LoRAs that were put on it since."""

    loras: frozenset[str]
    used_at: float


@dataclass
class Node:
    """A GPU at a moment. `single`: it holds one checkpoint; else what fits, and what was used longest ago leaves."""

    gpu: Gpu
    single: bool
    job: DayJob | None = None
    memory: dict[str, Held] = field(default_factory=dict)

    def load(self, job: DayJob, now: float) -> tuple[bool, int]:
        """Makes the job's model and LoRAs ready; whether the checkpoint came from disk, and how many LoRAs did."""
        held = self.memory.get(job.model)
        cold = held is None
        if held is None:
            self._make_room(BY_NAME[job.model])
            held = self.memory[job.model] = Held(frozenset(), now)
        missing = sum(name not in held.loras for name in job.lane.loras)
        held.loras |= frozenset(job.lane.loras)
        held.used_at = now
        return cold, missing

    def _make_room(self, model: Model) -> None:
        left = 0 if self.single else self.gpu.memory - memory_of(model)
        for name in sorted(self.memory, key=lambda name: -self.memory[name].used_at):
            left -= memory_of(BY_NAME[name])
            if left < 0:
                del self.memory[name]


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

    def __init__(self, rule: Rule, *, single: bool = False) -> None:
        self._rule = rule
        self._nodes = [Node(gpu, single) for gpu in GPUS]
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
                    node.job = None
                    node.memory[what.job.model].used_at = now
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
        cold, loras = node.load(job, now)
        load = (COLD[number, job.model] if cold else 0.0) + loras * LORA_SECONDS
        run = job.work / speed(node.gpu, BY_NAME[job.model]) * job.noise
        node.job = job
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
