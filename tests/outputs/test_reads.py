"""What is read where: from the disk, and from the bucket once the disk has lost it."""

from __future__ import annotations

import asyncio
import hashlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from fleet.v1 import fleet_pb2, types_pb2, vision_pb2
from PIL import Image

from fleet_server.domain.errors import FleetError
from fleet_server.services.gallery import Download
from fleet_server.storage.buckets import OUTPUTS
from fleet_server.store import OutputRow, Store
from tests.outputs.world import World, row_of, running, world_on
from tests.s3.embedded import EmbeddedProcess
from tests.services.calls.desk import asked
from tests.waiting import wait_until


def picture(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (300, 200), color).save(out, "PNG")
    return out.getvalue()


async def body(download: Download) -> bytes:
    return b"".join([chunk async for chunk in download.chunks()])


async def read(world: World, row: OutputRow, width: int | None = None, **headers: str) -> tuple[int, bytes, Any]:
    download = await world.filing.gallery.download(row.filename, width=width, headers=headers)
    return download.status, await body(download), dict(download.headers)


async def cleaned_up(world: World, row: OutputRow) -> None:
    await world.sweeps.sync()
    images, _ = await world.filing.gallery.list(asked(vision_pb2.ListGalleryRequest))
    assert images[0].sources == ["local", "s3"]
    await world.sweeps.cleanup(0.0001, dry_run=False)


async def moved(world: World, row: OutputRow) -> None:
    await world.sweeps.move()


async def lost(world: World, row: OutputRow) -> None:
    """The folder goes, and nobody tells the index."""
    await world.sweeps.sync()
    for file in (world.folder / "outputs").iterdir():
        file.unlink()
    world.filing.local.forget(row.filename)


@pytest.mark.parametrize("how", [cleaned_up, moved, lost])
async def test_every_read_works_without_the_local_file(world: World, how: Any) -> None:
    data = picture()
    row = await world.add(data, engine="comfyui", age_ms=60_000)
    assert (await world.filing.gallery.list(asked(vision_pb2.ListGalleryRequest)))[0][0].sources == ["local"]
    await how(world, row)
    assert not world.on_disk(row)
    status, found, headers = await read(world, row)
    assert (status, found, headers["content-length"]) == (200, data, str(len(data)))
    world.filing.local.forget(row.filename)
    status, part, headers = await read(world, row, range="bytes=10-19")
    assert (status, part, headers["content-range"]) == (206, data[10:20], f"bytes 10-19/{len(data)}")
    assert (await read(world, row, **{"if-none-match": headers["etag"]}))[0] == 304
    world.filing.local.forget(row.filename)
    with Image.open(io.BytesIO((await read(world, row, 64))[1])) as small:
        assert (small.format, small.size) == ("WEBP", (64, 43))
    output = await world.filing.gallery.output(row.filename)
    assert output.sources[-1] == "s3" and output.s3_url == world.s3.url(OUTPUTS, f"comfyui/{row.filename}")
    images, _ = await world.filing.gallery.list(asked(vision_pb2.ListGalleryRequest))
    assert images == [output]
    with pytest.raises(FleetError) as caught:
        await read(world, row, range=f"bytes={len(data)}-")
    assert caught.value.reason == "RANGE_NOT_SATISFIABLE"


async def test_a_large_file_is_streamed_from_the_bucket(world: World) -> None:
    data = bytes(range(256)) * (9 * 4096)
    row = await world.add(data)
    await world.sweeps.move()
    download = await world.filing.gallery.download(row.filename, width=None, headers={"range": "bytes=1000-"})
    chunks = [chunk async for chunk in download.chunks()]
    assert max(map(len, chunks)) <= 1 << 20 and b"".join(chunks) == data[1000:]


async def test_the_folder_may_be_lost_between_two_starts(
    store: Store, tmp_path: Path, s3_server: EmbeddedProcess
) -> None:
    async with world_on(store, tmp_path, s3_server) as world:
        row = await world.add(picture("blue"))
        await world.sweeps.sync()
    shutil.rmtree(tmp_path / "outputs")
    (tmp_path / "gallery.sqlite").unlink()
    async with world_on(store, tmp_path, s3_server) as world:
        assert (await read(world, row))[1] == picture("blue")
        images, _ = await world.filing.gallery.list(asked(vision_pb2.ListGalleryRequest))
        assert [image.filename for image in images] == [row.filename]


async def test_an_object_that_is_missing_is_not_found(world: World) -> None:
    row, large = await world.add(), await world.add(b"x" * (9 << 20))
    await world.sweeps.move()
    for one in (row, large):
        await world.s3.delete(OUTPUTS, one.object_key)
        with pytest.raises(FleetError) as caught:
            await read(world, one)
        assert caught.value.reason == "OUTPUT_NOT_FOUND"


