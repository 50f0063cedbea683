"""Objects on an S3 server: your own, or the one that `fleet up` runs.

    s3 = S3Store(S3Config("http://localhost:9010", "minioadmin", "minioadmin123"))
    await s3.open()                      # starts the look-out in the background; never fails because S3 is away
    stored = await s3.put(OUTPUTS, "a.png", path, content_type="image/png", sha256=known)
    async for chunk in s3.stream(OUTPUTS, "a.png", 100, 200): ...
    await s3.aclose()

Every call has a deadline. Every failure is a FleetError S3_UNAVAILABLE with the reason in words, but for an object that
is not there, which is None, or NoObjectError. While the server is known to be away calls fail at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import ParamSpec, TypeVar
from urllib.parse import quote

from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.storage.s3_types import Cancel, NoObjectError, ObjectStat, S3Config, S3Limits, Stored, unavailable

P = ParamSpec("P")
T = TypeVar("T")
_log = logging.getLogger("fleet.s3")
_NOTHING: Mapping[str, str] = MappingProxyType({})
OFF = "S3 is off: set FLEET_S3_ENDPOINT to your S3 server, or leave --s3-port on with `fleet up`"


class S3Store:
    """The four buckets. `config` None: there is no S3, and every call says `off_detail`; `missed`: against our will."""

    def __init__(
        self,
        config: S3Config | None,
        limits: S3Limits | None = None,
        *,
        off_detail: str = OFF,
        missed: bool = False,
    ) -> None:
        self._config = config
        self._limits = limits or S3Limits()
        self._off = off_detail
        self._missed = missed
        self._trouble: str | None = None
        self._looked = asyncio.Event()
        self._well = asyncio.Event()
        self._hurry = asyncio.Event()
        self._notices: list[str] = []
        self._listeners: list[Callable[[], None]] = []
        self._lookout: asyncio.Task[None] | None = None
        if config is None:
            return
        # Only here: to import the SDK takes a fifth of a second, of no use where there is no S3.
        from fleet_server.storage import s3_calls, s3_doorway, s3_errors

        self._failures, self._words = s3_errors.FAILURES, s3_errors.words
        self._see, self._ensure, self._finish = s3_doorway.look, s3_doorway.ensure, s3_calls.finish
        self._slots = asyncio.Semaphore(self._limits.threads)
        self._streams = asyncio.Semaphore(self._limits.streams)
        self._threads = ThreadPoolExecutor(self._limits.threads + self._limits.streams, thread_name_prefix="s3")
        self._look_thread = ThreadPoolExecutor(1, thread_name_prefix="s3-look")
        self._minio = s3_calls.client(config, self._limits)
        self._calls = s3_calls.S3Calls(self._minio, self._limits)

    # How it is.

    @property
    def on(self) -> bool:
        """Whether there is a server to talk to at all, well or not."""
        return self._config is not None

    @property
    def status(self) -> tuple[bool, str | None]:
        """Whether it is well, and if not, why: in words, without secrets."""
        if self._config is None:
            return False, self._off
        if self._trouble is not None:
            return False, self._trouble
        return (True, None) if self._looked.is_set() else (False, "not reached yet")

    @property
    def part_status(self) -> tuple[str, str | None]:
        """The same for people: `ok`, `unavailable` or `off`, and why."""
        if self._config is None and not self._missed:
            return "off", None
        well, detail = self.status
        return "ok" if well else "unavailable", detail

    def notices(self) -> list[str]:
        """What the operator should know of buckets and policies."""
        return [self._off] if self._missed else list(self._notices)

    def on_back(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener()` each time that the server is found well after it was not, the first time included.

        Returns how to end it. The listener must not wait.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    @property
    def address(self) -> str | None:
        """Where callers reach the server, None where S3 is off."""
        return None if self._config is None else (self._config.public_url or self._config.endpoint).rstrip("/")

    async def wait_well(self) -> None:
        """Returns when the server is there, its buckets made. Never, where S3 is off: use a timeout."""
        await self._well.wait()

    async def settled(self, seconds: float) -> None:
        """Returns once the first look at the server has ended, well or not, and after so many seconds at the latest."""
        if self._config is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._looked.wait()

    def url(self, bucket: str, key: str) -> str:
        """Where an object is read directly; objects of fleet-outputs by anybody."""
        if self.address is None:
            raise unavailable(self._off)
        return f"{self.address}/{bucket}/{quote(key)}"

    # Opening and closing.

    async def open(self) -> None:
        """Starts the look-out, which makes the buckets as soon as the server is there, now and after each absence."""
        if self._config is not None:
            self._lookout = asyncio.create_task(self._look_out(), name="s3-look-out")

    async def aclose(self) -> None:
        """Ends the look-out and the threads; a call that hangs is left to its own timeout."""
        if self._lookout is not None:
            self._lookout.cancel()
            await asyncio.wait([self._lookout])
        if self._config is not None:
            for threads in (self._look_thread, self._threads):
                threads.shutdown(wait=False, cancel_futures=True)

    # Objects.

    async def put(
        self,
        bucket: str,
        key: str,
        source: Path | bytes,
        *,
        content_type: str = "application/octet-stream",
        sha256: str | None = None,
        metadata: Mapping[str, str] = _NOTHING,
    ) -> Stored:
        """Stores a file or bytes whole or not at all, replacing what was there; `sha256` is what it should have.

        Up to `part_bytes` in one put, larger ones in parts. The verdict on what the server then has is in the reply:
        look at `sha256_verified`. Raises S3_UNAVAILABLE, OSError where the file cannot be read.
        """
        _judge(key)
        if not all(name.isascii() and value.isascii() for name, value in metadata.items()):
            raise ValueError("metadata of objects are ASCII alone")
        size = (await asyncio.to_thread(source.stat)).st_size if isinstance(source, Path) else len(source)
        # Sent once, and read back where the server gives no checksum.
        return await self._run(
            2 * size,
            lambda cancel: self._calls.put(
                bucket, key, source, content_type=content_type, sha256=sha256, metadata=metadata, cancel=cancel
            ),
        )

    async def verify(self, bucket: str, key: str, *, size: int, sha256: str, path: Path | None = None) -> bool:
        """Whether the server has an object of that size with those very bytes.

        Proven by a checksum that the server computed, which needs the local file to compare with (a local file with
        another hash is a no); without one, or where the server has none, by reading the object back.
        """
        if not is_object_key(key):
            return False
        return await self._run(
            2 * size,
            lambda cancel: self._calls.verify(bucket, key, size=size, sha256=sha256, path=path, cancel=cancel),
        )

    async def stat(self, bucket: str, key: str) -> ObjectStat | None:
        """What is known of an object, None if there is none."""
        if not is_object_key(key):
            return None
        return await self._run(0, lambda _: self._calls.stat(bucket, key))

    async def list(self, bucket: str, prefix: str = "", after: str = "", limit: int = 1000) -> list[ObjectStat]:
        """At most `limit` objects whose keys begin with `prefix` and come after `after`, in the order of their bytes.

        The next page begins after the last key. One request for each 1,000 objects.
        """
        return await self._run(0, lambda _: self._calls.list(bucket, prefix, after, limit))

    async def delete(self, bucket: str, key: str) -> None:
        """Removes an object; fine where there is none."""
        if is_object_key(key):
            await self._run(0, lambda _: self._calls.delete(bucket, key))

    async def copy(self, source: tuple[str, str], target: tuple[str, str]) -> None:
        """Copies an object, (bucket, key) to (bucket, key), on the server. Raises NoObjectError."""
        _judge(target[1])
        await self._run(1 << 30, lambda _: self._calls.copy(source, target))

    async def read(self, bucket: str, key: str, *, limit: int) -> bytes:
        """A whole object. Raises NoObjectError, and INVALID_FIELD where it has more than `limit` bytes."""
        chunks, size = [], 0
        async with contextlib.aclosing(self.stream(bucket, key, 0, limit + 1)) as stream:
            async for chunk in stream:
                chunks.append(chunk)
                size += len(chunk)
        if size > limit:
            raise invalid_field("key", f"s3://{bucket}/{key} has more than {limit} bytes")
        return b"".join(chunks)

    async def stream(self, bucket: str, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes]:
        """Bytes from `start` to before `end` (None: to the end), at most 1 MiB at a time; close it if not read out.

        Raises NoObjectError before the first byte; S3_UNAVAILABLE also in the middle, when the connection is cut, and
        where `start` is past the end. `end` may be past it.
        """
        if not is_object_key(key):
            raise NoObjectError(bucket, key)
        if end is not None and end <= start:
            return
        self._refuse_if_away()
        async with self._queued(self._streams):
            response = await self._in_thread(self._calls.open, bucket, key, start, end)
            try:
                while chunk := await self._in_thread(response.read, self._limits.chunk_bytes):
                    yield chunk
            finally:
                # In a thread: closing waits for a read that is under way, and must not hold up the event loop.
                with contextlib.suppress(RuntimeError):
                    self._threads.submit(self._finish, response)

    # In the event loop.

    async def _run(self, size: int, call: Callable[[Cancel], T]) -> T:
        """Runs a call in a thread, within its deadline; what fails is looked at by the look-out at once."""
        self._refuse_if_away()
        cancel = Cancel()
        seconds = self._limits.call_seconds + size / self._limits.slowest_bytes_per_second
        try:
            async with asyncio.timeout(seconds), self._slots:
                return await asyncio.get_running_loop().run_in_executor(self._threads, call, cancel)
        except TimeoutError:
            self._hurry.set()
            raise self._failed(f"no answer within {seconds:.0f} s") from None
        except self._failures as error:
            self._hurry.set()
            raise self._failed(self._words(error)) from error
        finally:
            cancel.set()

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A step of a stream."""
        try:
            async with asyncio.timeout(self._limits.call_seconds):
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))
        except TimeoutError:
            self._hurry.set()
            raise self._failed("no answer in time") from None
        except self._failures as error:
            self._hurry.set()
            raise self._failed(self._words(error)) from error

    @contextlib.asynccontextmanager
    async def _queued(self, slots: asyncio.Semaphore) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._limits.call_seconds):
                await slots.acquire()
        except TimeoutError:
            raise self._failed("too many objects are being read") from None
        try:
            yield
        finally:
            slots.release()

    def _refuse_if_away(self) -> None:
        if self._config is None:
            raise unavailable(self._off)
        if self._trouble is not None:
            raise self._failed(self._trouble)

    def _failed(self, reason: str) -> FleetError:
        return unavailable(f"S3 at {self._endpoint}: {reason}")

    @property
    def _endpoint(self) -> str:
        return "" if self._config is None else self._config.endpoint

    # The look-out.

    async def _look_out(self) -> None:
        while True:
            await self._look()
            pause = self._limits.recheck_seconds if self._trouble is not None else self._limits.check_seconds
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._hurry.wait()
            self._hurry.clear()

    async def _look(self) -> None:
        config = self._config
        assert config is not None
        first = not self._well.is_set()
        try:
            async with asyncio.timeout(self._limits.call_seconds):
                loop = asyncio.get_running_loop()
                there = await loop.run_in_executor(self._look_thread, self._see, self._minio)
                if first or not there:
                    self._notices = await loop.run_in_executor(
                        self._look_thread, self._ensure, self._minio, config.region
                    )
        except TimeoutError:
            self._away("no answer in time")
        except self._failures as error:
            self._away(self._words(error))
        else:
            self._there()

    def _away(self, detail: str) -> None:
        if self._trouble != detail:
            _log.warning("S3 at %s: %s; everything else goes on without it", self._endpoint, detail)
        self._trouble = detail
        self._well.clear()
        self._looked.set()

    def _there(self) -> None:
        if self._well.is_set():
            return
        _log.info("S3 at %s is there", self._endpoint)
        for note in self._notices:
            _log.warning("%s", note)
        self._trouble = None
        self._looked.set()
        self._well.set()
        for listener in tuple(self._listeners):
            listener()


def is_object_key(key: str) -> bool:
    """Whether a key can name an object of ours: 1 to 1,024 bytes, no control characters, no empty, `.` or `..` part."""
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        return False
    if not 1 <= size <= 1024 or not key.isprintable():
        return False
    return all(part not in ("", ".", "..") for part in key.split("/"))


def _judge(key: str) -> None:
    if not is_object_key(key):
        raise invalid_field("key", "must be 1 to 1,024 printable bytes without empty, . or .. parts")
