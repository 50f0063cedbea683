"""ComfyUI prompts that have not ended, and what their clients are told: frames as they come, each end once.

An end is told when the store has it, so that the history is there; what the node said of it is held back until then.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson
import structlog
from fleet.v1 import types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobRecord, JobState
from fleet_server.services.comfy_views import Prompt, end_message, history_entry, is_prompt, made_files, tagged_outputs
from fleet_server.services.events import EventHub
from fleet_server.services.frames import Frame, FrameHub
from fleet_server.services.mailbox import EventFilter
from fleet_server.services.words import type_word
from fleet_server.store import Store

_log = structlog.get_logger("fleet.comfy")
Json = Any

_KINDS = frozenset({"job_update", "job_complete"})
_GRAPH_TYPES = frozenset({types_pb2.JOB_TYPE_IMAGE_GEN, types_pb2.JOB_TYPE_VIDEO_GEN})
_TYPES = frozenset(map(type_word, _GRAPH_TYPES))
_ENDS = frozenset({"execution_success", "execution_error", "execution_interrupted"})
_KEPT = frozenset({"execution_start", "execution_cached"})
_STARTING_MS = 60_000
"""An id in the list whose job is not there yet is being submitted; after so long it never will be."""
_EARLY_FRAMES = 64
"""How many frames of prompts that this replica has not heard of yet are kept for when it has."""
_RELAYED_SECONDS = 1.0
"""How long an end waits for frames that another replica has yet to pass on."""


@dataclass(slots=True)
class Live:
    """A prompt that has not ended: who is told of it, and what they were told last."""

    job_id: str
    owner: str
    client_id: str
    address: str = ""
    """Where it was submitted from, if that was here."""
    running: bool = False
    told_waiting: bool = False
    told_running: bool = False
    attempts: int = 0
    """Those that it had had when it was last known to wait."""
    node_id: str = ""
    executing: str | None = None
    node: str | None = None
    progress_state: str | None = None
    finished: list[str] = field(default_factory=list)
    messages: list[Json] = field(default_factory=list)
    files: set[tuple[str, str, str]] = field(default_factory=set)
    """Name, folder and type, as its node named them, of what it has made so far."""
    end: tuple[str, str] | None = None
    """What the node said of the end: the type of the frame and its text."""
    relayed: bool = False
    """Its frames come from the replica that holds its node's stream."""
    said_end: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with `end`."""

    @property
    def at_work(self) -> bool:
        """Whether it runs, by the store's word or by that of its node, which is often heard first."""
        return self.running or self.told_running

    def begin_again(self) -> None:
        """The attempt was lost: what it told is void."""
        self.running = self.told_running = self.relayed = False
        self.said_end.clear()
        self.executing = self.node = self.progress_state = self.end = None
        self.finished, self.messages, self.files = [], [], set()

    def replay(self) -> list[str]:
        """What a client is told that comes back while the prompt runs."""
        return [text for text in (self.executing, self.progress_state) if text is not None]


class Audience(Protocol):
    """Who passes it on to clients. No method waits."""

    def listens(self) -> bool:
        """Whether there is any client now."""
        ...

    def status(self, remaining: int, *, but: tuple[str, str] | None = None) -> None:
        """To all (but one client, who is told with an end): so many prompts have not ended."""
        ...

    def frame(self, live: Live, kind: str, text: str) -> None:
        """A text frame of the prompt."""
        ...

    def binary(self, live: Live, data: bytes) -> None:
        """A binary frame of the prompt."""
        ...

    def end(self, owner: str, client_id: str, job_id: str, texts: Sequence[str]) -> None:
        """The prompt has ended; the texts are told once for each prompt, whoever tries."""
        ...


