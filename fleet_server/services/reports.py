"""What one agent reports of its attempts, on its way into the store: what has come meanwhile goes together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog
from fleet.v1.node_pb2 import CompleteOutcome, JobComplete

from fleet_server.domain.errors import FleetError
from fleet_server.services.completion import Completions, Ended
from fleet_server.store import JobStore

_log = structlog.get_logger("fleet.session")
MOST_TOGETHER = 256


@dataclass(frozen=True, slots=True)
class Started:
    """The engine began."""

    job_id: str
    token: str


@dataclass(frozen=True, slots=True)
class GivenBack:
    """The attempt does not run and counts for nothing. `stopped`: its agent says so; else it may run after all, and
    goes on if the node has another session than `session` by now.
    """

    job_id: str
    token: str
    stopped: bool = True
    session: str = ""


Report = Started | GivenBack | Ended


class Reports:
    """Takes reports in their order and writes them down, many in one go; repeated while the store is away.

    A start and the end of one attempt keep their order. The callbacks must not wait: `unwanted(job_id, token)` for a
    start of what is not the job's attempt any more, `given_back()` after work went back to the queue,
    `settled(complete, outcome)` for each end, `refused(complete)` for one that cannot be taken now (the disk is full):
    it may come again. `run` is one task.
    """

    def __init__(
        self,
        node_id: str,
        jobs: JobStore,
        completions: Completions,
        *,
        backlog: int,
        repeat_seconds: float,
        unwanted: Callable[[str, str], None],
        given_back: Callable[[], None],
        settled: Callable[[JobComplete, CompleteOutcome.ValueType], None],
        refused: Callable[[JobComplete], None],
    ) -> None:
        self._node_id = node_id
        self._jobs = jobs
        self._completions = completions
        self._repeat_seconds = repeat_seconds
        self._unwanted = unwanted
        self._given_back = given_back
        self._settled = settled
        self._refused = refused
        self._waiting: asyncio.Queue[Report] = asyncio.Queue(backlog)

    async def put(self, report: Report) -> None:
        """Waits while too many wait for the store: then the agent's stream is not read."""
        await self._waiting.put(report)

    async def join(self) -> None:
        """Returns when all that was put has been settled."""
        await self._waiting.join()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < MOST_TOGETHER and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            try:
                await self._settle(batch)
            finally:
                for _ in batch:
                    self._waiting.task_done()

    async def _settle(self, batch: Sequence[Report]) -> None:
        """One after the other as far as the store is concerned, all on their way at once."""
        started = [one for one in batch if isinstance(one, Started)]
        ended = [one for one in batch if isinstance(one, Ended)]
        steps: list[Awaitable[None]] = []
        if started:
            steps.append(self._repeated(lambda: self._start(started)))
        if ended:
            steps.append(self._repeated(lambda: self._end(ended)))
        steps += [self._repeated(lambda one=one: self._release(one)) for one in batch if isinstance(one, GivenBack)]  # type: ignore[misc]
        if len(steps) == 1:
            await steps[0]
        else:
            await asyncio.gather(*steps)

    async def _repeated(self, step: Callable[[], Awaitable[None]]) -> None:
        """Takes a step until the store has answered: a report must not be lost because the store was away."""
        while True:
            try:
                await step()
                return
            except FleetError as error:
                if error.reason != "STORE_UNAVAILABLE":
                    _log.warning("report not taken", node_id=self._node_id, reason=error.reason, detail=error.detail)
                    return
            await asyncio.sleep(self._repeat_seconds)

    async def _start(self, started: Sequence[Started]) -> None:
        records = await self._jobs.started_many([(one.job_id, one.token) for one in started])
        for one, record in zip(started, records, strict=True):
            if record is None:
                self._unwanted(one.job_id, one.token)

    async def _release(self, one: GivenBack) -> None:
        await self._jobs.release(one.job_id, one.token, stopped=one.stopped, session=one.session)
        self._given_back()

    async def _end(self, ended: list[Ended]) -> None:
        """What has been settled is taken from the list, so that only the rest is repeated."""
        outcomes = await self._completions.settle_many(self._node_id, ended)
        away: FleetError | None = None
        for one, outcome in zip(tuple(ended), outcomes, strict=True):
            if not isinstance(outcome, FleetError):
                self._settled(one.complete, outcome)
            elif outcome.reason == "STORE_UNAVAILABLE":
                away = outcome
                continue
            else:
                _log.warning("report not taken", node_id=self._node_id, reason=outcome.reason, detail=outcome.detail)
                self._refused(one.complete)
            ended.remove(one)
        if away is not None:
            raise away
