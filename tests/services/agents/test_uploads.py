"""Outputs on their way from an agent to the disk, over gRPC."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import grpc
import pytest
from fleet.v1 import node_pb2 as pb
from fleet.v1 import node_pb2_grpc

from fleet_server.services.uploads import output_name
from fleet_server.storage.outputs import OutputLimits
from fleet_server.store import Store
from tests.services.agents.agent import ScriptedAgent, wait_until
from tests.services.agents.bench import Bench, bench_on

PICTURE = bytes(range(256)) * 200


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(one.name for one in folder.iterdir())


async def begun(bench: Bench) -> tuple[ScriptedAgent, pb.Assign]:
    agent = bench.agent()
    await agent.dial()
    await bench.submit()
    return agent, await agent.start()


async def test_the_receipt_names_what_is_on_the_disk(bench: Bench) -> None:
    agent, assign = await begun(bench)
    receipt = await agent.upload(assign, PICTURE)
    assert receipt.filename == output_name(assign.token, 0, "image/png")
    assert receipt.filename.endswith(".png") and len(receipt.filename) == 36
    assert (receipt.size_bytes, receipt.sha256) == (len(PICTURE), hashlib.sha256(PICTURE).hexdigest())
    assert await bench.outputs.read(receipt.filename) == PICTURE


async def test_the_same_upload_gives_the_same_receipt(bench: Bench) -> None:
    agent, assign = await begun(bench)
    first = await agent.upload(assign, PICTURE)
    assert await agent.upload(assign, PICTURE) == first
    together = await asyncio.gather(*(agent.upload(assign, PICTURE) for _ in range(5)))
    assert all(receipt == first for receipt in together)
    other = await agent.upload(assign, PICTURE, index=1)
    assert other.filename != first.filename
    assert await bench.outputs.read(first.filename) == PICTURE


async def test_an_upload_cut_half_way_is_repeated(bench: Bench, short_path: Path) -> None:
    agent, assign = await begun(bench)
    with pytest.raises(asyncio.CancelledError):
        await agent.upload(assign, PICTURE, cut_after=20_000)
    await wait_until(lambda: names(short_path / "outputs") == [])
    receipt = await agent.upload(assign, PICTURE)
    assert await bench.outputs.read(receipt.filename) == PICTURE


@pytest.mark.parametrize(
    "change",
    [
        {"size_bytes": len(PICTURE) - 1},
        {"size_bytes": len(PICTURE) + 1},
        {"sha256": "0" * 64},
        {"sha256": "x"},
        {"index": -1},
    ],
)
async def test_a_wrong_header_is_refused(bench: Bench, short_path: Path, change: dict[str, object]) -> None:
    agent, assign = await begun(bench)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await agent.upload(assign, PICTURE, **change)  # type: ignore[arg-type]
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert names(short_path / "outputs") == []


async def test_chunks_without_a_header_are_refused(bench: Bench) -> None:
    agent, _ = await begun(bench)
    call = node_pb2_grpc.NodeStub(agent._channel).UploadOutput(iter([pb.UploadOutputRequest(chunk=b"x")]))
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "header" in (refusal.value.details() or "")


@pytest.mark.parametrize("token", ["", "guessed"])
async def test_a_token_that_is_not_the_jobs_is_refused(bench: Bench, short_path: Path, token: str) -> None:
    agent, assign = await begun(bench)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await agent.upload(pb.Assign(job_id=assign.job_id, token=token), PICTURE)
    expected = grpc.StatusCode.FAILED_PRECONDITION if token else grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.value.code() is expected
    assert names(short_path / "outputs") == []


async def test_an_unknown_job_is_not_found(bench: Bench) -> None:
    agent, assign = await begun(bench)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await agent.upload(pb.Assign(job_id="nobody", token=assign.token), PICTURE)
    assert refusal.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_lost_attempt_may_upload_while_the_job_waits_and_not_after_a_new_claim(bench: Bench) -> None:
    agent, assign = await begun(bench)
    await agent.send(goodbye=pb.AgentGoodbye())
    await wait_until(lambda: bench.fleet.nodes()[0].draining)
    await bench.store.jobs.release(assign.job_id, assign.token)
    await agent.upload(assign, PICTURE)
    other = bench.agent("agx1")
    await other.dial()
    await other.take()
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await agent.upload(assign, PICTURE, index=1)
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_an_ended_job_takes_no_more_outputs(bench: Bench) -> None:
    agent, assign = await begun(bench)
    await agent.complete(assign)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await agent.upload(assign, PICTURE)
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_full_disk_is_said_at_once(store: Store, short_path: Path) -> None:
    async with bench_on(store, short_path, limits=OutputLimits(reserve_bytes=1 << 60)) as bench:
        agent, assign = await begun(bench)
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await agent.upload(assign, PICTURE)
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "full" in (refusal.value.details() or "")


def test_names_are_stable_and_unlike() -> None:
    assert output_name("t", 0, "image/png") == output_name("t", 0, "IMAGE/PNG; q=1")
    names = {output_name(token, index, "x/y") for token in ("a", "b", "a:1") for index in range(20)}
    assert len(names) == 60
    assert all(name.endswith(".bin") for name in names)
