"""Answers about time, written down while a decision is made, so that it can be made again. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fleet_server.domain.job import Lane
from fleet_server.domain.node import NodeView
from fleet_server.domain.speeds import Timing


@dataclass(slots=True)
class RecordedTiming:
    """Asks `source` and remembers what it said; without one it repeats what is remembered, None for anything else."""

    source: Timing | None = None
    answers: dict[tuple[str, ...], float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Timing) -> RecordedTiming:
        """One that asks and remembers."""
        return cls(source)

    def sealed(self) -> RecordedTiming:
        """What was remembered, without the source: it will say the same for ever."""
        return RecordedTiming(None, dict(self.answers))

    def run_seconds(self, node: NodeView, lane: Lane) -> float | None:
        return self._ask(("run", node.node_id, lane.lane_id), node, lane)

    def usual_seconds(self, lane: Lane) -> float | None:
        return self._ask(("usual", lane.lane_id), lane)

    def factor(self, node: NodeView) -> float:
        key = ("factor", node.node_id)
        if self.source is not None and key not in self.answers:
            self.answers[key] = self.source.factor(node)
        return self.answers.get(key) or 1.0

    def cold_seconds(self, node: NodeView, model: str) -> float | None:
        return self._ask(("cold", node.node_id, model), node, model)

    def measured_cold_seconds(self, node: NodeView, model: str) -> float | None:
        return self._ask(("measured_cold", node.node_id, model), node, model)

    def fetch_speed(self, node: NodeView) -> float | None:
        # No decision of `place` rests on it.
        return None if self.source is None else self.source.fetch_speed(node)

    def _ask(self, key: tuple[str, ...], *of: Any) -> float | None:
        if self.source is not None and key not in self.answers:
            answer: float | None = getattr(self.source, f"{key[0]}_seconds")(*of)
            self.answers[key] = answer
        return self.answers.get(key)
