"""The servicers behind the real doors: gRPC and the HTTP bridge on sockets, one chain behind both."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

import grpc
import httpx
import pytest
from fleet.v1 import (
    fleet_pb2,
    fleet_pb2_grpc,
    queue_pb2,
    queue_pb2_grpc,
    types_pb2,
    vision_pb2,
    vision_pb2_grpc,
)
from prometheus_client import CollectorRegistry

from fleet_server.bridge import Bridge
from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobState
from fleet_server.http import HttpServer, bind
from fleet_server.rpc.auth import KeyRing
from fleet_server.rpc.deadline import Deadline
from fleet_server.rpc.fleet import FleetServicer
from fleet_server.rpc.invoke import Invoker
from fleet_server.rpc.methods import Method, methods_of
from fleet_server.rpc.metrics import RpcMetrics
from fleet_server.rpc.queue import QueueServicer
from fleet_server.rpc.server import GrpcServer
from fleet_server.rpc.vision import VisionServicer
from fleet_server.services.model_desk import ModelDesk
from fleet_server.services.reruns import Reruns
from fleet_server.services.webhooks import Webhooks
from tests.services.calls.desk import ALIAS, Desk, picture
from tests.waiting import wait_until

SERVICES = [
    fleet_pb2.DESCRIPTOR.services_by_name["Fleet"],
    vision_pb2.DESCRIPTOR.services_by_name["Vision"],
    queue_pb2.DESCRIPTOR.services_by_name["Queue"],
]
JOB: dict[str, Any] = {"job_type": "image_gen", "payload": {"prompt": "a sea"}}


@dataclass
class Doors:
    """Both doors of a desk."""

    desk: Desk
    web: httpx.AsyncClient
    fleet: Any
    vision: Any
    queue: Any

    async def picture_job(self, data: bytes) -> str:
        """Makes one output; its filename."""
        await self.desk.submit()
        row = await self.desk.complete(await self.desk.start(), data)
        return row.filename


def check_key(key: str | None, context: object) -> None:
    """The key of these tests is "right"; none is fine."""
    if key not in (None, "right"):
        raise FleetError("API_KEY_INVALID", "api_key: is not a key of this server")


@pytest.fixture
async def doors(desk: Desk) -> AsyncIterator[Doors]:
    servicers = [
        FleetServicer(desk.board, desk.generation, desk.hub, check_key, desk.filing.calls),
        VisionServicer(
            desk.queue,
            desk.gallery,
            Reruns(desk.store, desk.queue, desk.catalog, desk.filing.resolver),
            desk.catalog,
            desk.nodes,
            cast(ModelDesk, None),
        ),
        QueueServicer(
            desk.queue,
            desk.hub,
            desk.board,
            Webhooks(desk.store.jobs, desk.store.webhooks, desk.bell.wake),
            explainer=desk.explainer,
            pauses=desk.pauses,
            dead=desk.dead,
        ),
    ]
    methods: list[Method] = []
    for service, servicer in zip(SERVICES, servicers, strict=True):
        methods += methods_of(service, servicer)
    keys = KeyRing([], clock=lambda: 0.0)
    invoker = Invoker(methods, keys=keys, metrics=RpcMetrics(CollectorRegistry(), methods))
    bridge = Bridge(SERVICES, invoker)
    http = HttpServer(bridge, bind("127.0.0.1", 0, "port"), 1.0)
    serving = asyncio.create_task(http.run())
    await http.started()
    grpc_server = GrpcServer(invoker)
    port = await grpc_server.start("127.0.0.1:0")
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{http.port}", timeout=60, trust_env=False) as web,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield Doors(
            desk, web, fleet_pb2_grpc.FleetStub(channel), vision_pb2_grpc.VisionStub(channel),
            queue_pb2_grpc.QueueStub(channel),
        )  # fmt: skip
    desk.hub.close()
    await bridge.shut_down()
    await grpc_server.stop(0)
    http.stop()
    await serving


async def test_connect_answers_exactly_as_documented(doors: Doors) -> None:
    expected = {
        "status": "connected",
        "message": "Successfully connected to Fleet Commander",
        "version": "1.0.0",
        "capabilities": ["nodes", "containers", "images", "generation", "ssh", "metrics", "vision"],
    }
    for reply in (
        await doors.web.get("/api/fleet/connect"),
        await doors.web.post("/api/fleet/connect", json={"api_key": "right"}),
        await doors.web.post("/api/fleet/connect"),
    ):
        assert (reply.status_code, reply.json()) == (200, expected)
    assert (await doors.web.post("/api/fleet/connect", json={"api_key": "wrong"})).status_code == 401
    assert (await doors.web.get("/api/fleet/connect?api_key=right")).status_code == 400
    assert (await doors.web.get("/health")).json() == {"status": "ok", "version": "1.0.0"}


async def test_generate_answers_bytes_and_headers(doors: Doors) -> None:
    await doors.desk.add_node()
    body = {"prompt": "a beautiful sunset over mountains", "negative_prompt": "blurry, bad quality", "width": 1024,
            "height": 1024, "steps": 20, "guidance_scale": 7.5, "seed": None}  # fmt: skip
    call = asyncio.create_task(doors.web.post("/api/fleet/generate", json=body))
    await doors.desk.in_line()
    claim = await doors.desk.start()
    listed = (await doors.web.get("/api/queue/jobs")).json()["jobs"]
    assert [job["job_id"] for job in listed] == [claim.job.job_id]
    data = picture(64, 64, "orange")
    row = await doors.desk.complete(claim, data)
    reply = await call
    assert (reply.status_code, reply.headers["content-type"], reply.content) == (200, "image/png", data)
    assert reply.headers["x-filename"] == row.filename and reply.headers["x-job-id"] == claim.job.job_id
    assert reply.headers["x-resolved-model"] == "sketch" and 0 <= int(reply.headers["x-seed"]) < 2**53 - 64


async def test_a_large_picture_rides_in_rest_but_not_in_grpc(doors: Doors) -> None:
    await doors.desk.add_node()
    data = bytes(3_200_000)
    for rest in (True, False):
        request: Any = {"prompt": "x", "model": "sketch"}
        if rest:
            call: Any = asyncio.create_task(doors.web.post("/api/fleet/generate", json=request))
        else:
            call = doors.fleet.Generate(fleet_pb2.FleetGenerateRequest(**request))
        await doors.desk.in_line()
        row = await doors.desk.complete(await doors.desk.start(), data)
        reply = await call
        if rest:
            assert reply.content == data and "x-resolved-model" not in reply.headers
            continue
        assert (reply.image.data, reply.image.content_type, reply.size_bytes) == (b"", "image/png", len(data))
        assert reply.filename == row.filename and not reply.HasField("resolved_model")
        headers = dict(await call.initial_metadata())
        assert headers["x-filename"] == row.filename and headers["x-seed"] == str(reply.seed)
        chunks = [chunk async for chunk in doors.vision.GetOutput(vision_pb2.GetOutputRequest(filename=row.filename))]
        assert b"".join(chunk.data for chunk in chunks) == data
        assert [chunk.content_type for chunk in chunks] == ["image/png"] + [""] * (len(chunks) - 1)


async def test_a_caller_who_hangs_up_cancels_over_both_doors(doors: Doors) -> None:
    await doors.desk.add_node()
    for rest in (True, False):
        if rest:
            call: Any = asyncio.create_task(doors.web.post("/api/fleet/generate", json={"prompt": "x"}))
        else:
            call = doors.fleet.Generate(fleet_pb2.FleetGenerateRequest(prompt="x"))
        await doors.desk.in_line()
        claim = await doors.desk.start()
        call.cancel()
        await cancelled(doors.desk, claim.job.job_id)


async def cancelled(desk: Desk, job_id: str) -> None:
    async with asyncio.timeout(50):
        async for event in desk.hub.watch_job(job_id):
            if event.HasField("job_complete"):
                assert event.job_complete.status == types_pb2.JOB_STATUS_CANCELLED


async def test_a_deadline_is_504_and_cancels_the_job(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    await doors.desk.add_node()
    begun: list[Deadline] = []
    enter = Deadline.__enter__

    def noted(self: Deadline) -> Deadline:
        begun.append(self)
        return enter(self)

    monkeypatch.setattr(Deadline, "__enter__", noted)
    call = asyncio.create_task(
        doors.web.post("/api/fleet/generate", json={"prompt": "x"}, headers={"Grpc-Timeout": "200S"})
    )
    await doors.desk.in_line()
    (deadline,) = [one for one in begun if one._seconds is not None and 100 < one._seconds <= 200]
    # It is over when the job is in line, however slow that was.
    deadline._expire()
    reply = await call
    assert (reply.status_code, reply.json()["reason"]) == (504, "TIMEOUT")
    counts = await doors.desk.store.jobs.counts()
    assert (counts[JobState.CANCELLED], counts[JobState.QUEUED]) == (1, 0)


async def test_without_a_node_generate_is_503_with_a_time_to_come_again(doors: Doors) -> None:
    reply = await doors.web.post("/api/fleet/generate", json={"prompt": "x"})
    assert (reply.status_code, reply.json()["reason"]) == (503, "NO_NODE") and int(reply.headers["retry-after"]) > 0
    status = (await doors.web.get("/api/fleet/generate/status")).json()
    assert status == {
        "status": "unavailable", "slots": 0, "slots_free": 0, "queued": 0, "running": 0, "eta_seconds": None, "jobs": []
    }  # fmt: skip


async def test_the_documented_queue_calls(doors: Doors) -> None:
    await doors.desk.add_node()
    sent = {"job_type": "image_gen", "priority": "high", "target_cluster": "vision", "max_retries": 3,
            "payload": {"prompt": "beautiful landscape", "width": 1024, "height": 1024}, "timeout_seconds": 3600,
            "callback_url": "https://your-app.com/webhook"}  # fmt: skip
    receipt = (await doors.web.post("/api/queue/jobs", json=sent)).json()
    assert receipt == {
        "job_id": receipt["job_id"], "status": "queued", "queue_position": 1, "target_model": ALIAS,
        "resolved_model": "sketch", "wait_reason": None,
    }  # fmt: skip
    job = (await doors.web.get(f"/api/vision/jobs/{receipt['job_id']}")).json()
    assert set(job) == {field.name for field in types_pb2.Job.DESCRIPTOR.fields}
    assert (job["priority"], job["payload"]["seed"] < 2**53, job["result"], job["owner"]) == ("high", True, None, None)
    cancelled_job = (await doors.web.delete(f"/api/queue/jobs/{receipt['job_id']}")).json()
    assert cancelled_job["status"] == "cancelled"
    assert cancelled_job["result"] == {
        "outputs": [], "text": None, "finish_reason": None, "segments": [], "usage": None, "exit_code": None
    }  # fmt: skip
    retried = await doors.web.post(f"/api/queue/jobs/{receipt['job_id']}/retry")
    assert (retried.status_code, retried.json()["reason"]) == (409, "JOB_NOT_FAILED")
    batch = (await doors.web.post("/api/queue/jobs/batch", json={"jobs": [JOB, JOB]})).json()
    assert [item["queue_position"] for item in batch["jobs"]] == [1, 2]
    bad = await doors.web.post("/api/queue/jobs/batch", json={"jobs": [JOB, {**JOB, "payload": {"steps": 1}}]})
    assert (bad.status_code, bad.json()["violations"][0]["field"]) == (400, "jobs[1].payload.prompt")
    keyed = [await doors.web.post("/api/queue/jobs", json=JOB, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert keyed[0].json()["job_id"] == keyed[1].json()["job_id"]
    stats = (await doors.web.get("/api/queue/stats")).json()
    assert (stats["jobs"]["queued"], stats["pauses"], stats["lanes"][0]["target_model"]) == (3, [], "sketch")


async def test_outputs_over_http(doors: Doors) -> None:
    await doors.desk.add_node()
    data = picture(300, 200, "green")
    path = f"/api/vision/outputs/{await doors.picture_job(data)}"
    whole = await doors.web.get(path)
    assert (whole.status_code, whole.content, whole.headers["content-type"]) == (200, data, "image/png")
    assert whole.headers["content-length"] == str(len(data)) and whole.headers["x-content-type-options"] == "nosniff"
    part = await doors.web.get(path, headers={"Range": "bytes=-10"})
    assert (part.status_code, part.content) == (206, data[-10:])
    assert part.headers["content-range"] == f"bytes {len(data) - 10}-{len(data) - 1}/{len(data)}"
    same = await doors.web.get(path, headers={"If-None-Match": whole.headers["etag"]})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", whole.headers["etag"])
    past = await doors.web.get(path, headers={"Range": "bytes=999999-"})
    assert (past.status_code, past.json()["reason"]) == (416, "RANGE_NOT_SATISFIABLE")
    head = await doors.web.head(path)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(data)), b"")
    small = await doors.web.get(f"{path}?width=64")
    assert (small.status_code, small.headers["content-type"], small.content[8:12]) == (200, "image/webp", b"WEBP")
    assert (await doors.web.get(f"{path}?width=15")).status_code == 400
    gallery = (await doors.web.get("/api/vision/gallery?limit=100")).json()
    assert gallery["images"][0]["metadata"]["prompt"] == "a sea" and gallery["next_page_token"] == ""
    assert (await doors.web.get(f"{path}/metadata")).json() == gallery["images"][0]
    gone = (await doors.web.delete(path)).json()
    assert gone["removed"] == ["local", "thumbnail", "index"] and gone["pending"] == []
    missing = await doors.web.get(path)
    never = await doors.web.get("/api/vision/outputs/nobody.png")
    assert missing.status_code == never.status_code == 404
    assert missing.json()["detail"] == never.json()["detail"]


async def test_lists_of_models_and_nodes_over_http(doors: Doors) -> None:
    await doors.desk.add_node("agx0", loras=["ink"], loaded=["sketch"])
    await doors.desk.add_node("llm0", models=[], job_types=[types_pb2.JOB_TYPE_LLM_INFERENCE])
    models = (await doors.web.get("/api/vision/models/available")).json()["models"]
    assert [(model["name"], model["alias_of"]) for model in models] == [(ALIAS, "sketch"), ("sketch", None)]
    loaded = (await doors.web.get("/api/vision/models/loaded")).json()["models"]
    assert [(model["node_id"], model["name"]) for model in loaded] == [("agx0", ALIAS), ("agx0", "sketch")]
    assert [lora["name"] for lora in (await doors.web.get("/api/vision/loras")).json()["loras"]] == ["ink"]
    nodes = (await doors.web.get("/api/vision/nodes")).json()["nodes"]
    assert [node["node_id"] for node in nodes] == ["agx0"]
    assert (await doors.web.get("/api/vision/nodes?status=down")).json()["nodes"] == []


async def test_events_over_http_go_on_from_the_last_id(doors: Doors) -> None:
    await doors.desk.add_node()
    job_id = await doors.desk.submit()
    await doors.desk.run_next()
    async with doors.web.stream("GET", f"/api/queue/jobs/{job_id}/events") as reply:
        (event,) = [json.loads(line) async for line in reply.aiter_lines()]
    assert (event["type"], event["data"]["job_id"], event["id"]) == ("job_complete", job_id, None)
    assert event["data"]["payload"] is None and event["data"]["result"]["outputs"]
    ids: list[str] = []
    url = "/api/events?since=0&type=job_update&type=job_complete"
    async with doors.web.stream("GET", url, headers={"Accept": "text/event-stream"}) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("id:"):
                ids.append(line[3:].strip())
                if len(ids) == 3:
                    break
    headers = {"Accept": "text/event-stream", "Last-Event-ID": ids[1]}
    async with doors.web.stream("GET", url, headers=headers) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("id:"):
                assert line[3:].strip() == ids[2]
                break
    await wait_until(lambda: not doors.desk.hub.listeners)
    missing = await doors.web.get("/api/queue/jobs/nobody/events")
    assert (missing.status_code, missing.json()["reason"]) == (404, "JOB_NOT_FOUND")


async def test_a_job_is_explained_and_a_dry_run_takes_the_body_of_a_submit(doors: Doors) -> None:
    await doors.desk.add_node()
    receipt = (await doors.web.post("/api/queue/jobs", json=JOB)).json()
    for base in ("/api/queue/jobs", "/api/vision/jobs"):
        reply = await doors.web.get(f"{base}/{receipt['job_id']}/explain")
        assert reply.status_code == 200
        explained = reply.json()
        assert (explained["job_id"], explained["queue_position"], explained["node_id"]) == (
            receipt["job_id"],
            1,
            "agx0",
        )
        assert explained["nodes"][0] == {
            "node_id": "agx0", "feasible": True, "reason": None, "detail": "model on its disk",
            "rank": 1, "load_seconds": 0.0, "eta_seconds": None,
        }  # fmt: skip
    dry = await doors.web.post("/api/queue/dry-run", json=JOB)
    assert dry.status_code == 200
    assert (dry.json()["job_id"], dry.json()["queue_position"]) == (None, 2)
    stats = (await doors.web.get("/api/queue/stats")).json()
    assert stats["jobs"]["queued"] == 1
    wrong = await doors.web.post("/api/queue/dry-run", json={**JOB, "payload": {"prompt": "x", "steps": 0}})
    assert (wrong.status_code, wrong.json()["violations"][0]["field"]) == (400, "payload.steps")
    missing = await doors.web.get("/api/queue/jobs/nobody/explain")
    assert (missing.status_code, missing.json()["reason"]) == (404, "JOB_NOT_FOUND")


async def test_a_quiet_stream_says_that_it_listens(doors: Doors) -> None:
    call = doors.fleet.WatchEvents(fleet_pb2.WatchEventsRequest())
    async with asyncio.timeout(50):
        await call.initial_metadata()
    assert doors.desk.hub.listeners
    call.cancel()
    await wait_until(lambda: not doors.desk.hub.listeners)
