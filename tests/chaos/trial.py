"""One trial: a world, callers, the nemesis, then peace until every accepted job has ended, then the record."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.chaos.checker import ENDED, violations
from tests.chaos.client import SMALL, Client
from tests.chaos.courses import LONG, SHORT, Courses
from tests.chaos.history import History, Outcome, read_runs
from tests.chaos.nemesis import Nemesis, plan
from tests.chaos.receiver import Receiver
from tests.chaos.world import World
from tests.waiting import wait_until

SETTLE_SECONDS, MUTANT_SECONDS = 300.0, 60.0
"""How long the end is waited for, and late reports that have not come yet. A mutant may never come to them."""
LOOK_SECONDS = 0.2
LONG_SECONDS = 25.0
CALLERS = 3
KILLS = 4
"""The server, the store, an agent, an engine."""
LOSSES = 2
"""One for each job in ambush that goes on elsewhere."""
REFUSED = 7
"""One for each late report that is not taken."""
PAGE = 1000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trial found. `counts` says how hard it was: kills, lost leases, refused late results; `missing` are the
    late reports that did not come."""

    violations: list[str]
    counts: Mapping[str, int]
    missing: frozenset[str] = frozenset()

    @property
    def hard_enough(self) -> bool:
        """Whether enough happened for the verdict to mean something. None of it depends on chance."""
        counts = self.counts
        return (
            counts["kills"] >= KILLS
            and counts["lost leases"] >= LOSSES
            and counts["refused results"] >= REFUSED
            and not self.missing
        )


async def trial(folder: Path, seed: int, seconds: float, *, code: Path | None = None) -> tuple[Verdict, History]:
    """Runs one; the same seed asks for the same things and breaks the same parts at the same moments."""
    history = History(seed)
    receiver = Receiver(seed)
    settle = SETTLE_SECONDS if code is None else MUTANT_SECONDS
    async with receiver.serving(), World(folder, seed=seed, code=code) as world:
        keeper = asyncio.create_task(world.keep(), name="keeper")
        *callers, special = [
            Client(world.server.url, history, seed * 100 + n, callback_url=receiver.url) for n in range(CALLERS + 1)
        ]
        courses = Courses(special, world.post.ambushes, LONG if seconds >= LONG_SECONDS else SHORT)
        late = asyncio.create_task(courses.run(), name="courses")
        try:
            await _trouble(world, callers, seed, seconds)
            world.heal()
            receiver.calm = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(late, settle)
            world.post.ambushes.open()
            await _peace(world, settle)
        finally:
            world.rest()
            late.cancel()
            await asyncio.gather(late, keeper, return_exceptions=True)
            for caller in (*callers, special):
                await caller.aclose()
        await world.revive()
        await _read(world, history)
        await _called_back(history, receiver, settle)
        history.hooks, history.forged = receiver.taken, receiver.forged
        history.orphans = world.leftovers()
        history.runs = read_runs(world.runs)
        history.seen, history.done, history.late = dict(world.post.seen), dict(world.done), dict(courses.met)
        history.assigned, history.taken = world.post.ambushes.assigned, courses.taken
    return Verdict(violations(history), _counts(history), courses.missing), history


async def _trouble(world: World, callers: list[Client], seed: int, seconds: float) -> None:
    faults = plan(seed, seconds, list(world.agents))
    tasks = [asyncio.create_task(caller.work()) for caller in callers]
    lead = 1.5
    stops = [fault.at for fault in faults if fault.what == "stop agent"]
    tasks += [asyncio.create_task(callers[0].occupy(max(0.0, at - lead))) for at in stops[:1]]
    one, other = random.Random(seed).sample(callers, 2)
    tasks += [asyncio.create_task(one.poison()), asyncio.create_task(other.exhaust())]
    try:
        await Nemesis(world, faults).run()
    finally:
        for task in tasks[:CALLERS]:
            task.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 15)
    for task in tasks:
        if task.done() and not task.cancelled() and task.exception() is not None:
            raise AssertionError("a caller broke down") from task.exception()


