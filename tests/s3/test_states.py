"""The store's state and reasons: servers that are away, wrong, slow, cut off, and back again."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.storage.buckets import OUTPUTS
from fleet_server.storage.s3 import OFF, S3Store
from fleet_server.storage.s3_types import S3Config, S3Limits
from tests.ports import free_port
from tests.s3.embedded import ACCESS, SECRET, EmbeddedProcess
from tests.waiting import wait_until

QUICK = S3Limits(
    connect_seconds=1,
    read_seconds=0.3,
    call_seconds=0.8,
    slowest_bytes_per_second=100 << 20,
    check_seconds=0.1,
    recheck_seconds=0.02,
    part_bytes=5 << 20,
)
LASTING = S3Limits(check_seconds=0.1, recheck_seconds=0.02)
Door = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def opened(endpoint: str, limits: S3Limits = LASTING) -> AsyncIterator[S3Store]:
    store = S3Store(S3Config(endpoint, ACCESS, SECRET), limits)
    await store.open()
    await store.settled(50)
    try:
        yield store
    finally:
        await store.aclose()


@asynccontextmanager
async def door(answer: Door) -> AsyncIterator[int]:
    """Something that listens and is no S3 server."""

    tasks: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await answer(reader, writer)
        finally:
            writer.close()

    def come(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(one(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(come, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def embedded(tmp_path: Path) -> AsyncIterator[EmbeddedProcess]:
    process = EmbeddedProcess(tmp_path / "s3")
    await asyncio.to_thread(process.start)
    async with opened(process.endpoint, LASTING) as store, asyncio.timeout(50):
        # The first look may be given up while a busy machine starts it.
        await store.wait_well()
    yield process
    await asyncio.to_thread(process.stop)


async def test_without_s3_every_call_says_how_to_have_it() -> None:
    store = S3Store(None)
    await store.open()
    await store.settled(1)
    assert (store.status, store.part_status, store.address, store.on) == ((False, OFF), ("off", None), None, False)
    for call in (
        store.stat(OUTPUTS, "x"),
        store.list(OUTPUTS),
        store.put(OUTPUTS, "x", b""),
        store.delete(OUTPUTS, "x"),
    ):
        with pytest.raises(FleetError, match="FLEET_S3_ENDPOINT") as raised:
            await call
        assert raised.value.reason == "S3_UNAVAILABLE"
    with pytest.raises(FleetError, match="FLEET_S3_ENDPOINT"):
        store.url(OUTPUTS, "x")
    await store.aclose()


async def test_a_port_with_nobody() -> None:
    async with opened(f"http://127.0.0.1:{free_port()}") as store:
        assert store.status == (False, "connection refused")
        assert store.part_status == ("unavailable", "connection refused")
        with pytest.raises(FleetError, match="connection refused") as raised:
            await store.stat(OUTPUTS, "x")
        assert raised.value.reason == "S3_UNAVAILABLE" and raised.value.retry_after_seconds


async def test_a_name_that_is_no_host() -> None:
    async with opened("http://no-such-host.invalid:9010") as store:
        assert store.status[1] == "no such host: correct FLEET_S3_ENDPOINT"


async def test_a_page_instead_of_s3() -> None:
    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\n\r\n<html>hi</html>")
        await writer.drain()

    async with door(page) as port, opened(f"http://127.0.0.1:{port}") as store:
        assert "no S3 server" in (store.status[1] or "")


async def test_tls_where_there_is_none(embedded: EmbeddedProcess) -> None:
    async with opened(embedded.endpoint.replace("http:", "https:")) as store:
        assert "http or https" in (store.status[1] or "")


async def test_silence_ends_each_call_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes connections and says nothing: reasons in words, and nobody waits for ever."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with door(silent) as port:
        store = S3Store(S3Config(f"http://127.0.0.1:{port}", ACCESS, SECRET), QUICK)
        with pytest.raises(FleetError, match="no answer"):
            await store.stat(OUTPUTS, "x")
        with pytest.raises(FleetError, match="no answer"):
            await store.put(OUTPUTS, "x", bytes(1000))
        with pytest.raises(FleetError, match="no answer"):
            await anext(store.stream(OUTPUTS, "x"))
        await store.open()
        await wait_until(lambda: store.status == (False, "no answer in time"))
        # Known to be away: refused without asking.
        monkeypatch.setattr(store, "_calls", None)
        for call in (store.stat(OUTPUTS, "x"), anext(store.stream(OUTPUTS, "x"))):
            with pytest.raises(FleetError, match="no answer in time"):
                await call
        await store.aclose()


async def test_drips_end_at_the_deadline_too() -> None:
    """A byte now and then defeats a timeout of silence, not the deadline of the call."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX-A: ")
        while True:
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.05)

    async with door(drip) as port:
        store = S3Store(S3Config(f"http://127.0.0.1:{port}", ACCESS, SECRET), replace(QUICK, read_seconds=50))
        with pytest.raises(FleetError, match="no answer within"):
            await store.stat(OUTPUTS, "x")
        await store.aclose()


async def test_a_cut_in_the_middle_of_an_object_is_seen(embedded: EmbeddedProcess) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inward, outward = await asyncio.open_connection("127.0.0.1", embedded.port)
        outward.write(await reader.readuntil(b"\r\n\r\n"))
        writer.write(await inward.readexactly(2 << 20))
        await writer.drain()
        outward.close()

    async with opened(embedded.endpoint, LASTING) as store:
        await store.put(OUTPUTS, "cut.bin", os.urandom(4 << 20))
    async with door(half) as port:
        broken = S3Store(S3Config(f"http://127.0.0.1:{port}", ACCESS, SECRET), LASTING)
        # The signature is over the host: the embedded server takes the one that was signed.
        got = 0
        with pytest.raises(FleetError, match="cut") as raised:
            async for chunk in broken.stream(OUTPUTS, "cut.bin"):
                got += len(chunk)
        assert raised.value.reason == "S3_UNAVAILABLE" and 0 < got < 4 << 20
        await broken.aclose()


