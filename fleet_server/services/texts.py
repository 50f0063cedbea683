"""Texts that language models write, as one listener is told of them: in order, each character once, all before the end.

Ticks are lossy, so a part may be missing, or come after the end has come from the store. The end has the whole text:
what follows a gap is held back, and what was not told is told right before the end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fleet.v1 import types_pb2

from fleet_server.services.mailbox import Happening

_JOBS = 1_000
_WAITS = types_pb2.JOB_STATUS_QUEUED
_RUNS = types_pb2.JOB_STATUS_RUNNING


@dataclass(slots=True)
class _Told:
    """So many characters of an attempt's text."""

    attempt: tuple[int, int]
    characters: int


class Texts:
    """One listener's. A listener that came in the middle of a text begins with the first part that it hears."""

    def __init__(self) -> None:
        self._told: OrderedDict[str, _Told] = OrderedDict()

    def in_order(self, happening: Happening) -> Sequence[Happening]:
        """What to tell the listener in this one's place."""
        event = happening.event
        if happening.kind == "job_progress" and event.job_progress.HasField("text"):
            return (self._continued(happening, event.job_progress),)
        if happening.kind == "job_update" and event.job_update.job_type == types_pb2.JOB_TYPE_LLM_INFERENCE:
            self._begun(event.job_update)
        elif happening.kind == "job_complete" and event.job_complete.job_type == types_pb2.JOB_TYPE_LLM_INFERENCE:
            return (*self._rest(happening, event.job_complete), happening)
        return (happening,)

    def _begun(self, job: types_pb2.Job) -> None:
        """The listener hears all of the attempt that runs, or that comes."""
        if job.status in (_WAITS, _RUNS):
            self._keep(job.job_id, _Told((job.generation, job.attempt + (job.status == _WAITS)), 0))

    def _keep(self, job_id: str, told: _Told) -> None:
        self._told[job_id] = told
        self._told.move_to_end(job_id)
        if len(self._told) > _JOBS:
            self._told.popitem(last=False)

    def _continued(self, happening: Happening, progress: types_pb2.JobProgress) -> Happening:
        attempt = (progress.generation, progress.attempt)
        told = self._told.get(progress.job_id)
        if told is None or told.attempt != attempt:
            told = _Told(attempt, progress.text_offset if told is None else 0)
            self._keep(progress.job_id, told)
        if told.characters == progress.text_offset:
            told.characters += len(progress.text)
            return happening
        event = types_pb2.Event()
        event.CopyFrom(happening.event)
        news = "" if progress.text_offset > told.characters else progress.text[told.characters - progress.text_offset :]
        if news:
            event.job_progress.text, event.job_progress.text_offset = news, told.characters
            told.characters += len(news)
        else:
            event.job_progress.ClearField("text")
            event.job_progress.ClearField("text_offset")
        return replace(happening, event=event)

    def _rest(self, happening: Happening, job: types_pb2.Job) -> Sequence[Happening]:
        told = self._told.pop(job.job_id, None)
        attempt = (job.generation, job.attempt)
        characters = told.characters if told is not None and told.attempt == attempt else 0
        text = job.result.text[characters:]
        if not text:
            return ()
        event = types_pb2.Event(time=happening.event.time)
        progress = event.job_progress
        progress.job_id, progress.progress, progress.text, progress.text_offset = job.job_id, 100, text, characters
        progress.generation, progress.attempt = attempt
        if job.HasField("node_id"):
            progress.node_id = job.node_id
        return (replace(happening, event=event, kind="job_progress", id="", version=0),)
