"""Prompts of ComfyUI's clients as jobs of the fleet: submit, queue, history, cancel."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleet.v1 import types_pb2

from fleet_server.domain.comfy_check import Error, refusal
from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobRecord, JobState, Priority
from fleet_server.protojson import dumps_exact
from fleet_server.services.comfy_tracker import ComfyTracker
from fleet_server.services.comfy_views import Prompt, is_prompt
from fleet_server.services.graphs import Graphs, Judged, fill, is_graph
from fleet_server.services.intake import Intake
from fleet_server.services.queue import JobQueue, not_theirs
from fleet_server.store import Store

Json = Any
_CHUNK = 200
_BREATH = 50


@dataclass(frozen=True, slots=True)
class Who:
    """Who asks: the name of the key's owner, "" without keys. `address` is where the call comes from."""

    owner: str = ""
    admin: bool = True
    address: str = ""

    @property
    def only(self) -> str | None:
        """Whose prompts alone they see; None: all."""
        return None if self.admin else self.owner


class RefusedPromptError(Exception):
    """A prompt that is not taken, in ComfyUI's own words: the body of the 400."""

    def __init__(self, error: Error, node_errors: Mapping[str, Json] | None = None) -> None:
        super().__init__(error["message"])
        self.body: dict[str, Json] = {"error": error, "node_errors": dict(node_errors or {})}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A body of POST /prompt, taken apart."""

    graph: dict[str, dict[str, Json]]
    extra: dict[str, Json]
    client_id: str
    prompt_id: str
    targets: tuple[str, ...] | None


class ComfyPrompts:
    """See the methods. Each raises STORE_UNAVAILABLE where the store is away."""

    def __init__(
        self,
        store: Store,
        queue: JobQueue,
        intake: Intake,
        graphs: Graphs,
        tracker: ComfyTracker,
        *,
        clock: Callable[[], int],
    ) -> None:
        self._store = store
        self._queue = queue
        self._intake = intake
        self._graphs = graphs
        self._tracker = tracker
        self._clock = clock

    async def submit(self, body: Json, who: Who) -> dict[str, Json]:
        """Takes a prompt; the reply of POST /prompt. When it returns the job is in the store.

        Raises RefusedPromptError, and QUEUE_FULL, DISK_FULL, SHUTTING_DOWN, NO_NODE (no ComfyUI is known at all).
        """
        number = await self._number(body)
        asked = _asked(body)
        judged = await self._graphs.judge(asked.graph, owner=who.owner, targets=asked.targets)
        if not judged.known:
            raise FleetError("NO_NODE", "no node with ComfyUI has joined yet: start one, or come again")
        if judged.verdict.error is not None:
            raise RefusedPromptError(judged.verdict.error, judged.verdict.node_errors)
        if asked.prompt_id and await self._store.jobs.get(asked.prompt_id) is not None:
            raise _used(asked.prompt_id)
        payload = self._payload(asked, judged, number)
        priority = await self._priority(body, number)
        admitted = self._intake.graph(payload, owner=who.owner, job_id=asked.prompt_id, priority=priority)
        job_id = admitted.job.job_id
        # Its place in the lists first: no prompt is ever missing there.
        await self._store.comfy.begin(job_id, self._clock(), owner=who.owner, client_id=asked.client_id)
        self._tracker.expect(job_id, owner=who.owner, client_id=asked.client_id, address=who.address)
        try:
            await self._queue.accept(admitted)
        except FleetError as error:
            if error.reason != "STORE_UNAVAILABLE":
                self._tracker.unexpect(job_id)
            if error.reason == "INVALID_FIELD" and asked.prompt_id:
                raise _used(asked.prompt_id) from error
            raise
        self._tracker.accepted(job_id)
        shown = int(number) if float(number).is_integer() else number
        return {"prompt_id": job_id, "number": shown, "node_errors": judged.verdict.node_errors}

    async def _number(self, body: Json) -> float:
        given = body.get("number") if isinstance(body, dict) else None
        if given is not None:
            try:
                return float(given)
            except (TypeError, ValueError, OverflowError):
                raise RefusedPromptError(refusal("invalid_prompt", "The number is none", str(given)[:100])) from None
        number = await self._store.comfy.next_number()
        return -number if isinstance(body, dict) and body.get("front") else number

    async def _priority(self, body: Mapping[str, Json], number: float) -> Priority:
        """Who asks to go before what waits already is urgent, who asks to go behind it is not."""
        if body.get("front") or number < 0:
            return Priority.HIGH
        if body.get("number") is None:
            return Priority.NORMAL
        following = await self._store.comfy.number()
        if number == following:
            return Priority.NORMAL
        return Priority.HIGH if number < following else Priority.LOW

    def _payload(self, asked: _Asked, judged: Judged, number: float) -> types_pb2.WorkflowPayload:
        payload = types_pb2.WorkflowPayload(
            workflow_json=dumps_exact(asked.graph),
            extra_data_json=dumps_exact(asked.extra) if asked.extra else "",
            prompt=types_pb2.ComfyPrompt(
                number=number,
                client_id=asked.client_id,
                output_node_ids=judged.verdict.outputs,
                targets=asked.targets or (),
                create_time_ms=self._clock(),
            ),
        )
        fill(payload, judged.needs, judged.inputs)
        return payload

    # Reading.

    async def get(self, job_id: str, who: Who) -> Prompt | None:
        """A prompt that the caller may see; None for what is none."""
        record = await self._store.jobs.get(job_id) if 0 < len(job_id) <= 128 and job_id.isprintable() else None
        if record is None or not is_prompt(record) or not_theirs(record, who.only):
            return None
        return Prompt(record)

    async def waiting(self, who: Who) -> tuple[list[Prompt], list[Prompt]]:
        """The prompts that run, and those that wait, the lowest number first."""
        job_ids = [job_id for job_id, _ in await self._store.comfy.open()]
        found = [prompt async for prompt in self._prompts(job_ids, who)]
        running = [prompt for prompt in found if prompt.record.state is JobState.RUNNING]
        pending = [prompt for prompt in found if prompt.record.state is JobState.QUEUED]
        pending.sort(key=lambda prompt: (prompt.said.number, prompt.record.created_ms))
        return running, pending

    async def history(self, who: Who, *, limit: int | None, offset: int | None) -> list[Prompt]:
        """Ended prompts, the oldest first: `limit` from place `offset` on, or the newest ones without it."""
        newest = offset is None
        skip = offset or 0
        found: list[Prompt] = []
        async for prompt in self._ended(who, newest=newest):
            if skip > 0:
                skip -= 1
                continue
            if limit is not None and len(found) >= limit:
                break
            found.append(prompt)
        return found[::-1] if newest else found

    async def in_history(self, prompt: Prompt) -> bool:
        """Whether the prompt has ended and was not taken out of the history."""
        return prompt.record.state.ended and (await self._store.comfy.in_history([prompt.prompt_id]))[0]

    async def everything(self, who: Who) -> list[Prompt]:
        """All prompts: those that wait, run and are in the history."""
        job_ids = [job_id for job_id, _ in await self._store.comfy.open()]
        found = {prompt.prompt_id: prompt async for prompt in self._prompts(job_ids, who)}
        async for prompt in self._ended(who, newest=True):
            found[prompt.prompt_id] = prompt
        return list(found.values())

    async def notes(self, prompts: Sequence[Prompt]) -> list[bytes | None]:
        """What was kept of prompts that were stopped, for each."""
        stopped = [one.prompt_id for one in prompts if one.record.state is JobState.CANCELLED]
        kept = dict(zip(stopped, await self._store.comfy.notes(stopped), strict=True))
        return [kept.get(one.prompt_id) for one in prompts]

    async def _ended(self, who: Who, *, newest: bool) -> AsyncIterator[Prompt]:
        first = 0
        while job_ids := await self._store.comfy.ended(first, _CHUNK, newest=newest):
            async for prompt in self._prompts(job_ids, who):
                # One that was retried is in the queue again, though not in ComfyUI's.
                if prompt.record.state.ended:
                    yield prompt
            first += _CHUNK

    async def _prompts(self, job_ids: Sequence[str], who: Who) -> AsyncIterator[Prompt]:
        for start in range(0, len(job_ids), _BREATH):
            for record in await self._store.jobs.get_many(job_ids[start : start + _BREATH]):
                if record is not None and is_prompt(record) and not not_theirs(record, who.only):
                    yield Prompt(record)

    # Stopping.

    async def cancel(self, job_ids: Iterable[str], who: Who, *, states: frozenset[JobState]) -> list[str]:
        """Cancels those of the prompts that are in one of the states and the caller's; which were."""
        done = []
        for job_id in job_ids:
            prompt = await self.get(job_id, who)
            if prompt is not None and prompt.record.state in states and await self._cancelled(prompt.record):
                done.append(job_id)
        return done

    async def clear(self, who: Who) -> None:
        """Cancels all that waits and is the caller's."""
        for prompt in (await self.waiting(who))[1]:
            await self._cancelled(prompt.record)

    async def forget(self, job_ids: Sequence[str], who: Who) -> None:
        """Takes prompts out of the history; the jobs stay as long as jobs are kept."""
        await self._store.comfy.hide([job_id for job_id in job_ids if await self.get(job_id, who) is not None])

    async def forget_all(self, who: Who) -> None:
        """Takes all of the caller's prompts out of the history."""
        await self._store.comfy.hide([prompt.prompt_id async for prompt in self._ended(who, newest=True)])

    async def _cancelled(self, record: JobRecord) -> bool:
        try:
            await self._queue.cancel(record.job_id)
        except FleetError as error:
            if error.reason in ("JOB_ENDED", "JOB_NOT_FOUND"):
                return False
            raise
        return True


