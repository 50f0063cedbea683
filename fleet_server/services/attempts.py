"""The book of one agent's attempts: what it holds, and how many slots are free. No waiting, no store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fleet.v1.node_pb2 import HeldAttempt

MISSING_BEATS = 2
"""An attempt that so many heartbeats in a row do not name is not there any more."""


@dataclass(slots=True)
class Attempt:
    """An attempt on a node. `accept_by` (loop time) is set until the agent has taken it.

    `spec` is the job's, where this server gave the attempt out. `cancelled`: it is not the job's attempt any more, but
    it fills its slot until the agent says that it has stopped.
    """

    job_id: str
    token: str
    spec: bytes = b""
    lane_id: str = ""
    generation: int = 0
    attempt: int = 0
    accept_by: float | None = None
    cancelled: bool = False
    progress: int | None = None
    step: int | None = None
    steps: int | None = None
    missing: int = 0


class AttemptBook:
    """Attempts by token. Free are the slots that the agent could fill at its last report, less what the book holds."""

    def __init__(self) -> None:
        self._attempts: dict[str, Attempt] = {}
        self._done: set[str] = set()
        self._slots = 0

    def __iter__(self) -> Iterator[Attempt]:
        return iter(tuple(self._attempts.values()))

    @property
    def slots_free(self) -> int:
        """How many jobs may still be given to the agent."""
        return max(0, self._slots - len(self._attempts))

    def job_ids(self) -> tuple[str, ...]:
        """What the agent runs, in the order in which it was given."""
        return tuple(attempt.job_id for attempt in self._attempts.values())

    def get(self, token: str) -> Attempt | None:
        return self._attempts.get(token)

    def add(self, attempt: Attempt) -> None:
        self._attempts[attempt.token] = attempt

    def end(self, token: str) -> Attempt | None:
        """The attempt is over and its slot free; None if the book does not have it."""
        return self._attempts.pop(token, None)

    def finish(self, token: str) -> Attempt | None:
        """As `end`, by the agent's own report: it goes on naming the attempt until it knows that the report arrived."""
        self._done.add(token)
        return self.end(token)

    def report(self, slots: int, slots_free: int, held: Iterable[HeldAttempt]) -> None:
        """Takes a heartbeat: slots that it can fill, attempts that it names and those that it does not."""
        named = {one.token: one for one in held}
        self._done.intersection_update(named)
        for token in self._done:
            # It fills no slot any more.
            del named[token]
        self._slots = min(slots, slots_free + len(named))
        for token, one in named.items():
            attempt = self._attempts.setdefault(token, Attempt(one.job_id, token))
            attempt.missing = 0
        for token, attempt in tuple(self._attempts.items()):
            if token not in named and attempt.accept_by is None:
                attempt.missing += 1
                if attempt.missing >= MISSING_BEATS:
                    del self._attempts[token]

    def late(self, now: float) -> list[Attempt]:
        """Attempts that were to be accepted by now."""
        return [one for one in self._attempts.values() if one.accept_by is not None and one.accept_by <= now]
