"""When most of a fleet vanishes at once, the fault is likelier ours or the network's than the nodes'. Pure.

Then their jobs are left to them for a while instead of being given to the few that are left, which would run
everything twice. The rule and its figures are Kubernetes' and Nomad's way (reliability.md, section 1), in our sizes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MassLossRule:
    """More than `share` of at least `least` nodes gone within `window_seconds`: nothing is reassigned.

    It ends when no more than that share is away, or after `freeze_seconds`. Small fleets are left out: two boxes of
    three may well be switched off. The store judges (lib/watch.lua): over the nodes of all replicas, and for all.
    """

    share: float = 0.5
    least: int = 10
    window_seconds: float = 60.0
    freeze_seconds: float = 300.0