def _asked(body: Json) -> _Asked:
    """Raises RefusedPromptError."""
    if not isinstance(body, dict) or body.get("prompt") is None:
        raise RefusedPromptError(refusal("no_prompt", "No prompt provided", "No prompt provided"))
    graph, extra = body["prompt"], body.get("extra_data")
    if not is_graph(graph):
        words = "The prompt must be an object of nodes, each with class_type and inputs"
        if graph == {}:
            raise RefusedPromptError(refusal("prompt_no_outputs", "Prompt has no outputs"))
        raise RefusedPromptError(refusal("invalid_prompt", words))
    extra = dict(extra) if isinstance(extra, dict) else {}
    client_id = body.get("client_id") or extra.pop("client_id", None) or ""
    extra.pop("client_id", None)
    targets = body.get("partial_execution_targets")
    return _Asked(
        graph,
        extra,
        client_id if isinstance(client_id, str) and len(client_id) <= 256 else "",
        _own_id(body.get("prompt_id")),
        tuple(str(one) for one in targets) if isinstance(targets, list) and targets else None,
    )


def _own_id(given: Json) -> str:
    """A client's id for its prompt, where it is a UUID as it is usually written; "": we make one."""
    if isinstance(given, str):
        try:
            return given if str(uuid.UUID(given)) == given else ""
        except ValueError:
            return ""
    return ""


def _used(prompt_id: str) -> RefusedPromptError:
    details = f"prompt_id {prompt_id} was used before: choose a new one, or leave it out"
    return RefusedPromptError(refusal("invalid_prompt_id", "The prompt_id is used", details))
