"""How many replicas a service should have, by the jobs that wait for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fleet_server.domain.job import Lane


@dataclass(frozen=True, slots=True)
class AutoscaleRule:
    """Jobs of a cluster, of a type, for a model (None: of any) make replicas: one for `jobs_per_replica` that wait, at
    least `min_replicas`, at most `max_replicas`.
    """

    max_replicas: int
    min_replicas: int = 0
    jobs_per_replica: int = 1
    enabled: bool = True
    cluster: str | None = None
    job_type: str | None = None
    model: str | None = None

    def counts(self, lane: Lane) -> bool:
        """Whether the lane's jobs are such jobs. A mixed lane holds jobs of all types and models of its cluster: they
        count where the rule asks for neither."""
        return (
            self.cluster in {None, lane.cluster}
            and self.job_type in {None, lane.job_type}
            and self.model in {None, lane.model}
        )


@dataclass(frozen=True, slots=True)
class Depth:
    """Jobs that wait, paused ones too, and those that run."""

    waiting: int = 0
    running: int = 0


def depth_of(rule: AutoscaleRule, lanes: Iterable[tuple[Lane, int, int]]) -> Depth:
    """The jobs of a rule; lanes come with those that wait and those that run."""
    counted = [(waiting, running) for lane, waiting, running in lanes if rule.counts(lane)]
    return Depth(sum(waiting for waiting, _ in counted), sum(running for _, running in counted))


@dataclass(frozen=True, slots=True)
class Calm:
    """The numbers of replicas that were wanted lately, newest last: (when in seconds, how many)."""

    wanted: tuple[tuple[float, int], ...] = ()


def decide(
    rule: AutoscaleRule, replicas: int, depth: Depth, calm: Calm, *, now: float, calm_seconds: float
) -> tuple[int, Calm]:
    """How many replicas there should be now, and what to remember.

    More are given at once. Fewer only when fewer have been enough for `calm_seconds`, and then no fewer than that time
    needed at its busiest; nor fewer than jobs run, for each of them may run in one.
    """
    if not rule.enabled:
        return replicas, Calm()
    wanted = -(-depth.waiting // rule.jobs_per_replica)
    wanted = max(wanted, min(depth.running, replicas))
    wanted = max(rule.min_replicas, min(wanted, rule.max_replicas))
    first = calm.wanted[0][0] if calm.wanted else now
    # One that is older than the window is kept: it says that the window is full.
    # What it wanted was wanted up to the next.
    older = [entry for entry in calm.wanted if entry[0] <= now - calm_seconds]
    recent = [*older[-1:], *(entry for entry in calm.wanted if entry[0] > now - calm_seconds), (now, wanted)]
    remembered = Calm(tuple(recent))
    if wanted >= replicas:
        return wanted, remembered
    if replicas > rule.max_replicas:
        return rule.max_replicas, remembered
    if now - first < calm_seconds:
        return replicas, remembered
    busiest = max(count for _, count in recent)
    return min(replicas, busiest), remembered