async def test_a_spoiled_copy_is_never_given_out(world: World) -> None:
    row = await world.add(b"the true one")
    await world.sweeps.move()
    for spoiled in (b"the fals one", b"longer than it should be", b"short"):
        await world.s3.put(OUTPUTS, row.object_key, spoiled)
        with pytest.raises(FleetError) as caught:
            await read(world, row)
        assert (caught.value.reason, "spoiled" in caught.value.detail) == ("INTERNAL", True)


async def test_with_s3_away_only_what_is_there_alone_cannot_be_read(world: World, s3_server: EmbeddedProcess) -> None:
    far = await world.add(picture())
    await world.sweeps.move()
    near = await world.add(picture("green"))
    s3_server.stop()
    await wait_until(lambda: not world.s3.status[0])
    world.filing.local.forget(far.filename)
    assert (await read(world, near))[1] == picture("green")
    with pytest.raises(FleetError) as caught:
        await read(world, far)
    assert caught.value.reason == "S3_UNAVAILABLE"
    assert (await world.filing.gallery.output(far.filename)).sources == ["s3"]
    assert len((await world.filing.gallery.list(asked(vision_pb2.ListGalleryRequest)))[0]) == 2


async def test_lists_tell_what_is_really_there(world: World) -> None:
    rows = [await world.add(engine=engine) for engine in ("sketch", "comfyui", "comfyui")]
    await world.sweeps.sync()
    (world.folder / "outputs" / "remote.png").write_bytes(b"put there by somebody")
    (world.folder / "outputs" / "link.png").symlink_to("/etc/passwd")
    await world.s3.put(OUTPUTS, "remote.png", b"put there by somebody")
    await world.s3.delete(OUTPUTS, rows[0].object_key)

    async def names(**fields: Any) -> list[str]:
        found, token = [], ""
        while True:
            request = asked(fleet_pb2.ListOutputsRequest, limit=2, page_token=token, **fields)
            outputs, token = await world.filing.calls.lists.page(request)
            found += [output.filename for output in outputs]
            if not token:
                return found

    assert set(await names(source="local")) == {*(row.filename for row in rows), "remote.png"}
    assert set(await names(source="s3")) == {*(row.filename for row in rows[1:]), "remote.png"}
    assert set(await names(prefix="comfyui/")) == {row.filename for row in rows[1:]}
    assert set(await names(source="local", prefix="comfyui/")) == {row.filename for row in rows[1:]}
    assert await names(prefix="animatediff/") == []
    outputs, _ = await world.filing.calls.lists.page(asked(fleet_pb2.ListOutputsRequest, source="s3"))
    (foreign,) = [output for output in outputs if output.filename == "remote.png"]
    assert not foreign.HasField("metadata") and foreign.s3_url.endswith("/fleet-outputs/remote.png")
    assert outputs[0] == foreign, "what came last is first"


async def test_lists_of_the_bucket_need_s3(world: World, s3_server: EmbeddedProcess) -> None:
    s3_server.stop()
    await wait_until(lambda: not world.s3.status[0])
    with pytest.raises(FleetError) as caught:
        await world.filing.calls.lists.page(asked(fleet_pb2.ListOutputsRequest))
    assert caught.value.reason == "S3_UNAVAILABLE"
    assert await world.filing.calls.lists.page(asked(fleet_pb2.ListOutputsRequest, source="local")) == ([], "")


