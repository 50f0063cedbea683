"""Engines that run several like tasks in one go: an addition to the plug-in protocol of base.py."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from fleet_agent.engines.base import Cancelled, Engine, EngineResult, Reporter, Task

Ended = EngineResult | Cancelled | Exception


@runtime_checkable
class BatchEngine(Engine, Protocol):
    """An engine that is given several tasks at once where they are alike; `run` is for one alone."""

    def batch_limit(self, task: Task) -> int:
        """The most tasks like this one in one go, at least 1. Raises EngineError for fields that make no sense."""

    def batch_key(self, task: Task) -> Hashable:
        """Tasks with equal keys, of one model with the same LoRAs, may run together. Raises EngineError."""

    def run_batch(self, tasks: Sequence[Task], reports: Sequence[Reporter]) -> Iterator[tuple[int, Ended]]:
        """Runs tasks of one key, and yields the place and the end of each as soon as it is known, once each.

        A task that was cancelled ends at once (Cancelled) and the others go on. An exception ends all that are left.
        """
