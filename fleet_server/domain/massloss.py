"""When most of a fleet vanishes at once, the fault is likelier ours or the network's than the nodes'. Pure.

Then their jobs are left to them for a while instead of being given to the few that are left, which would run
everything twice. The rule and its figures are Kubernetes' and Nomad's way (reliability.md, section 1), in our sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class MassLossRule:
    """More than `share` of at least `least` nodes gone within `window_seconds`: nothing is reassigned.

    It ends when no more than that share is away, or after `freeze_seconds`. Small fleets are left out: two boxes of
    three may well be switched off.
    """

    share: float = 0.5
    least: int = 10
    window_seconds: float = 60.0
    freeze_seconds: float = 300.0


@dataclass(slots=True)
class MassLoss:
    """The nodes that went away without a goodbye, and whether that were too many. Times are seconds of one clock."""

    rule: MassLossRule = field(default_factory=MassLossRule)
    _left: dict[str, float] = field(default_factory=dict)
    _frozen_since: float | None = None

    def left(self, node_id: str, now: float) -> None:
        """The node's stream broke."""
        self._left[node_id] = now

    def back(self, node_id: str) -> None:
        """The node has a stream again, or is known to be gone for good."""
        self._left.pop(node_id, None)

    def frozen(self, online: int, now: float) -> bool:
        """Whether nothing may be reassigned, `online` nodes being here."""
        rule = self.rule
        if self._frozen_since is not None:
            if now - self._frozen_since < rule.freeze_seconds and self._too_many(len(self._left), online):
                return True
            self._frozen_since = None
            self._left.clear()
            return False
        self._left = {node_id: at for node_id, at in self._left.items() if now - at <= rule.window_seconds}
        if self._too_many(len(self._left), online):
            self._frozen_since = now
            return True
        return False

    @property
    def away(self) -> int:
        """How many nodes are counted as gone."""
        return len(self._left)

    def _too_many(self, away: int, online: int) -> bool:
        known = away + online
        return known >= self.rule.least and away > self.rule.share * known
