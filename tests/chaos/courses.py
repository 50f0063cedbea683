"""What is done to a job in ambush, step by step, so that a late report meets each state that has a guard.

Chance lets few reports come late, and hardly any while their job runs elsewhere: here it is certain. Faults go on
meanwhile and may spoil a course; then another job begins it anew.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from fleet.v1 import node_pb2 as pb

from tests.chaos.ambush import SILENCE, WORD, Ambushes, Attempt
from tests.chaos.checker import ENDED
from tests.chaos.client import Client
from tests.chaos.history import Call, Outcome

CLUSTER = "ambush"
"""Of its own, so that it can be paused and nobody else waits."""
COURSE_SECONDS = 100.0
ANSWER_SECONDS = 2.0
LOOK_SECONDS = 0.1
PARTS = {
    "failure queued": "failure",
    "failure elsewhere": "failure",
    "failure ended": "failure",
    "success elsewhere": "success",
    "success ended": "success",
    "success retried": "success",
    "success cancelled": "success",
    "success queued": "recovery",
    "exclusive silence": "silence",
}
"""A report and the state in which its job is when it comes, by the course that it is part of: queued again, running
with another token, ended by another attempt, in its next generation, cancelled while the report was on its way. A
success that finds its job queued is taken: the work is done, and nobody else has begun it. An exclusive job whose node
says nothing for a part of its lease runs on, there alone."""
PROMPTS = {
    "failure": "work:250 fail-1",
    "success": "work:250 fail-2",
    "recovery": "work:250",
    "silence": f"{SILENCE} work:2000",
}
SILENT_SECONDS = 4.0
"""Half of the time for which the server leaves an exclusive job to a node of which it hears nothing."""
TAKEN = "success queued"
LONG = frozenset(PARTS)
SHORT = LONG - {TAKEN}

Job = dict[str, Any]


class Courses:
    """Goes through them with one caller's calls. `met` counts which late report met which state, and was answered;
    `taken` are those that were taken and must not be."""

    def __init__(self, client: Client, ambushes: Ambushes, wanted: frozenset[str]) -> None:
        self._client = client
        self._ambushes = ambushes
        self._wanted = wanted
        self.met: Counter[str] = Counter()
        self.taken: list[str] = []

    @property
    def missing(self) -> frozenset[str]:
        return self._wanted - set(self.met)

    async def run(self) -> None:
        """Until nothing is missing, or it is known that a guard is."""
        async with asyncio.TaskGroup() as beside:
            beside.create_task(self._all(("silence",)))
            beside.create_task(self._all(("failure", "success", "recovery")))

    async def _all(self, courses: tuple[str, ...]) -> None:
        while any(PARTS[one] in courses for one in self.missing):
            for course in courses:
                if self.taken:
                    return
                if any(PARTS[one] == course for one in self.missing):
                    await self._one(course)

    async def _one(self, course: str) -> None:
        apart = course in ("failure", "recovery")
        job_id = await self._client.ambushed(
            f"{WORD} {PROMPTS[course]}",
            max_retries=int(course != "success"),
            cluster=CLUSTER if apart else None,
            exclusive=course == "silence",
        )
        steps = {
            "failure": self._failure,
            "success": self._success,
            "recovery": self._recovery,
            "silence": self._silence,
        }[course]
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(steps(job_id), COURSE_SECONDS)
        finally:
            self._ambushes.open(job_id)
            if apart:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._resume(), COURSE_SECONDS)

    async def _resume(self) -> None:
        await self._client.insist("resume", "/api/queue/resume", body={"target_cluster": CLUSTER})

    async def _success(self, job_id: str) -> None:
        """Lost and run elsewhere, where it fails; retried, and cancelled when it has been done once more. What has
        failed is not to be cancelled, what was cancelled not to be retried."""
        old = await self._caught(job_id)
        await self._late(old, "elsewhere", await self._elsewhere(job_id, old))
        self._ambushes.open(job_id)
        ended = await self._job(job_id, lambda job: job["status"] in ENDED)
        await self._late(old, "ended", ended)
        if ended["status"] != "failed":
            return
        self._ambushes.hold(job_id)
        await self._insist("cancel", job_id)
        await self._insist("retry", job_id)
        again = await self._job(job_id, lambda job: job["generation"] > old.generation)
        await self._late(old, "retried", again)
        new = await self._caught(job_id, old.generation + 1)
        cancel = await self._insist("cancel", job_id)
        if cancel.outcome is Outcome.OK:
            await self._late(new, "cancelled", cancel.reply)
        await self._insist("retry", job_id)

    async def _failure(self, job_id: str) -> None:
        """Lost and held back in the queue; then run elsewhere, where it succeeds: not to be cancelled nor retried."""
        old = await self._caught(job_id)
        await self._late(old, "queued", await self._paused(job_id))
        await self._resume()
        await self._late(old, "elsewhere", await self._elsewhere(job_id, old))
        self._ambushes.open(job_id)
        await self._late(old, "ended", await self._job(job_id, lambda job: job["status"] in ENDED))
        await self._insist("cancel", job_id)
        await self._insist("retry", job_id)

    async def _silence(self, job_id: str) -> None:
        """Its node says nothing for a while once it has begun."""
        attempt = await self._caught(job_id)
        for _ in range(int(SILENT_SECONDS / LOOK_SECONDS)):
            await asyncio.sleep(LOOK_SECONDS)
            last = self._ambushes.of(job_id)[-1]
            if 0 < last.given - attempt.renewed < SILENT_SECONDS:
                self.taken.append(f"{job_id} is exclusive and was given away while its node may have been running it")
                break
        self._ambushes.open(job_id)
        await self._job(job_id, lambda job: job["status"] in ENDED)
        self.met["exclusive silence"] += 1

    async def _recovery(self, job_id: str) -> None:
        """Lost and held back in the queue, where its result finds it."""
        old = await self._caught(job_id)
        await self._late(old, "queued", await self._paused(job_id))

    # Steps.

    async def _insist(self, what: str, job_id: str) -> Call:
        return await self._client.insist(what, f"/api/queue/jobs/{{}}/{what}", job_id)

    async def _caught(self, job_id: str, generation: int = 1) -> Attempt:
        """An attempt whose report is held."""
        while True:
            for attempt in self._ambushes.of(job_id):
                if attempt.held and attempt.generation == generation:
                    return attempt
            await asyncio.sleep(LOOK_SECONDS / 5)

    async def _elsewhere(self, job_id: str, old: Attempt) -> Job:
        """The job, running in an attempt that is not the old one."""

        def elsewhere(job: Job) -> bool:
            new = self._ambushes.of(job_id)[-1]
            return new is not old and job["status"] == "running" and job["node_id"] == new.node_id != old.node_id

        return await self._job(job_id, elsewhere)

    async def _paused(self, job_id: str) -> Job:
        """The job, queued and held back."""
        await self._client.insist("pause", "/api/queue/pause", body={"target_cluster": CLUSTER})
        return await self._job(job_id, lambda job: job["status"] == "queued")

    async def _job(self, job_id: str, wanted: Callable[[Job], bool]) -> Job:
        """The job, as soon as it is as wanted."""
        while True:
            call = await self._client.call("get", "GET", "/api/queue/jobs/{}", job_id)
            if call.outcome is Outcome.OK and wanted(call.reply):
                reply: Job = call.reply
                return reply
            await asyncio.sleep(LOOK_SECONDS)

    async def _late(self, attempt: Attempt, state: str, before: Job) -> None:
        """The report arrives, again until it is answered. It has met the state if that is the same afterwards, or if
        the report has changed it; and what runs elsewhere must have been lost before, and not just given back."""
        while not attempt.answers.empty():
            attempt.answers.get_nowait()
        if attempt.held:
            attempt.free.set()
        else:
            await self._ambushes.say_again(attempt)
        while (answer := await _answer(attempt)) is None:
            await self._ambushes.say_again(attempt)
        kind = "failure" if attempt.report is not None and attempt.report.HasField("error") else "success"
        met = f"{kind} {state}"
        if answer == pb.CompleteOutcome.COMPLETE_OUTCOME_OK:
            self.met[met] += 1
            if met != TAKEN and not attempt.forgotten:
                self.taken.append(f"{before['job_id']} took a late {met}")
        elif answer != pb.CompleteOutcome.COMPLETE_OUTCOME_REFUSED or (state == "elsewhere" and not _lost(before)):
            return
        elif _place(before, state) == _place(await self._job(before["job_id"], lambda _: True), state):
            self.met[met] += 1


async def _answer(attempt: Attempt) -> pb.CompleteOutcome.ValueType | None:
    with contextlib.suppress(TimeoutError):
        return await asyncio.wait_for(attempt.answers.get(), ANSWER_SECONDS)
    return None


def _lost(job: Job) -> bool:
    return any(attempt["error"]["reason"] == "NODE_LOST" for attempt in job["attempts"])


def _place(job: Job, state: str) -> tuple[Any, ...]:
    if state == "retried":
        return job["generation"], job["status"] in ENDED
    return job["generation"], job["status"], job["attempt"], job["node_id"]
