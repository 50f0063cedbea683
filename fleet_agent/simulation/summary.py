"""The figures of a simulation, as plain values for JSON and for tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fleet_agent.simulation.simulation import Simulation

_WINDOW_SECONDS = 10.0


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which that share of them lies; None where there are none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """p50, p95, p99 and the greatest, in seconds."""
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "p50": _rounded(percentile(ordered, 0.50)),
        "p95": _rounded(percentile(ordered, 0.95)),
        "p99": _rounded(percentile(ordered, 0.99)),
        "max": _rounded(ordered[-1] if ordered else None),
    }


def throughput(ends: Sequence[float], now: float, seconds: float = _WINDOW_SECONDS) -> float:
    """Ends a second in the last seconds."""
    return sum(1 for at in reversed(ends) if at > now - seconds) / seconds


def peak_rate(times: Sequence[float], bin_seconds: float) -> float:
    """The most of them in one bin, a second."""
    bins: dict[int, int] = {}
    for at in times:
        number = int(at / bin_seconds)
        bins[number] = bins.get(number, 0) + 1
    return max(bins.values(), default=0) / bin_seconds


def summary(simulation: Simulation) -> dict[str, Any]:
    """Everything that the simulation saw so far."""
    tally, plan = simulation.tally, simulation.plan
    now = time.monotonic()
    seconds = now - simulation.started_at
    working = now - simulation.working_since if simulation.working_since is not None else 0.0
    speed = plan.pace.speed
    return {
        "profile": plan.profile.name,
        "seed": plan.seed,
        "speed": speed,
        "seconds": round(seconds, 3),
        "working_seconds": round(working, 3),
        "nodes": {
            "planned": tally.nodes,
            "online": tally.nodes_online,
            "dials": len(tally.dials),
            "welcomes": len(tally.welcomes),
            "crashes": tally.crashes,
            "heartbeats": tally.beats,
        },
        "jobs": {
            "submitted": tally.submitted,
            "refused": tally.refused_submits,
            "succeeded": tally.done,
            "failed": tally.failed_jobs,
            "unfinished": tally.unfinished,
            "per_second": round(tally.done / working, 3) if working else 0.0,
        },
        "attempts": {
            "assigned": tally.assigns,
            "rejected": tally.rejects,
            "failed": tally.failed_attempts,
            "cancelled": tally.cancels,
            "dropped": tally.drops + tally.kills,
            "late_ends_refused": tally.refused_ends,
            "overlapping_while_cut_off": tally.overlaps_away,
        },
        "faults_of_the_server": {
            "overlapping_while_connected": tally.overlaps,
            "succeeded_twice": tally.done_twice,
            "healthy_attempts_killed": tally.healthy_kills,
        },
        "dispatch_seconds": spread(tally.dispatch),
        "turnaround_seconds": spread(tally.turnaround),
        "swaps": sum(one.swaps for one in tally.by_class.values()),
        "classes": {
            name: {
                "nodes": one.nodes,
                "slots": one.slots,
                "succeeded": one.jobs,
                "swaps": one.swaps,
                "utilisation": _share(one.busy + one.loading, one.slots * working * speed),
                "loading": _share(one.loading, one.slots * working * speed),
            }
            for name, one in sorted(tally.by_class.items())
        },
        "placements": {
            model: {
                "attempts": sum(count for (name, _), count in tally.placements.items() if name == model),
                "nodes": sum(1 for name, _ in tally.placements if name == model),
            }
            for model in sorted({name for name, _ in tally.placements})
        },
    }


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole > 0 else 0.0


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
