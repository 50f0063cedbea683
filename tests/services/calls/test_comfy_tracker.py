"""What the clients of a prompt are told when frames of its node and events of its job cross."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fleet.v1 import types_pb2

from fleet_server.services import comfy_tracker
from fleet_server.services.comfy_tracker import ComfyTracker, Live
from fleet_server.services.frames import Frame, FrameHub
from tests.services.calls.desk import Desk
from tests.waiting import wait_until

JOB = "0198f2c4-7a1e-7c3b-9d52-3f0e8a6b1c2d"


class Heard:
    """Who passes it on: here, to nobody."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def listens(self) -> bool:
        return True

    def status(self, remaining: int, *, but: tuple[str, str] | None = None) -> None:
        self.kinds.append("status")

    def frame(self, live: Live, kind: str, text: str) -> None:
        self.kinds.append(kind)

    def binary(self, live: Live, data: bytes) -> None:
        self.kinds.append("binary")

    def end(self, owner: str, client_id: str, job_id: str, texts: Sequence[str]) -> None:
        self.kinds.append("end")


def _tracker(heard: Heard, store: Any = None, job_id: str = JOB) -> ComfyTracker:
    # Events are not asked for what is looked at here, and the store for ends alone.
    nothing: Any = None
    tracker = ComfyTracker(store, nothing, FrameHub(), heard, clock=lambda: 0)
    tracker.expect(job_id, owner="ann", client_id="c1")
    tracker.accepted(job_id)
    return tracker


def _event(status: types_pb2.JobStatus.ValueType, attempt: int) -> types_pb2.Event:
    kind = types_pb2.JOB_TYPE_IMAGE_GEN
    return types_pb2.Event(job_update=types_pb2.Job(job_id=JOB, job_type=kind, status=status, attempt=attempt))


def _frame(kind: str, job_id: str = JOB, *, relayed: bool = False, **data: object) -> Frame:
    return Frame(job_id, "n1", json.dumps({"type": kind, "data": {"prompt_id": job_id, **data}}), relayed=relayed)


async def test_a_frame_overtakes_the_event_of_the_submit() -> None:
    heard = Heard()
    tracker = _tracker(heard)
    live = tracker.live(JOB)
    assert live is not None and not live.at_work
    tracker._on_frame(_frame("execution_start"))
    assert live.at_work, "who has heard so may stop it"
    await tracker._on_event(_event(types_pb2.JOB_STATUS_QUEUED, 0))
    await tracker._on_event(_event(types_pb2.JOB_STATUS_RUNNING, 1))
    assert heard.kinds == ["status", "status", "execution_start"]
    assert live.running
    assert [kind for kind, _ in live.messages] == ["execution_start"]


async def test_what_a_lost_attempt_told_is_void() -> None:
    for told_of_its_start in (True, False):
        heard = Heard()
        tracker = _tracker(heard)
        tracker._on_frame(_frame("execution_start"))
        if told_of_its_start:
            await tracker._on_event(_event(types_pb2.JOB_STATUS_RUNNING, 1))
        await tracker._on_event(_event(types_pb2.JOB_STATUS_QUEUED, 1))
        live = tracker.live(JOB)
        assert live is not None and not live.at_work and live.messages == []
        # The second attempt; its start is told once more.
        tracker._on_frame(_frame("execution_start"))
        await tracker._on_event(_event(types_pb2.JOB_STATUS_QUEUED, 1))
        assert heard.kinds == ["status", "status", "execution_start", "status", "status", "execution_start"]
        assert len(live.messages) == 1


@pytest.mark.parametrize("lost", [False, True])
async def test_an_end_waits_for_the_frames_of_another_replica(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    heard = Heard()
    await desk.add_node()
    job_id = await desk.submit()
    tracker = _tracker(heard, desk.store, job_id)
    live = tracker.live(job_id)
    assert live is not None
    await desk.complete(await desk.start())
    tracker._on_frame(_frame("execution_start", job_id, relayed=True))
    monkeypatch.setattr(comfy_tracker, "_RELAYED_SECONDS", 0.01 if lost else 600)
    if lost:
        spec = types_pb2.JobSpec(payload=types_pb2.Payload(workflow=types_pb2.WorkflowPayload(workflow_json="{}")))
        await tracker._ended(replace(await desk.record(job_id), spec=spec.SerializeToString()))
        assert heard.kinds[-2:] == ["status", "end"]
        return
    ending = asyncio.create_task(tracker._ended(await desk.record(job_id)))
    await wait_until(lambda: live.said_end._waiters or ending.done())
    tracker._on_frame(_frame("executed", job_id, relayed=True, node="2", output={}))
    tracker._on_frame(_frame("execution_success", job_id, relayed=True))
    await ending
    assert heard.kinds[-3:] == ["executed", "status", "end"]


async def test_frames_that_another_replica_passed_on_before_the_prompt_was_known_are_told(desk: Desk) -> None:
    heard = Heard()
    tracker = _tracker(heard, desk.store)
    job_id = await desk.submit()
    await desk.store.comfy.begin(job_id, 1, owner="ann", client_id="c1")
    before = len(heard.kinds)
    for other in (job_id, "another", job_id):
        tracker._on_frame(_frame("execution_start" if other == job_id else "executed", other, relayed=True))
    tracker._on_frame(_frame("executing", job_id, node="1"))
    assert len(heard.kinds) == before, "of a prompt that is not known nothing is told"
    await tracker._look_again()
    assert heard.kinds[before:] == ["status", "execution_start", "execution_start"]
    assert [frame.job_id for frame in tracker._early] == ["another"]