async def _peace(world: World, seconds: float) -> None:
    """Waits until all jobs have ended and the agents' spools are empty; a job that never ends is for the checker."""
    async with httpx.AsyncClient(base_url=world.server.url, timeout=5) as http:

        async def over() -> bool:
            with contextlib.suppress(httpx.HTTPError, KeyError):
                counts = (await http.get("/api/queue/stats")).json()["jobs"]
                waits = counts["queued"] + counts["running"]
                if not waits and not _spooled(world):
                    return True
            await asyncio.sleep(LOOK_SECONDS)
            return False

        with contextlib.suppress(AssertionError):
            await wait_until(over, seconds=seconds)


def _spooled(world: World) -> list[Path]:
    return [path for agent in world.agents.values() for path in (agent.folder / "spool" / "entries").glob("*")]


async def _read(world: World, history: History) -> None:
    """The server's own record, by its documented doors."""
    async with httpx.AsyncClient(base_url=world.server.url, timeout=60) as http:
        token = ""
        while True:
            page = (await http.get("/api/queue/jobs", params={"limit": PAGE, "page_token": token})).json()
            history.jobs.update({job["job_id"]: job for job in page["jobs"]})
            token = page["next_page_token"]
            if not token:
                break
        history.gallery = (await http.get("/api/vision/gallery", params={"limit": PAGE})).json()["images"]
        for job in history.jobs.values():
            for output in (job["result"] or {}).get("outputs", []):
                reply = await http.get(f"/api/vision/outputs/{output['filename']}")
                history.outputs[output["filename"]] = reply.text if reply.status_code == 200 else ""
        history.events = await _events(http, sum(job["status"] in ENDED for job in history.jobs.values()))


async def _called_back(history: History, receiver: Receiver, seconds: float) -> None:
    """Waits for the callbacks that are still due; one that never comes is for the checker."""
    jobs = [job for job in history.jobs.values() if job["callback_url"] and job["status"] in ENDED]
    due = {(job["job_id"], generation) for job in jobs for generation in range(1, job["generation"] + 1)}
    with contextlib.suppress(AssertionError):
        await wait_until(lambda: due <= receiver.ends(), seconds=seconds)


async def _events(http: httpx.AsyncClient, ended: int) -> list[dict[str, Any]]:
    """All events that are kept, up to a marker that this call puts behind them."""
    marker = (await http.post("/api/vision/generate", json={"prompt": "work:1", **SMALL})).json()
    events: list[dict[str, Any]] = []
    async with http.stream("GET", "/api/events", params={"since": "0"}) as reply:
        async for line in reply.aiter_lines():
            event = json.loads(line)
            if event["type"] in ("job_update", "job_complete"):
                if event["data"]["job_id"] == marker["job_id"]:
                    return events
                events.append(event)
    raise AssertionError(f"the stream of events ended before the marker, after {len(events)} of at least {ended}")


def _counts(history: History) -> dict[str, int]:
    attempts = [attempt for job in history.jobs.values() for attempt in job["attempts"]]
    return {
        "calls": len(history.calls),
        "unanswered": sum(call.outcome is Outcome.UNKNOWN for call in history.calls),
        "jobs": len(history.jobs),
        "runs": len(history.runs),
        "kills": sum(count for what, count in history.done.items() if what.startswith("kill")),
        "stops": sum(count for what, count in history.done.items() if what.startswith("stop")),
        "cuts and stalls": history.done.get("cut", 0) + history.done.get("stall", 0),
        "messages lost": history.seen.get("lost", 0),
        "messages doubled": history.seen.get("doubled", 0),
        "messages late": history.seen.get("delayed", 0),
        "callbacks": len(history.hooks),
        "lost leases": sum(attempt["error"]["reason"] == "NODE_LOST" for attempt in attempts),
        "refused results": history.seen.get("complete_outcome_refused", 0) + history.seen.get("refused_upload", 0),
        "late reports": sum(history.late.values()),
        "repeated results": history.seen.get("complete_outcome_already", 0),
    }
