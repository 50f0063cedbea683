"""Models that fail on a node again and again get no work there for a while. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

FAILURES = 3
"""Failed loads in a row, of two jobs at least, that put a model into quarantine on a node."""

FIRST_SECONDS = 300.0
LONGEST_SECONDS = 3_600.0

BLAMED = frozenset({"MODEL_NOT_FOUND", "LORA_NOT_FOUND", "ENGINE_FAILED", "OUT_OF_MEMORY", "GPU_UNAVAILABLE"})
"""Reasons of attempts that speak against the node and model rather than against the job or the caller."""


@dataclass(slots=True)
class _Case:
    failures: int = 0
    jobs: set[str] = field(default_factory=set)
    until: float = 0.0
    sentences: int = 0


class Quarantine:
    """Counts failures of (node, model) by attempts that had to load the model.

    The first sentence is 5 minutes, each further one twice as long, at most 1 h. After it has ended one failure is
    enough for the next, one success forgets all. Times are seconds of one clock.
    """

    def __init__(self) -> None:
        self._cases: dict[tuple[str, str], _Case] = {}

    def failed(self, node_id: str, model: str, job_id: str, reason: str, now: float) -> bool:
        """An attempt of the job failed that had to load the model; True if that quarantines the model on the node."""
        if reason not in BLAMED:
            return False
        case = self._cases.setdefault((node_id, model), _Case())
        case.failures += 1
        if len(case.jobs) < FAILURES:
            case.jobs.add(job_id)
        enough = case.failures >= FAILURES and len(case.jobs) > 1
        if now < case.until or not enough:
            return False
        case.until = now + min(FIRST_SECONDS * 2**case.sentences, LONGEST_SECONDS)
        case.sentences += 1
        return True

    def worked(self, node_id: str, model: str) -> None:
        """A job of the model succeeded there."""
        self._cases.pop((node_id, model), None)

    def models(self, node_id: str, now: float) -> frozenset[str]:
        """The models in quarantine on the node."""
        if not self._cases:
            return frozenset()
        return frozenset(model for (node, model), case in self._cases.items() if node == node_id and now < case.until)

    def forget(self, node_id: str) -> None:
        """The node was deleted: another of its name begins anew."""
        for key in [key for key in self._cases if key[0] == node_id]:
            del self._cases[key]
