"""Decisions of dispatch in a file, each with all that it was made of, and made again from there.

A line of JSON is one round: the nodes that have changed since the line before, those that are gone, the lanes, what was
known of times, and the plan. At most 1,000 lines wait for the disk; when more come they are left out, and the next one
that is kept names every node again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import structlog
from pydantic import TypeAdapter

from fleet_server.domain.comfy import Catalogue, Need
from fleet_server.domain.node import NodeView
from fleet_server.domain.placement import Plan, Situation, place
from fleet_server.domain.recorded import RecordedTiming
from fleet_server.services.dispatch import Decision, Wanted

_log = structlog.get_logger("fleet.decisions")
_WAITING = 1_000
_NODES = TypeAdapter(list[NodeView])
_DEMANDS = TypeAdapter(list[Wanted])
_PLAN = TypeAdapter(Plan)
_TIMING = TypeAdapter(list[tuple[tuple[str, ...], float | None]])


class DecisionLog:
    """Appends decisions to a file. `note` never waits; `run` is one task that writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: asyncio.Queue[bytes] = asyncio.Queue(_WAITING)
        self._known: dict[str, NodeView] = {}
        self._needs: frozenset[Need] = frozenset()
        self._excerpts: dict[str, Catalogue] = {}
        self.left_out = 0

    def open(self) -> None:
        """Makes the file, empty. Raises OSError."""
        self._path.write_bytes(b"")

    def note(self, decision: Decision) -> None:
        """Takes a decision down."""
        if self._lines.full():
            self.left_out += 1
            self._known.clear()
            return
        self._lines.put_nowait(self._line(decision))

    async def run(self) -> None:
        """Writes until cancelled, then what is left. A disk that refuses costs lines, not the server."""
        try:
            while True:
                line = await self._lines.get()
                await asyncio.to_thread(self._write, line + self._rest())
        finally:
            self._write(self._rest())

    def _seen(self, situation: Situation) -> list[NodeView]:
        """The nodes, of what their ComfyUIs have only what some lane needs: a catalogue has megabytes."""
        needs = self._needs.union(*(_wanted(one).lane.needs for one in situation.demands))
        if needs != self._needs:
            self._needs = needs
            self._excerpts.clear()
        return [
            node if node.offers is None else replace(node, offers=self._excerpt(node.offers))
            for node in situation.nodes
        ]

    def _excerpt(self, catalogue: Catalogue) -> Catalogue:
        found = self._excerpts.get(catalogue.digest)
        if found is None:
            found = self._excerpts[catalogue.digest] = catalogue.only(self._needs)
        return found

    def _rest(self) -> bytes:
        lines = []
        while not self._lines.empty():
            lines.append(self._lines.get_nowait())
        return b"".join(lines)

    def _write(self, data: bytes) -> None:
        try:
            with self._path.open("ab") as file:
                file.write(data)
        except OSError as error:
            _log.warning("decisions are not kept", file=str(self._path), error=error.strerror)

    def _line(self, decision: Decision) -> bytes:
        situation = decision.situation
        fresh = not self._known
        now = {node.node_id: node for node in self._seen(situation)}
        changed = [node for node_id, node in now.items() if self._known.get(node_id) != node]
        gone = [node_id for node_id in self._known if node_id not in now]
        self._known = now
        fields = {
            "fresh": fresh,
            "nodes": _NODES.dump_python(changed, mode="json"),
            "gone": gone,
            "now_ms": situation.now_ms,
            "demands": _DEMANDS.dump_python([_wanted(one) for one in situation.demands], mode="json"),
            "avoided": sorted(situation.avoided),
            "after_urgent": sorted(situation.after_urgent),
            "timing": _TIMING.dump_python(list(decision.timing.answers.items()), mode="json"),
            "plan": _PLAN.dump_python(decision.plan, mode="json"),
        }
        return orjson.dumps(fields) + b"\n"


def _wanted(demand: object) -> Wanted:
    assert isinstance(demand, Wanted)
    return demand


class BadRecordError(ValueError):
    """A line of the file is no decision; the text names it."""


@dataclass(slots=True)
class Replay:
    """What came of making decisions again."""

    decisions: int = 0
    placed: int = 0
    deferred: int = 0
    differences: list[str] = field(default_factory=list)
    placements: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Placed jobs by (node_id, model, or job type where there is none)."""


def read_decisions(lines: Iterable[bytes]) -> Iterator[Decision]:
    """The decisions of a file, in order. Raises BadRecordError."""
    nodes: dict[str, NodeView] = {}
    for number, line in enumerate(lines, 1):
        try:
            yield _decision(orjson.loads(line), nodes)
        except (ValueError, KeyError, TypeError) as error:
            raise BadRecordError(f"line {number} is no decision: {error}") from error


def _decision(fields: dict[str, Any], nodes: dict[str, NodeView]) -> Decision:
    if fields["fresh"]:
        nodes.clear()
    for node_id in fields["gone"]:
        nodes.pop(node_id, None)
    nodes.update((node.node_id, node) for node in _NODES.validate_python(fields["nodes"]))
    situation = Situation(
        [nodes[node_id] for node_id in sorted(nodes)],
        _DEMANDS.validate_python(fields["demands"]),
        fields["now_ms"],
        {(node_id, lane_id) for node_id, lane_id in fields["avoided"]},
        frozenset(fields["after_urgent"]),
    )
    timing = RecordedTiming(None, dict(_TIMING.validate_python(fields["timing"])))
    return Decision(situation, timing, _PLAN.validate_python(fields["plan"]))


def replay(lines: Iterable[bytes]) -> Replay:
    """Puts each recorded situation through the pure functions of placement again. Raises BadRecordError."""
    found = Replay()
    for number, decision in enumerate(read_decisions(lines), 1):
        found.decisions += 1
        found.placed += len(decision.plan.placed)
        found.deferred += len(decision.plan.deferred)
        lanes = {one.lane.lane_id: one.lane for one in decision.situation.demands}
        for one in decision.plan.placed:
            lane = lanes[one.lane_id]
            found.placements[one.node_id, lane.model or lane.job_type] += 1
        again = place(decision.situation, timing=decision.timing)
        if again != decision.plan:
            found.differences.append(f"decision {number}: {_difference(decision.plan, again)}")
    return found


def _difference(was: Plan, now: Plan) -> str:
    for name in ("placed", "deferred"):
        before, after = getattr(was, name), getattr(now, name)
        if before != after:
            first = next(
                (pair for pair in zip(before, after, strict=False) if pair[0] != pair[1]), (len(before), len(after))
            )
            return f"{name}: was {first[0]}, is {first[1]}"
    return "none"
