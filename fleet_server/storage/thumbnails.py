"""Small WebP pictures of outputs, made when asked for and kept on disk."""

from __future__ import annotations

import asyncio
import contextlib
import io
import secrets
import warnings
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from PIL import Image, UnidentifiedImageError

from fleet_server.storage.names import is_output_name

P = ParamSpec("P")
T = TypeVar("T")
Read = Callable[[], Awaitable[bytes | None]]
_MODES = frozenset({"RGB", "RGBA"})


@dataclass(frozen=True, slots=True)
class ThumbnailLimits:
    """`step` is the grid of widths, so that one picture has few variants; the folder is swept beyond `folder_bytes`."""

    threads: int = 2
    step: int = 16
    quality: int = 80
    pixels: int = 64_000_000
    folder_bytes: int = 1 << 30
    sweep_every: int = 500


class NotAPictureError(Exception):
    """The bytes are no picture that can be made small."""


class Thumbnails:
    """A folder of WebP files, one for each picture and width. Losing it loses nothing.

    `aclose()` ends the threads. A picture asked for by many at once is made once.
    """

    def __init__(self, folder: Path, limits: ThumbnailLimits | None = None) -> None:
        self._folder = folder
        self._limits = limits or ThumbnailLimits()
        self._threads = ThreadPoolExecutor(self._limits.threads, thread_name_prefix="thumbnails")
        self._under_way: dict[tuple[str, int], asyncio.Task[bytes | None]] = {}
        self._written = 0

    async def aclose(self) -> None:
        """Ends the threads; work under way is finished first."""
        for task in list(self._under_way.values()):
            with contextlib.suppress(Exception):
                await task
        await asyncio.to_thread(self._threads.shutdown)

    async def get(self, filename: str, width: int, read: Read) -> bytes | None:
        """A WebP at most `width` pixels wide, never larger than the picture; None if `read` gives none.

        Raises NotAPictureError. A caller who leaves does not stop it for others.
        """
        if not is_output_name(filename):
            return None
        key = (filename, max(self._limits.step, width // self._limits.step * self._limits.step))
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.create_task(self._make(*key, read))
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._done(key, done))
        return await asyncio.shield(task)

    async def delete(self, filename: str) -> bool:
        """Removes all small pictures of an output; whether there was one."""
        if not is_output_name(filename):
            return False
        return await self._in_thread(self._remove_all, filename)

    def _done(self, key: tuple[str, int], task: asyncio.Task[bytes | None]) -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()

    async def _make(self, filename: str, width: int, read: Read) -> bytes | None:
        kept = await self._in_thread(self._load, filename, width)
        if kept is not None:
            return kept
        data = await read()
        if data is None:
            return None
        return await self._in_thread(self._render, data, filename, width)

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))

    # In a thread.

    def _path(self, filename: str, width: int) -> Path:
        return self._folder / str(width) / f"{filename}.webp"

    def _load(self, filename: str, width: int) -> bytes | None:
        try:
            kept = self._path(filename, width).read_bytes()
        except OSError:
            return None
        # Nothing here is fsynced: after a power cut a file may be empty or torn at its head.
        return kept if kept[8:12] == b"WEBP" else None

    def _render(self, data: bytes, filename: str, width: int) -> bytes:
        small = shrink(data, width, quality=self._limits.quality, pixels=self._limits.pixels)
        path = self._path(filename, width)
        # A full disk costs the cache, not the reply.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{secrets.token_hex(8)}")
            part.write_bytes(small)
            part.replace(path)
        self._written += 1
        if self._written % self._limits.sweep_every == 0:
            self.sweep()
        return small

    def sweep(self) -> None:
        """Deletes what was made longest ago until the folder is within its size. Blocking."""
        found = []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                seen = path.stat()
                found.append((seen.st_mtime_ns, seen.st_size, path))
        over = sum(size for _, size, _ in found) - self._limits.folder_bytes
        for _, size, path in sorted(found):
            if over <= 0:
                break
            path.unlink(missing_ok=True)
            over -= size

    def _remove_all(self, filename: str) -> bool:
        removed = False
        for folder in self._folder.iterdir() if self._folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                (folder / f"{filename}.webp").unlink()
                removed = True
        return removed


def shrink(data: bytes, width: int, *, quality: int = 80, pixels: int = 64_000_000) -> bytes:
    """The picture as a WebP at most `width` wide, in its proportions. Raises NotAPictureError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                if picture.width * picture.height > pixels:
                    raise NotAPictureError(f"has more than {pixels:,} pixels")
                if picture.width > width:
                    height = max(1, round(picture.height * width / picture.width))
                    picture.draft("RGB", (width, height))
                    small = _plain(picture).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
                else:
                    small = _plain(picture)
    except (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise NotAPictureError(str(error)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise NotAPictureError(f"cannot be read: {error}") from error
    out = io.BytesIO()
    small.save(out, "WEBP", quality=quality, method=4)
    return out.getvalue()


def _plain(picture: Image.Image) -> Image.Image:
    if picture.mode in _MODES:
        return picture.copy()
    return picture.convert("RGBA" if "transparency" in picture.info or picture.mode in ("LA", "PA") else "RGB")
