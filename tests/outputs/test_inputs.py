"""Files that callers bring: received whole or not at all, kept for their time, read by agents wherever they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from fleet.v1 import command_pb2, fleet_pb2, types_pb2
from google.api import httpbody_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.input_uploads import InputSettings, InputUploads
from fleet_server.services.references import inputs_of, parse
from fleet_server.storage.buckets import LORAS, WORKSPACE
from fleet_server.store import InputRow, Store
from tests.outputs.world import HERE, World, now_ms, running, world_on
from tests.s3.embedded import EmbeddedProcess
from tests.store.making import submit
from tests.waiting import wait_until

DATA = os.urandom(2_500_000)


async def sent(
    data: bytes, filename: str = "talk.wav", content_type: str = "audio/wav", chunk: int = 300_000
) -> AsyncIterator[fleet_pb2.UploadInputRequest]:
    for at in range(0, max(1, len(data)), chunk):
        yield fleet_pb2.UploadInputRequest(
            filename=filename if not at else "",
            content=httpbody_pb2.HttpBody(content_type=content_type, data=data[at : at + chunk]),
        )


async def brought(world: World, data: bytes = DATA, filename: str = "talk.wav") -> fleet_pb2.UploadInputResponse:
    return await world.filing.calls.inputs.receive(sent(data, filename))


async def read(world: World, reference: str, offset: int = 0, etag: str = "") -> tuple[int, str, bytes]:
    request = command_pb2.ReadFileRequest(reference=reference, offset=offset, etag=etag)
    parts = [part async for part in world.filing.reader.read(request)]
    assert all(len(part.chunk) <= 1 << 20 for part in parts)
    return parts[0].size_bytes, parts[0].sha256, b"".join(part.chunk for part in parts)


def folder(world: World) -> list[str]:
    return [path.name for path in (world.folder / "inputs").iterdir()]


async def test_an_input_is_safe_in_the_workspace_and_can_be_named(world: World) -> None:
    reply = await brought(world)
    sha256 = hashlib.sha256(DATA).hexdigest()
    assert (reply.filename, reply.content_type, reply.size_bytes, reply.sha256) == (
        "talk.wav", "audio/wav", len(DATA), sha256
    )  # fmt: skip
    assert abs(reply.expire_time.ToMilliseconds() - now_ms() - 86_400_000) < 60_000
    assert folder(world) == []
    (found,) = await world.s3.list(WORKSPACE, "inputs/")
    assert found.key == f"inputs/{reply.reference.removeprefix('input:')}"
    await world.filing.references.check(reply.reference, path="payload.audio")
    assert await read(world, reply.reference) == (len(DATA), sha256, DATA)
    assert (await read(world, reply.reference, 2_000_000))[2] == DATA[2_000_000:]
    assert (await read(world, reply.reference, len(DATA)))[2] == b""
    assert await read(world, f"s3://{WORKSPACE}/{found.key}", 5) == (len(DATA), "", DATA[5:])
    assert (await read(world, f"s3://{WORKSPACE}/{found.key}", etag=found.etag))[0] == len(DATA)
    with pytest.raises(FleetError) as caught:
        await read(world, f"s3://{WORKSPACE}/{found.key}", etag="another")
    assert caught.value.code.name == "FAILED_PRECONDITION"


async def test_without_s3_it_stays_on_the_disk(store: Store, tmp_path: Path, s3_server: EmbeddedProcess) -> None:
    async with world_on(store, tmp_path / "off", None) as world:
        reply = await brought(world)
        assert folder(world) == [reply.reference.removeprefix("input:")]
        assert (await read(world, reply.reference, 7))[2] == DATA[7:]
    async with world_on(store, tmp_path / "away", s3_server) as world:
        s3_server.stop()
        await wait_until(lambda: not world.s3.status[0])
        reply = await brought(world)
        assert (await read(world, reply.reference))[2] == DATA and len(folder(world)) == 1


async def test_what_is_over_is_removed_everywhere(store: Store, tmp_path: Path, s3_server: EmbeddedProcess) -> None:
    async with world_on(store, tmp_path, s3_server) as world:
        clock = now_ms()
        uploads = InputUploads(
            store.inputs,
            world.filing.inputs,
            world.s3,
            HERE,
            clock=lambda: clock,
            settings=InputSettings(ttl_seconds=60),
        )
        far = await uploads.receive(sent(b"far"))
        await world.s3.put(WORKSPACE, "somebody/else.bin", b"kept")
        s3_server.stop()
        await wait_until(lambda: not world.s3.status[0])
        near = await uploads.receive(sent(b"near"))
        s3_server.start()
        await wait_until(lambda: world.s3.status[0])
        await uploads.sweep()
        assert len(folder(world)) == 1 and await world.s3.list(WORKSPACE, "inputs/")
        clock += 62_000
        await uploads.sweep()
        assert folder(world) == [] and not await world.s3.list(WORKSPACE, "inputs/")
        assert await world.s3.list(WORKSPACE, "somebody/")
        for reply in (far, near):
            with pytest.raises(FleetError) as caught:
                await read(world, reply.reference)
            assert caught.value.reason == "INPUT_NOT_FOUND"


async def test_what_a_job_names_is_kept_until_it_has_ended(
    store: Store, tmp_path: Path, s3_server: EmbeddedProcess
) -> None:
    async with world_on(store, tmp_path, s3_server) as world:
        clock = now_ms()
        settings = InputSettings(ttl_seconds=60)
        uploads = InputUploads(
            store.inputs, world.filing.inputs, world.s3, HERE, clock=lambda: clock, settings=settings
        )
        far, other = await uploads.receive(sent(b"far")), await uploads.receive(sent(b"other"))
        named = types_pb2.Payload()
        named.image_gen.init_image = f"s3://{WORKSPACE}/inputs/{far.reference.removeprefix('input:')}"
        named.image_gen.mask_image = named.image_gen.init_image
        assert inputs_of(named) == (far.reference.removeprefix("input:"),)
        job_id = await submit(store, inputs=inputs_of(named))
        s3_server.stop()
        await wait_until(lambda: not world.s3.status[0])
        near = await uploads.receive(sent(b"near"))
        training = types_pb2.Payload(training=types_pb2.ContainerPayload(inputs=[near.reference, "output:a.png"]))
        last = await submit(store, inputs=inputs_of(training))
        s3_server.start()
        await wait_until(lambda: world.s3.status[0])
        clock += 62_000
        await uploads.sweep()
        with pytest.raises(FleetError):
            await read(world, other.reference)
        assert [(await read(world, reply.reference))[2] for reply in (far, near)] == [b"far", b"near"]
        for one in (job_id, last):
            await store.jobs.cancel(one)
        clock += 2 * 3_600_000
        await uploads.sweep()
        assert folder(world) == [] and not await world.s3.list(WORKSPACE, "inputs/")


async def test_what_came_while_s3_was_away_moves_there(
    store: Store, tmp_path: Path, s3_server: EmbeddedProcess
) -> None:
    async with world_on(store, tmp_path / "here", s3_server) as world, running(world.filing.run):
        s3_server.stop()
        await wait_until(lambda: not world.s3.status[0])
        reply = await brought(world)
        job_id = await submit(store, inputs=(reply.reference.removeprefix("input:"),))
        assert len(folder(world)) == 1
        async with world_on(store, tmp_path / "there", s3_server, wait=False, home="there") as there:
            # What another server has alone is not lost, only out of reach.
            with pytest.raises(FleetError) as caught:
                await read(there, reply.reference)
            error = caught.value
            assert (error.reason, error.code.name) == ("S3_UNAVAILABLE", "UNAVAILABLE")
            assert repr(HERE) in error.detail and "S3 when that is back" in error.detail
            s3_server.start()
            await wait_until(lambda: not folder(world))
            await wait_until(lambda: there.s3.status[0])
            for server in (world, there):
                assert (await read(server, reply.reference, 3))[2] == DATA[3:]
        row = await store.inputs.get(reply.reference.removeprefix("input:"))
        assert row is not None and (row.key, row.jobs) == (f"inputs/{row.input_id}", 1)
        await store.jobs.cancel(job_id)


async def test_a_file_that_moves_while_it_is_asked_for_is_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = await brought(world)
    moved = await world.store.inputs.get(reply.reference.removeprefix("input:"))
    assert moved is not None
    before, stored = replace(moved, key=""), world.store.inputs.get
    rows = iter([before])

    async def get(input_id: str) -> InputRow | None:
        return next(rows, None) or await stored(input_id)

    monkeypatch.setattr(world.store.inputs, "get", get)
    assert (await read(world, reply.reference, 7))[2] == DATA[7:]


@pytest.mark.parametrize(
    ("name", "shown"),
    [("talk.wav", "talk.wav"), ("C:\\Users\\me\\a.png", "a.png"), ("../../etc/passwd", "passwd"), ("", ""),
     ("a/", ""), ("naïve 東.png", "naïve 東.png")],
)  # fmt: skip
async def test_a_name_is_only_a_name(world: World, name: str, shown: str) -> None:
    reply = await brought(world, b"x", filename=name)
    assert reply.filename == shown


async def test_bad_inputs_leave_nothing_behind(store: Store, tmp_path: Path) -> None:
    async with world_on(store, tmp_path, None) as world:

        async def cut_off() -> AsyncIterator[fleet_pb2.UploadInputRequest]:
            async for request in sent(DATA):
                yield request
            raise FleetError("CLIENT_CLOSED", "it has gone")

        async def nothing() -> AsyncIterator[fleet_pb2.UploadInputRequest]:
            return
            yield fleet_pb2.UploadInputRequest()

        small = InputUploads(
            store.inputs, world.filing.inputs, world.s3, HERE, clock=now_ms, settings=InputSettings(max_bytes=1_000)
        )
        for uploads, requests, reason in (
            (world.filing.calls.inputs, sent(b""), "INVALID_FIELD"),
            (world.filing.calls.inputs, nothing(), "INVALID_FIELD"),
            (world.filing.calls.inputs, sent(b"x", "a\nb"), "INVALID_FIELD"),
            (world.filing.calls.inputs, cut_off(), "CLIENT_CLOSED"),
            (small, sent(b"x" * 1_001, chunk=100), "BODY_TOO_LARGE"),
            (small, sent(b"x" * 1_001), "BODY_TOO_LARGE"),
        ):
            with pytest.raises(FleetError) as caught:
                await uploads.receive(requests)
            assert (caught.value.reason, folder(world)) == (reason, [])
        assert (await small.receive(sent(b"x" * 1_000, chunk=100))).size_bytes == 1_000


@pytest.mark.parametrize(
    "reference",
    ["input:nothing", "output:nobody.png", f"s3://{LORAS}/none.bin", "output:..", "s3://fleet-workspace/inputs/../x"],
)
async def test_what_is_not_there_cannot_be_read(world: World, reference: str) -> None:
    with pytest.raises(FleetError) as caught:
        await read(world, reference)
    bad = parse(reference) is None
    assert caught.value.reason == ("INVALID_FIELD" if bad else "INPUT_NOT_FOUND")
    if not bad:
        with pytest.raises(FleetError) as caught:
            await world.filing.references.check(reference, path="payload.init_image")
        assert caught.value.reason == "INPUT_NOT_FOUND"
        assert caught.value.violations[0].field == "payload.init_image"


@pytest.mark.parametrize("reference", ["job:1", "http://x/y", "", "s3://other/key", "s3://fleet-models/", "input:../x",
                                       "file:///etc/passwd", "s3://fleet-outputs//a", "input:a b"])  # fmt: skip
async def test_what_is_no_reference_is_refused(world: World, reference: str) -> None:
    with pytest.raises(FleetError) as caught:
        await read(world, reference)
    assert caught.value.reason == "INVALID_FIELD"


async def test_outputs_are_read_from_wherever_they_are(world: World) -> None:
    row = await world.add(DATA)
    sha256 = hashlib.sha256(DATA).hexdigest()
    assert await read(world, f"output:{row.filename}", 9) == (len(DATA), sha256, DATA[9:])
    await world.sweeps.move()
    world.filing.local.forget(row.filename)
    assert await read(world, f"output:{row.filename}", 9) == (len(DATA), sha256, DATA[9:])
    with pytest.raises(FleetError) as caught:
        await read(world, f"output:{row.filename}", len(DATA) + 1)
    assert caught.value.violations[0].field == "offset"
