"""Work that reads files, and exclusive work, on its way to an agent."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from fleet.v1 import node_pb2 as pb
from fleet.v1 import types_pb2

from fleet_server.domain.job import JobState
from fleet_server.services.nodes import now_ms
from fleet_server.store import OutputRow, Store
from tests.services.agents.agent import wait_until
from tests.services.agents.bench import QUICK, Bench, bench_on


async def output(bench: Bench, filename: str, job_id: str = "maker") -> str:
    """An output in the index; a reference to it."""
    record = types_pb2.Output(
        filename=filename, content_type="image/png", size_bytes=9, sha256="cd" * 32, job_id=job_id
    )
    await bench.store.outputs.put(OutputRow(filename, job_id, now_ms(), 9, record.SerializeToString()))
    return f"output:{filename}"


def starting_from(reference: str, **more: Any) -> dict[str, Any]:
    return {"payload": types_pb2.Payload(image_gen=types_pb2.ImagePayload(init_image=reference, **more))}


async def test_an_assign_names_the_files_that_its_payload_refers_to(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    reference = await output(bench, "a.png")
    mask = await output(bench, "m.png")
    await bench.submit(**starting_from(reference, mask_image=mask))
    assign = await agent.take()
    assert [(one.reference, one.filename) for one in assign.inputs] == [(reference, "a.png"), (mask, "m.png")]
    first = assign.inputs[0]
    assert (first.content_type, first.size_bytes, first.sha256) == ("image/png", 9, "cd" * 32)
    assert assign.payload.image_gen.init_image == reference


async def test_a_job_whose_file_is_gone_fails_for_good_and_frees_its_slot(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    reference = await output(bench, "a.png")
    await bench.store.outputs.delete("a.png")
    lost = await bench.submit(**starting_from(reference))

    async def failed() -> bool:
        return (await bench.job(lost)).state is JobState.FAILED

    await wait_until(failed)
    record = await bench.job(lost)
    error = types_pb2.JobError.FromString(record.error)
    assert (error.reason, error.code) == ("INPUT_NOT_FOUND", "NOT_FOUND")
    assert error.detail.startswith("payload.init_image: ")
    assert record.attempt == 1 and not [message for message in agent.heard if message.HasField("assign")]
    after = await bench.submit()
    assert (await agent.take()).job_id == after


async def test_a_job_that_is_cancelled_while_its_files_are_looked_for_does_not_go_out(
    bench: Bench, monkeypatch: Any
) -> None:
    agent = bench.agent()
    await agent.dial()
    reference = await output(bench, "a.png")
    go, looked = asyncio.Event(), asyncio.Event()
    whole = bench.store.outputs.get

    async def slow(filename: str) -> OutputRow | None:
        looked.set()
        await go.wait()
        return await whole(filename)

    monkeypatch.setattr(bench.store.outputs, "get", slow)
    job_id = await bench.submit(**starting_from(reference))
    await asyncio.wait_for(looked.wait(), 50)
    record = await bench.job(job_id)
    assert record.state is JobState.RUNNING and record.started_ms is None
    await bench.store.jobs.cancel(job_id)
    await bench.sessions.cancel_attempt(job_id, "agx0", record.token)
    await agent.next("cancel")
    go.set()
    await agent.send(stopped=pb.JobStopped(job_id=job_id, token=record.token))
    monkeypatch.undo()
    after = await bench.submit()
    assert (await agent.take()).job_id == after


async def test_exclusive_work_says_so(bench: Bench) -> None:
    agent = bench.agent(slots=2)
    await agent.dial()
    await bench.submit(exclusive=True)
    assert (await agent.take()).exclusive
    await bench.submit()
    assert not (await agent.take()).exclusive


async def test_exclusive_work_that_nobody_accepted_may_run_and_is_not_given_to_another(
    store: Store, short_path: Path
) -> None:
    async with bench_on(store, short_path, settings=replace(QUICK, accept_seconds=0.1)) as bench:
        silent, other = bench.agent("a"), bench.agent("b")
        await silent.dial()
        job_id = await bench.submit(exclusive=True)
        assign = (await silent.next("assign")).assign
        await other.dial()
        assert (await silent.next("cancel")).cancel.token == assign.token
        room = store.jobs._room

        async def owed() -> object:
            return await room.bulk.call("HGET", room.keys.job(job_id), "od")

        await wait_until(owed)
        record = await bench.job(job_id)
        assert (record.state, record.node_id, record.token) == (JobState.RUNNING, "a", assign.token)
