"""Small pictures: made once however many ask, kept within a size, of every kind that Pillow reads."""

from __future__ import annotations

import asyncio
import io
import os
from pathlib import Path

import pytest
from PIL import Image

from fleet_server.storage.thumbnails import NotAPictureError, ThumbnailLimits, Thumbnails, shrink
from tests.services.calls.desk import picture


async def test_a_picture_asked_for_by_many_is_made_once(tmp_path: Path) -> None:
    thumbnails = Thumbnails(tmp_path)
    reads = 0
    gate = asyncio.Event()

    async def read() -> bytes:
        nonlocal reads
        reads += 1
        await gate.wait()
        return picture(200, 100)

    askers = [asyncio.create_task(thumbnails.get("a.png", 64 + n, read)) for n in range(10)]
    for _ in range(100):
        await asyncio.sleep(0)
    askers[0].cancel()
    gate.set()
    found = await asyncio.gather(*askers[1:])
    assert reads == 1 and len(set(found)) == 1 and found[0]
    await thumbnails.aclose()


async def test_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    thumbnails = Thumbnails(tmp_path / "none")

    async def read() -> bytes | None:
        return None

    assert await thumbnails.get("a.png", 64, read) is None
    assert await thumbnails.get("../a.png", 64, read) is None
    assert not await thumbnails.delete("a.png") and not await thumbnails.delete("../a")
    await thumbnails.aclose()


async def test_the_folder_is_kept_within_its_size_the_oldest_going_first(tmp_path: Path) -> None:
    thumbnails = Thumbnails(tmp_path, ThumbnailLimits(folder_bytes=2_500))
    folder = tmp_path / "64"
    folder.mkdir()
    for number in range(5):
        path = folder / f"{number}.png.webp"
        path.write_bytes(b"x" * 1_000)
        os.utime(path, (1_000 + number, 1_000 + number))
    thumbnails.sweep()
    assert sorted(path.name for path in folder.iterdir()) == ["3.png.webp", "4.png.webp"]
    await thumbnails.aclose()


async def test_a_full_disk_costs_the_cache_and_not_the_reply(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    thumbnails = Thumbnails(tmp_path / "file")

    async def read() -> bytes:
        return picture()

    with pytest.raises(NotADirectoryError):
        (tmp_path / "file" / "x").mkdir()
    assert await thumbnails.get("a.png", 64, read)
    await thumbnails.aclose()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_every_mode_becomes_webp(mode: str) -> None:
    out = io.BytesIO()
    Image.new(mode, (100, 50)).save(out, "TIFF" if mode == "CMYK" else "PNG")
    with Image.open(io.BytesIO(shrink(out.getvalue(), 32))) as small:
        assert (small.format, small.size) == ("WEBP", (32, 16))
        assert (small.mode == "RGBA") == (mode in ("RGBA", "LA"))


@pytest.mark.parametrize("data", [b"", b"hello", picture()[:60], picture(kind="JPEG")[:200]])
def test_what_is_no_picture_is_told(data: bytes) -> None:
    with pytest.raises(NotAPictureError):
        shrink(data, 32)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(NotAPictureError, match="pixels"):
        shrink(picture(100, 100), 32, pixels=9_999)
    assert shrink(picture(100, 100), 32, pixels=10_000)
