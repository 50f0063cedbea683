"""What rounds of dispatch look at, where no dispatcher runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fleet_server.domain.node import NodeView
from fleet_server.domain.placement import Situation
from fleet_server.services.dispatch import Wanted
from fleet_server.services.fleet import FleetView
from fleet_server.services.nodes import now_ms


@dataclass
class DeskRounds:
    """The nodes of a desk, each with the free slots that it said it has."""

    fleet: FleetView

    def nodes(self) -> list[NodeView]:
        return self.fleet.nodes()

    def situation(self, wanted: Sequence[Wanted]) -> Situation:
        return Situation(self.fleet.online(), wanted, now_ms())
