"""The simple rules: what a person would write first. They use the same filters and know the same priorities."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence

from bench.day.clockwork import FITS, Node, Ran
from bench.day.gpus import GPUS
from bench.day.workload import DayJob
from fleet_server.domain.job import BOOST_MS


def turn(job: DayJob) -> tuple[float, int]:
    """First come first served, after the boosts of priorities."""
    return job.at - BOOST_MS[job.priority] / 1000, job.number


class _Lines:
    """A line for each node; a job is put into one when it is submitted and stays there."""

    def __init__(self) -> None:
        self._lines: list[list[tuple[tuple[float, int], DayJob]]] = [[] for _ in GPUS]
        self._running = [0] * len(GPUS)

    def _line(self, job: DayJob) -> int:
        raise AssertionError

    def arrive(self, job: DayJob, now: float) -> None:
        heapq.heappush(self._lines[self._line(job)], (turn(job), job))

    def choose(self, nodes: Sequence[Node], now: float) -> list[tuple[int, DayJob]]:
        chosen = []
        for number, line in enumerate(self._lines):
            if line and nodes[number].job is None:
                chosen.append((number, heapq.heappop(line)[1]))
                self._running[number] = 1
        return chosen

    def ended(self, ran: Ran) -> None:
        self._running[ran.node] = 0

    def look_again(self) -> float | None:
        return None


class RoundRobin(_Lines):
    """Each job goes to the next node in turn that can run it."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0

    def _line(self, job: DayJob) -> int:
        while True:
            number = self._next
            self._next = (number + 1) % len(GPUS)
            if FITS[number, job.model]:
                return number


class LeastBusy(_Lines):
    """Each job goes to the node with the fewest jobs, waiting and running, of those that can run it."""

    def _line(self, job: DayJob) -> int:
        able = [number for number in range(len(GPUS)) if FITS[number, job.model]]
        return min(able, key=lambda number: (len(self._lines[number]) + self._running[number], number))


class OneQueue:
    """One line for all: a free node, in turn, takes the first job that it can run. Harder to beat than round robin."""

    def __init__(self) -> None:
        self._line: list[tuple[tuple[float, int], DayJob]] = []
        self._next = 0

    def arrive(self, job: DayJob, now: float) -> None:
        insort(self._line, (turn(job), job))

    def choose(self, nodes: Sequence[Node], now: float) -> list[tuple[int, DayJob]]:
        for step in range(len(nodes)):
            number = (self._next + step) % len(nodes)
            if nodes[number].job is not None:
                continue
            for index, (_, job) in enumerate(self._line):
                if FITS[number, job.model]:
                    del self._line[index]
                    self._next = (number + 1) % len(nodes)
                    return [(number, job)]
        return []

    def ended(self, ran: Ran) -> None:
        pass

    def look_again(self) -> float | None:
        return None