class ComfyTracker:
    """One for each replica; `run` has to be running. `failed(node_id)` is called when a prompt failed there."""

    def __init__(
        self,
        store: Store,
        hub: EventHub,
        frames: FrameHub,
        audience: Audience,
        *,
        clock: Callable[[], int],
        failed: Callable[[str], None] = lambda _: None,
        retry_seconds: float = 0.5,
    ) -> None:
        self._store = store
        self._hub = hub
        self._frames = frames
        self._audience = audience
        self._clock = clock
        self._failed = failed
        self._retry_seconds = retry_seconds
        self._open: dict[str, Live] = {}
        self._early: deque[Frame] = deque(maxlen=_EARLY_FRAMES)

    @property
    def remaining(self) -> int:
        """Prompts that wait or run."""
        return len(self._open)

    def live(self, job_id: str) -> Live | None:
        """What is known of a prompt that has not ended."""
        return self._open.get(job_id)

    def lives(self) -> list[Live]:
        """All prompts that have not ended, in no order."""
        return list(self._open.values())

    def expect(self, job_id: str, *, owner: str, client_id: str, address: str = "") -> None:
        """A prompt is being submitted here."""
        self._open.setdefault(job_id, Live(job_id, owner, client_id, address))

    def accepted(self, job_id: str) -> None:
        """It is in the store. Told at once: the event of it may come together with that of its start, as one."""
        live = self._open.get(job_id)
        if live is not None:
            self._tell_waiting(live)

    def unexpect(self, job_id: str) -> None:
        """It was refused."""
        self._open.pop(job_id, None)

    async def run(self) -> None:
        """Follows jobs and frames until cancelled."""
        stop = self._frames.subscribe(self._on_frame)
        try:
            while True:
                try:
                    # (The models of a graph are values in it.)
                    wanted = EventFilter(kinds=_KINDS, job_types=_TYPES, without_model=True, hurried=self._hurried)
                    async with aclosing(self._hub.watch(wanted, listening=self._look_again)) as events:
                        async for event in events:
                            await self._on_event(event)
                    return
                except FleetError as error:
                    if error.reason == "SHUTTING_DOWN":
                        return
                    _log.warning("prompts cannot be followed", detail=error.detail)
                    await asyncio.sleep(self._retry_seconds)
        finally:
            stop()

    def _hurried(self) -> bool:
        """Nobody waits for events where there is neither a prompt that has not ended nor a client."""
        return bool(self._open) or self._audience.listens()

    async def missed(self, owner: str, client_id: str) -> None:
        """Tells a client that has come of the ends that it has not been told of."""
        for job_id in await self._store.comfy.untold(owner, client_id):
            record = await self._store.jobs.get(job_id)
            if record is None:
                await self._store.comfy.told(owner, client_id, job_id)
            elif record.state.ended:
                await self._tell_end(record, Live(job_id, owner, client_id))

    # Jobs.

    async def _look_again(self) -> None:
        """The list of open prompts as the store has it."""
        listed = await self._store.comfy.open()
        for start in range(0, len(listed), 50):
            part = listed[start : start + 50]
            records = await self._store.jobs.get_many([job_id for job_id, _ in part])
            for (job_id, at), record in zip(part, records, strict=True):
                if record is None:
                    if self._clock() - at > _STARTING_MS:
                        await self._store.comfy.end(job_id, None)
                elif record.state.ended:
                    await self._ended(record)
                else:
                    self._know(record)
                    self._catch_up(record.job_id)

    def _know(self, record: JobRecord) -> Live:
        live = self._open.get(record.job_id)
        if live is None:
            live = self._open[record.job_id] = Live(record.job_id, record.owner, Prompt(record).said.client_id)
        live.running = record.state is JobState.RUNNING
        live.attempts = record.attempt - live.running
        live.told_waiting = True
        live.told_running = live.told_running or live.running
        live.node_id = record.node_id
        return live

    async def _on_event(self, event: types_pb2.Event) -> None:
        kind = event.WhichOneof("data")
        if kind == "gap":
            await self._look_again()
            return
        job = event.job_complete if kind == "job_complete" else event.job_update
        if job.job_type not in _GRAPH_TYPES or job.HasField("target_model"):
            return
        live = self._open.get(job.job_id)
        if live is None and not await self._store.comfy.is_open(job.job_id):
            return
        if kind == "job_complete":
            record = await self._store.jobs.get(job.job_id)
            if record is not None and record.state.ended:
                await self._ended(record)
        elif live is None:
            record = await self._store.jobs.get(job.job_id)
            if record is not None and not record.state.ended and is_prompt(record):
                self._know(record)
                self._audience.status(self.remaining)
                self._catch_up(job.job_id)
        else:
            self._moved(live, job)

    def _moved(self, live: Live, job: types_pb2.Job) -> None:
        if job.status == types_pb2.JOB_STATUS_RUNNING:
            live.running, live.node_id = True, job.node_id
            self._tell_running(live)
            return
        # Frames overtake events: that it waits may be said of the time before what its node has told already.
        if live.running or (live.told_running and job.attempt > live.attempts):
            live.begin_again()
            self._audience.status(self.remaining)
        live.attempts = job.attempt
        self._tell_waiting(live)

    def _tell_waiting(self, live: Live) -> None:
        if not live.told_waiting:
            live.told_waiting = True
            self._audience.status(self.remaining)

    def _tell_running(self, live: Live) -> None:
        """ComfyUI says how many remain when a prompt is taken up as well; once for each attempt."""
        self._tell_waiting(live)
        if not live.told_running:
            live.told_running = True
            self._audience.status(self.remaining)

    async def _ended(self, record: JobRecord) -> None:
        live = self._open.get(record.job_id)
        if live is not None and live.relayed and record.state is JobState.SUCCEEDED:
            # The store's word and the frames come on two ways; the node's own end is the last of the frames.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(live.said_end.wait(), _RELAYED_SECONDS)
        unstarted = record.state is JobState.CANCELLED and record.started_ms is None
        if record.state is JobState.CANCELLED and live is not None and live.messages:
            await self._store.comfy.note(record.job_id, _note(record, live))
        first = await self._store.comfy.end(record.job_id, None if unstarted else record.ended_ms)
        self._open.pop(record.job_id, None)
        if record.state is JobState.FAILED and record.node_id:
            self._failed(record.node_id)
        prompt = Prompt(record)
        whose = live or Live(record.job_id, record.owner, prompt.said.client_id)
        if unstarted:
            # ComfyUI says nothing of what was taken out of its queue, but how many remain.
            if whose.client_id:
                with contextlib.suppress(FleetError):
                    await self._store.comfy.told(whose.owner, whose.client_id, record.job_id)
            self._audience.status(self.remaining)
            return
        if first or live is not None:
            self._audience.status(self.remaining, but=(whose.owner, whose.client_id) if whose.client_id else None)
        if whose.client_id:
            await self._tell_end(record, whose)

    async def _tell_end(self, record: JobRecord, live: Live) -> None:
        kind, data = end_message(record)
        if live.end is not None and live.end[0] == kind:
            last = live.end[1]
        else:
            note = (await self._store.comfy.notes([record.job_id]))[0]
            told = history_entry(Prompt(record), note)["status"]["messages"]
            found = next((message for message in reversed(told) if message[0] == kind), None)
            last = _text(kind, found[1] if found else data)
        status = _text("status", {"status": {"exec_info": {"queue_remaining": self.remaining}}})
        over = _text("executing", {"node": None, "prompt_id": record.job_id})
        self._audience.end(live.owner, live.client_id, record.job_id, [last, status, over])

    # Frames.

    def _catch_up(self, job_id: str) -> None:
        """What another replica passed on of a prompt before the store's word of it came here."""
        early, self._early = self._early, deque(maxlen=_EARLY_FRAMES)
        for frame in early:
            if frame.job_id == job_id:
                self._on_frame(frame)
            else:
                self._early.append(frame)

    def _on_frame(self, frame: Frame) -> None:
        live = self._open.get(frame.job_id)
        if live is None:
            # Pictures of the first moments are not worth their memory.
            if frame.relayed and frame.text is not None:
                self._early.append(frame)
            return
        live.relayed = frame.relayed
        self._tell_running(live)
        if frame.text is None:
            self._audience.binary(live, frame.binary)
            return
        try:
            message = orjson.loads(frame.text)
            kind, data = message["type"], message.get("data") or {}
        except (ValueError, KeyError, TypeError):
            return
        self._on_text(live, kind, data, frame.text)

    def _on_text(self, live: Live, kind: str, data: dict[str, Json], text: str) -> None:
        if kind == "status" or (kind == "executing" and data.get("node") is None):
            # Ours are told instead: of the whole fleet, and when the store has the end.
            return
        if kind in _ENDS:
            live.end = (kind, text)
            live.said_end.set()
            return
        if kind in _KEPT:
            live.messages.append([kind, data])
        elif kind == "executing":
            live.executing, live.node = text, str(data["node"])
        elif kind == "progress_state":
            live.progress_state = text
            nodes = data.get("nodes") or {}
            live.finished = [node for node, state in nodes.items() if state.get("state") == "finished"]
        elif kind == "executed":
            live.files.update(made_files(data.get("output")))
            output = tagged_outputs({"": data.get("output")}, live.job_id)[""]
            text = _text(kind, {**data, "output": output})
        self._audience.frame(live, kind, text)


def _text(kind: str, data: Json) -> str:
    return orjson.dumps({"type": kind, "data": data}).decode()


def _note(record: JobRecord, live: Live) -> bytes:
    """The history of a prompt that was stopped while it ran, as its ComfyUI would have it."""
    node = live.node or ""
    graph = Prompt(record).graph
    kind, data = end_message(record)
    executed = [one for one in live.finished if one != node]
    data |= {"node_id": node, "node_type": (graph.get(node) or {}).get("class_type", ""), "executed": executed}
    status = {"status_str": "error", "completed": False, "messages": [*live.messages, [kind, data]]}
    return orjson.dumps({"outputs": {}, "status": status, "meta": {}})
