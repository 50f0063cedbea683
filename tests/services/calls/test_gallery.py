"""The gallery and the bytes behind it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from fleet.v1 import types_pb2, vision_pb2
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fleet_server.domain.errors import FleetError
from fleet_server.services.deletions import Removal
from fleet_server.services.gallery import Download
from fleet_server.services.ranges import span_of, unchanged
from fleet_server.store import OutputRow, Store
from tests.services.calls.desk import Desk, asked, desk_on, now_ms, picture


async def made(desk: Desk, data: bytes | None = None, content_type: str = "image/png", **payload: Any) -> OutputRow:
    """One output through a job."""
    await desk.submit(payload={"prompt": "a sea", **payload})
    return await desk.complete(await desk.start(), data, content_type)


async def body(download: Download) -> bytes:
    return b"".join([chunk async for chunk in download.chunks()])


async def shown(desk: Desk, **fields: Any) -> list[str]:
    """All pages of the gallery."""
    found: list[str] = []
    token = ""
    while True:
        request = asked(vision_pb2.ListGalleryRequest, **fields, page_token=token)
        images, token = await desk.gallery.list(request)
        assert len(images) <= request.limit
        found += [image.filename for image in images]
        if not token:
            return found


async def test_pictures_are_listed_newest_first_with_metadata(desk: Desk) -> None:
    await desk.add_node()
    rows = [await made(desk, seed=n) for n in range(7)]
    images, token = await desk.gallery.list(asked(vision_pb2.ListGalleryRequest, limit=100))
    assert {image.filename for image in images} == {row.filename for row in rows} and token == ""
    times = [image.create_time.ToMilliseconds() for image in images]
    assert times == sorted(times, reverse=True)
    assert all(image.metadata.prompt == "a sea" for image in images)
    assert await shown(desk, limit=2) == [image.filename for image in images]


async def test_the_gallery_is_filtered_by_all_that_is_given(store: Store, tmp_path: Path) -> None:
    async with desk_on(store, tmp_path) as desk:
        await desk.add_node("agx0", models=["sketch", "other"])
        sea = await made(desk, prompt="A stormy Sea, at night")
        wood = await made(desk, prompt="a wood", model="other")
        text = await made(desk, b"hello", "text/plain")
        assert set(await shown(desk)) == {sea.filename, wood.filename}
        assert await shown(desk, prompt="night sea") == await shown(desk, prompt="SEA!") == [sea.filename]
        assert await shown(desk, prompt="storm") == []
        assert await shown(desk, model="other") == [wood.filename]
        assert await shown(desk, model="sketch") == [sea.filename]
        assert await shown(desk, job_id=wood.job_id) == [wood.filename] and await shown(desk, job_id=text.job_id) == []
        assert len(await shown(desk, node_id="agx0")) == 2 and await shown(desk, node_id="agx1") == []
        assert await shown(desk, starred=True) == [] and len(await shown(desk, starred=False)) == 2
        request = asked(vision_pb2.ListGalleryRequest)
        request.created_after.FromMilliseconds(wood.created_ms)
        assert sea.created_ms == wood.created_ms or sea.filename not in [
            image.filename for image in (await desk.gallery.list(request))[0]
        ]
        request = asked(vision_pb2.ListGalleryRequest)
        request.created_before.FromMilliseconds(sea.created_ms)
        assert (await desk.gallery.list(request))[0] == []


async def test_many_outputs_of_one_job_come_in_pages_too(desk: Desk) -> None:
    await desk.add_node()
    await desk.submit()
    claim = await desk.start()
    rows = [await desk.save_output(claim, picture()) for _ in range(5)]
    await desk.store.jobs.complete(claim.job.job_id, claim.token, result=b"", outputs=rows)
    found = await shown(desk, job_id=claim.job.job_id, limit=2)
    assert sorted(found) == sorted(row.filename for row in rows)


async def test_bytes_come_with_the_headers_of_what_never_changes(desk: Desk) -> None:
    await desk.add_node()
    data = picture(300, 200)
    row = await made(desk, data, seed=5)
    download = await desk.gallery.download(row.filename, width=None, headers={})
    record = types_pb2.Output.FromString(row.record)
    headers = dict(download.headers)
    assert (download.status, download.content_type, await body(download)) == (200, "image/png", data)
    assert headers["etag"] == f'"{record.sha256}"' and "immutable" in headers["cache-control"]
    assert headers["x-content-type-options"] == "nosniff" and headers["accept-ranges"] == "bytes"
    assert (headers["x-seed"], headers["x-filename"]) == ("5", row.filename)
    assert headers["content-length"] == str(len(data))

    part = await desk.gallery.download(row.filename, width=None, headers={"range": "bytes=10-19"})
    assert (part.status, await body(part)) == (206, data[10:20])
    assert dict(part.headers)["content-range"] == f"bytes 10-19/{len(data)}"
    assert dict(part.headers)["content-length"] == "10"
    known = await desk.gallery.download(row.filename, width=None, headers={"if-none-match": headers["etag"]})
    assert (known.status, await body(known), dict(known.headers)["etag"]) == (304, b"", headers["etag"])
    with pytest.raises(FleetError) as caught:
        await desk.gallery.download(row.filename, width=None, headers={"range": f"bytes={len(data)}-"})
    assert caught.value.reason == "RANGE_NOT_SATISFIABLE"


@pytest.mark.parametrize("size", [1_000, 9 << 20])
async def test_a_file_that_is_not_as_long_as_it_was_is_never_sent_as_if_whole(desk: Desk, size: int) -> None:
    await desk.add_node()
    row = await made(desk, bytes(size), "video/mp4")
    record = types_pb2.Output.FromString(row.record)
    record.size_bytes += 1
    await desk.store.outputs.update(row.filename, record.SerializeToString())
    with pytest.raises(FleetError) as caught:
        await desk.gallery.download(row.filename, width=None, headers={})
    assert caught.value.reason == "INTERNAL"


async def test_a_large_output_is_streamed_in_chunks(desk: Desk) -> None:
    await desk.add_node()
    data = bytes(range(256)) * (9 * 4096)
    row = await made(desk, data, "video/mp4")
    download = await desk.gallery.download(row.filename, width=None, headers={"range": "bytes=1000-"})
    chunks = [chunk async for chunk in download.chunks()]
    assert max(map(len, chunks)) <= 1 << 20 and b"".join(chunks) == data[1000:]


@pytest.mark.parametrize(
    "name", ["nobody.png", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "a" * 200, "", ".part-1"]
)
async def test_what_is_not_there_and_what_may_not_be_named_look_alike(desk: Desk, name: str) -> None:
    # Not even an index gone wrong leads out of the folder.
    if name != "nobody.png":
        await desk.store.outputs.put(
            OutputRow(name, "", now_ms(), 1, types_pb2.Output(filename=name).SerializeToString())
        )
    answers = set()
    for step in (desk.gallery.output(name), desk.gallery.download(name, width=None, headers={}),
                 desk.gallery.download(name, width=64, headers={}), desk.gallery.delete(name)):  # fmt: skip
        with pytest.raises(FleetError) as caught:
            await step
        answers.add((caught.value.reason, caught.value.detail))
    assert answers == {("OUTPUT_NOT_FOUND", "filename: there is no such output; see GET /api/vision/gallery")}


async def test_a_deleted_output_is_gone_everywhere(desk: Desk, tmp_path: Path) -> None:
    await desk.add_node()
    row = await made(desk)
    await body(await desk.gallery.download(row.filename, width=32, headers={}))
    assert await desk.gallery.delete(row.filename) == Removal(("local", "thumbnail", "index"), ())
    assert await shown(desk) == [] and not list((tmp_path / "outputs").iterdir())
    assert not list((tmp_path / "thumbnails").glob("*/*"))
    with pytest.raises(FleetError):
        await desk.gallery.delete(row.filename)
    # One whose file is lost can go too.
    row = await made(desk)
    await desk.files.delete(row.filename)
    with pytest.raises(FleetError) as caught:
        await desk.gallery.download(row.filename, width=None, headers={})
    assert caught.value.reason == "OUTPUT_NOT_FOUND"
    assert await desk.gallery.delete(row.filename) == Removal(("index",), ())


async def test_small_pictures_are_webp_in_proportion_and_kept(desk: Desk, tmp_path: Path) -> None:
    await desk.add_node()
    row = await made(desk, picture(400, 200))
    download = await desk.gallery.download(row.filename, width=100, headers={})
    data = await body(download)
    with Image.open(io.BytesIO(data)) as small:
        assert (small.format, small.size) == ("WEBP", (96, 48))
    assert download.content_type == "image/webp"
    (kept,) = (tmp_path / "thumbnails").glob("*/*")
    assert kept.read_bytes() == data
    other = picture(9, 9, kind="WEBP")
    kept.write_bytes(other)
    assert await body(await desk.gallery.download(row.filename, width=100, headers={})) == other
    kept.write_bytes(b"")
    assert await body(await desk.gallery.download(row.filename, width=100, headers={})) == data
    etag = dict(download.headers)["etag"]
    assert etag != dict((await desk.gallery.download(row.filename, width=None, headers={})).headers)["etag"]
    known = await desk.gallery.download(row.filename, width=100, headers={"if-none-match": etag})
    assert known.status == 304
    large = await body(await desk.gallery.download(row.filename, width=1024, headers={}))
    with Image.open(io.BytesIO(large)) as small:
        assert small.size == (400, 200)


@pytest.mark.parametrize(("data", "content_type"), [(b"hello", "image/png"), (b"", "image/png"), (b"x", "video/mp4"),
                                                    (picture()[:80], "image/png")])  # fmt: skip
async def test_a_width_where_there_is_no_picture_is_a_bad_field(desk: Desk, data: bytes, content_type: str) -> None:
    await desk.add_node()
    row = await made(desk, data, content_type)
    with pytest.raises(FleetError) as caught:
        await desk.gallery.download(row.filename, width=64, headers={})
    assert (caught.value.reason, caught.value.violations[0].field) == ("INVALID_FIELD", "width")


ETAG = '"abc"'


@pytest.mark.parametrize(
    ("header", "start", "end", "partial"),
    [
        (None, 0, 10, False),
        ("bytes=0-3", 0, 4, True),
        ("bytes=3-", 3, 10, True),
        ("bytes=-3", 7, 10, True),
        ("bytes=-30", 0, 10, True),
        ("bytes=5-99", 5, 10, True),
        ("bytes=9-9", 9, 10, True),
        ("bytes=5-4", 0, 10, False),
        ("bytes=a-b", 0, 10, False),
        ("bytes=-", 0, 10, False),
        ("items=0-3", 0, 10, False),
        ("bytes=0-1,3-4", 0, 10, False),
    ],
)
def test_ranges(header: str | None, start: int, end: int, partial: bool) -> None:
    span = span_of(header, None, ETAG, 10)
    assert (span.start, span.end, span.partial) == (start, end, partial)


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-12", "bytes=-0", "bytes=99-"])
def test_ranges_past_the_end(header: str) -> None:
    with pytest.raises(FleetError) as caught:
        span_of(header, None, ETAG, 10)
    assert caught.value.reason == "RANGE_NOT_SATISFIABLE"


def test_a_range_holds_only_for_the_file_it_was_meant_for() -> None:
    assert span_of("bytes=0-3", ETAG, ETAG, 10).partial
    assert not span_of("bytes=0-3", '"other"', ETAG, 10).partial
    assert not span_of("bytes=0-3", f"W/{ETAG}", ETAG, 10).partial


@pytest.mark.parametrize(
    ("header", "same"),
    [
        (None, False),
        ("*", True),
        (ETAG, True),
        (f"W/{ETAG}", True),
        (f'"x", {ETAG}', True),
        ('"x"', False),
        ("abc", False),
    ],
)
def test_etags(header: str | None, same: bool) -> None:
    assert unchanged(header, ETAG) is same


@given(st.text(max_size=30), st.integers(0, 50))
def test_no_range_goes_beyond_the_file(header: str, size: int) -> None:
    for text in (header, f"bytes={header}"):
        try:
            span = span_of(text, None, ETAG, size)
        except FleetError:
            continue
        assert 0 <= span.start <= span.end <= size