async def test_a_link_is_no_file_even_where_the_index_has_its_name(world: World, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (world.folder / "outputs" / "link.png").symlink_to(tmp_path / "secret")
    row = row_of("link.png", 6, hashlib.sha256(b"secret").hexdigest(), at_ms=1)
    await world.store.outputs.put(row)
    with pytest.raises(FleetError) as caught:
        await read(world, row)
    assert caught.value.reason == "OUTPUT_NOT_FOUND"
    assert (await world.sweeps.sync()).failed == 1 and await world.object(row) is None
    await world.filing.gallery.delete("link.png")
    assert (tmp_path / "secret").read_bytes() == b"secret" and not world.on_disk(row)


async def test_a_deletion_reaches_all_places(world: World) -> None:
    row = await world.add(picture())
    await world.sweeps.sync()
    await read(world, row, 64)
    removal = await world.filing.gallery.delete(row.filename)
    assert (set(removal.removed), removal.pending) == ({"local", "s3", "thumbnail", "index"}, ())
    assert not world.on_disk(row) and await world.object(row) is None
    assert not list((world.folder / "thumbnails").glob("*/*"))
    assert (await world.sweeps.stats()).s3.files == 0


async def test_what_cannot_be_reached_is_removed_later(world: World, s3_server: EmbeddedProcess) -> None:
    row = await world.add(picture())
    await world.sweeps.sync()
    s3_server.stop()
    await wait_until(lambda: not world.s3.status[0])
    removal = await world.filing.gallery.delete(row.filename)
    assert (set(removal.removed), removal.pending) == ({"local", "index"}, ("s3",))
    for call in (
        world.filing.gallery.output(row.filename),
        read(world, row),
        world.filing.gallery.delete(row.filename),
    ):
        with pytest.raises(FleetError) as caught:
            await call
        assert caught.value.reason == "OUTPUT_NOT_FOUND"

    async def gone() -> bool:
        return not await world.store.syncs.leaving()

    async with running(world.filing.run):
        s3_server.start()
        await wait_until(gone)
    assert await world.object(row) is None


async def test_a_deletion_that_was_cut_short_is_finished_by_the_next_start(world: World) -> None:
    row = await world.add(picture())
    await world.sweeps.sync()
    await world.store.outputs.delete(row.filename)
    assert world.on_disk(row) and await world.object(row) is not None

    async def gone() -> bool:
        return await world.object(row) is None and not await world.store.syncs.leaving()

    async with running(world.filing.run):
        await wait_until(gone)
    assert not world.on_disk(row)


async def test_a_file_on_another_servers_disk_is_left_to_that_server(world: World) -> None:
    row = row_of("elsewhere.png", 5, "00", at_ms=1, home="there")
    await world.store.outputs.put(row)
    removal = await world.filing.gallery.delete(row.filename)
    assert (removal.removed, removal.pending) == (("index",), ("local",))
    leaving = await world.store.syncs.leaving_of(row.filename)
    assert leaving is not None and (leaving.places, leaving.home) == ("L", "there")


async def test_what_another_server_has_just_stored_is_waited_for(
    store: Store, tmp_path: Path, s3_server: EmbeddedProcess
) -> None:
    """Two servers on one store: each output is copied at once, and read from the other a moment later."""
    async with (
        world_on(store, tmp_path / "a", s3_server, home="a", eager=True) as one,
        world_on(store, tmp_path / "b", s3_server, home="b") as two,
    ):
        two.filing.files._patience_seconds = 60
        row = await one.add(picture(), home="a")
        asked_early = asyncio.create_task(read(two, row))
        async with running(one.sweeps.run):
            one.sweeps.stored()
            assert (await asked_early)[1] == picture()
        # What nobody copies is given up after a while; what is this server's own is not waited for at all.
        lone = await one.add(picture("green"), home="a")
        two.filing.files._patience_seconds = 0.1
        with pytest.raises(FleetError) as caught:
            await read(two, lone)
        assert caught.value.reason == "OUTPUT_NOT_FOUND"
        assert (await two.sweeps.sync()).scanned == 0, "each server copies its own"


async def test_a_star_is_found_and_kept(world: World) -> None:
    row = await world.add(picture())
    assert (await world.filing.gallery.star(row.filename, True)).starred
    await world.sweeps.move()
    images, _ = await world.filing.gallery.list(asked(vision_pb2.ListGalleryRequest, starred=True))
    assert [image.filename for image in images] == [row.filename] and images[0].starred
    assert not (await world.filing.gallery.star(row.filename, False)).starred
    assert (await world.filing.gallery.list(asked(vision_pb2.ListGalleryRequest, starred=True)))[0] == []
    for name in ("nobody.png", "../x"):
        with pytest.raises(FleetError) as caught:
            await world.filing.gallery.star(name, True)
        assert caught.value.reason == "OUTPUT_NOT_FOUND"


async def test_a_jobs_result_says_where_its_outputs_are_now(world: World) -> None:
    rows = [await world.add(picture()) for _ in range(3)]
    job = types_pb2.Job(result=types_pb2.JobResult(outputs=[types_pb2.Output.FromString(row.record) for row in rows]))
    await world.filing.gallery.delete(rows[2].filename)
    await world.filing.gallery.star(rows[1].filename, True)
    await world.sweeps.sync()
    await world.filing.local.delete(rows[1].filename)
    await world.store.syncs.cleaned(rows[1].filename)
    await world.filing.refresh(job)
    assert [list(output.sources) for output in job.result.outputs] == [["local", "s3"], ["s3"], []]
    assert [output.HasField("s3_url") for output in job.result.outputs] == [True, True, False]
    assert [output.starred for output in job.result.outputs] == [False, True, False]
