"""Callers that submit, cancel, retry and look while things break, and write down what they were told."""

from __future__ import annotations

import asyncio
import random
import uuid
from typing import Any

import httpx

from tests.chaos.history import Call, History, Outcome, now

CALL_SECONDS = 5.0
SMALL = {"width": 64, "height": 64, "steps": 1, "model": "chaos"}


class Client:
    """One caller; a seed decides what it asks for. Its calls go into the history in their order."""

    def __init__(self, url: str, history: History, seed: int, *, callback_url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=CALL_SECONDS)
        self._history = history
        self._random = random.Random(seed)
        self._callback_url = callback_url
        self._mine: list[str] = []

    async def aclose(self) -> None:
        await self._http.aclose()

    async def work(self) -> None:
        """Calls until cancelled."""
        while True:
            await self.step()
            await asyncio.sleep(self._random.uniform(0.01, 0.15))

    async def step(self) -> None:
        """One call, or one submit said until it is answered."""
        roll = self._random.random()
        if roll < 0.2 or not self._mine:
            await self._submit()
        elif roll < 0.35:
            await self.call("cancel", "POST", "/api/queue/jobs/{}/cancel", self._one())
        elif roll < 0.5:
            await self.call("retry", "POST", "/api/queue/jobs/{}/retry", self._one())
        else:
            await self.call("get", "GET", "/api/queue/jobs/{}", self._one())

    async def poison(self) -> None:
        """A job that takes its agent with it, wherever it runs."""
        await self._said([self._job("kill-agent work:100", max_retries=3)])

    async def occupy(self, seconds: float) -> None:
        """After so many seconds: long jobs for all agents, so that whatever then happens to one, it is at work."""
        await asyncio.sleep(seconds)
        await self._said([{**self._job("work:4500", max_retries=1), "priority": "high"} for _ in range(3)])

    async def exhaust(self) -> None:
        """A job that fails as often as it may."""
        await self._said([self._job("fail work:10", max_retries=2)])

    async def ambushed(self, prompt: str, *, max_retries: int, cluster: str | None, exclusive: bool = False) -> str:
        """A job that goes ahead of others, said twice and called back; its id."""
        job = {**self._job(prompt, max_retries), "priority": "high", "exclusive": exclusive}
        job["callback_url"] = self._callback_url
        (job_id,) = await self._said([{**job, "target_cluster": cluster} if cluster else job], again=True)
        return job_id

    async def insist(self, what: str, path: str, job_id: str = "", body: Any = None) -> Call:
        """A call, again until it is answered, well or with a refusal."""
        while True:
            call = await self._ask(what, "POST", path.format(job_id), job_id, "", body)
            if call.outcome is not Outcome.UNKNOWN:
                return call
            await asyncio.sleep(self._random.uniform(0.05, 0.3))

    def _one(self) -> str:
        return self._random.choice(self._mine[-40:])

    def _job(self, prompt: str, max_retries: int) -> dict[str, Any]:
        job: dict[str, Any] = {
            "job_type": "image_gen",
            "payload": {"prompt": prompt, "seed": self._random.randrange(1 << 32), **SMALL},
            "max_retries": max_retries,
            "timeout_seconds": 60,
            "priority": self._random.choice(["high", "normal", "normal", "low"]),
        }
        job["exclusive"] = self._random.random() < 0.2
        if self._random.random() < 0.5:
            job["callback_url"] = self._callback_url
        return job

    def _usual(self) -> dict[str, Any]:
        prompt = f"work:{self._random.choice([50, 200, 600, 1500])}"
        if self._random.random() < 0.15:
            prompt = "work:50 fail"
        return self._job(prompt, self._random.randrange(4))

    async def _submit(self) -> None:
        count = 1 if self._random.random() < 0.8 else self._random.randrange(2, 6)
        await self._said([self._usual() for _ in range(count)])

    async def _said(self, jobs: list[dict[str, Any]], *, again: bool = False) -> list[str]:
        """Submits under one request id, again and again until there is an answer; sometimes once more after that. The
        ids of the jobs."""
        request_id = uuid.UUID(int=self._random.getrandbits(128)).hex
        again = again or self._random.random() < 0.2
        while True:
            call = await self._ask(
                "submit", "POST", "/api/queue/jobs/batch", "", request_id, {"jobs": jobs, "request_id": request_id}
            )
            ids = [receipt["job_id"] for receipt in call.reply["jobs"]] if call.outcome is Outcome.OK else []
            self._mine += ids
            if call.outcome is not Outcome.UNKNOWN:
                if not again or call.outcome is Outcome.REFUSED:
                    return ids
                again = False
            await asyncio.sleep(self._random.uniform(0.05, 0.3))

    async def call(self, what: str, method: str, path: str, job_id: str) -> Call:
        """One call about a job, asked once."""
        return await self._ask(what, method, path.format(job_id), job_id, "", None)

    async def _ask(self, what: str, method: str, path: str, job_id: str, request_id: str, body: Any) -> Call:
        began = now()
        try:
            reply = await self._http.request(method, path, json=body)
            outcome = Outcome.OK if reply.status_code == 200 else Outcome.REFUSED
            if reply.status_code in (503, 504, 500):
                outcome = Outcome.UNKNOWN
            call = Call(what, job_id, request_id, began, now(), outcome, reply.status_code, reply.json())
        except httpx.HTTPError as error:
            call = Call(what, job_id, request_id, began, now(), Outcome.UNKNOWN, 0, repr(error))
        self._history.calls.append(call)
        return call