async def test_away_and_back(embedded: EmbeddedProcess, tmp_path: Path) -> None:
    """Killed, everything in it deleted, started again: calls fail at once, then the buckets are there anew."""
    async with opened(embedded.endpoint, LASTING) as store:
        assert store.status == (True, None)
        backs: list[int] = []
        end = store.on_back(lambda: backs.append(1))
        await asyncio.to_thread(embedded.stop)
        # A look that was under way when it was killed may say something else at first.
        await wait_until(lambda: store.status[1] == "connection refused")
        with pytest.raises(FleetError, match="connection refused"):
            await store.put(OUTPUTS, "a.png", b"x")
        await asyncio.to_thread(shutil.rmtree, tmp_path / "s3")
        await asyncio.to_thread(embedded.start)
        async with asyncio.timeout(50):
            await store.wait_well()
        assert backs == [1]
        stored = await store.put(OUTPUTS, "a.png", b"x", sha256=hashlib.sha256(b"x").hexdigest())
        assert stored.sha256_verified
        end()


async def test_a_bucket_that_somebody_removed_is_made_again(embedded: EmbeddedProcess) -> None:
    async with opened(embedded.endpoint, LASTING) as store:
        await asyncio.to_thread(store._minio.remove_bucket, OUTPUTS)
        await wait_until(lambda: store._minio.bucket_exists(OUTPUTS))
        await store.put(OUTPUTS, "a.png", b"x")


async def test_readers_that_leave_give_their_place_back(
    embedded: EmbeddedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More abandoned streams than there are places, and the next reader still reads."""
    limits = S3Limits(streams=2, check_seconds=0.1)
    async with opened(embedded.endpoint, limits) as store:
        await store.put(OUTPUTS, "long.bin", bytes(4 << 20))
        for _ in range(5):
            stream = store.stream(OUTPUTS, "long.bin")
            await anext(stream)
            await stream.aclose()
        held = [store.stream(OUTPUTS, "long.bin") for _ in range(2)]
        for stream in held:
            await anext(stream)
        with monkeypatch.context() as hasty, pytest.raises(FleetError, match="too many"):
            hasty.setattr(store, "_limits", replace(limits, call_seconds=0.5))
            await anext(store.stream(OUTPUTS, "long.bin"))
        for stream in held:
            await stream.aclose()
        assert len(await store.read(OUTPUTS, "long.bin", limit=4 << 20)) == 4 << 20


async def test_a_cancelled_put_leaves_nothing_and_no_thread_behind(
    embedded: EmbeddedProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, going_on = threading.Event(), threading.Event()
    path = tmp_path / "large"
    path.write_bytes(bytes(40 << 20))
    limits = S3Limits(threads=1, part_bytes=5 << 20, check_seconds=0.1)
    async with opened(embedded.endpoint, limits) as store:
        send_part = store._minio._upload_part

        def sent(*args: Any, **more: Any) -> Any:
            if begun.is_set():
                assert going_on.wait(50)
            begun.set()
            return send_part(*args, **more)

        monkeypatch.setattr(store._minio, "_upload_part", sent)
        sending = asyncio.create_task(store.put(OUTPUTS, "large.bin", path))
        await wait_until(lambda: any((tmp_path / "s3" / "blobs").glob("*/*")))
        sending.cancel()
        await asyncio.wait([sending])
        going_on.set()
        assert await store.stat(OUTPUTS, "large.bin") is None
        # The upload in parts is given up on the server too.
        await wait_until(lambda: not any((tmp_path / "s3" / "blobs").glob("*/*")))


async def test_where_no_checksum_can_be_compared_the_object_is_read_back(
    embedded: EmbeddedProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"the bytes that were sent"
    sha256, path = hashlib.sha256(data).hexdigest(), tmp_path / "file"
    path.write_bytes(data)
    async with opened(embedded.endpoint, LASTING) as store:
        stat, get, read = store._minio.stat_object, store._minio.get_object, list[str]()
        checksum = ""

        def of_a_server_that_encrypts(*args: Any, **more: Any) -> Any:
            """Its ETag is none of the bytes'; whether it tells their SHA-256 is up to it."""
            assert more["extra_headers"] == {"x-amz-checksum-mode": "ENABLED"}
            return replace(stat(*args, **more), etag="drawn", metadata={"x-amz-checksum-sha256": checksum})

        def counted(*args: Any, **more: Any) -> Any:
            read.append(args[1])
            return get(*args, **more)

        monkeypatch.setattr(store._minio, "stat_object", of_a_server_that_encrypts)
        monkeypatch.setattr(store._minio, "get_object", counted)
        for theirs in (data, data.upper()):
            await store.put(OUTPUTS, "drawn.png", theirs)
            for proof, reads in (("", 1), ("AAAA", 1), (base64.b64encode(hashlib.sha256(theirs).digest()).decode(), 0)):
                checksum = proof
                read.clear()
                same = await store.verify(OUTPUTS, "drawn.png", size=len(data), sha256=sha256, path=path)
                assert same == (theirs == data)
                assert len(read) == (reads if same else 1)
