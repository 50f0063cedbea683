"""The file rooms of a server put together on a real store and a real S3 server, without the rest of it."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet.v1 import types_pb2

from fleet_server.filing import Filing
from fleet_server.services.output_views import object_key
from fleet_server.services.sweeper import Sweeper
from fleet_server.services.sweeps import Sweeps, SweepSettings
from fleet_server.settings import Settings
from fleet_server.storage.buckets import OUTPUTS
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import NoObjectError, S3Config, S3Limits
from fleet_server.store import OutputRow, Store
from tests.s3.embedded import ACCESS, SECRET, EmbeddedProcess
from tests.waiting import wait_until

HERE = "here"
LIMITS = S3Limits(
    part_bytes=5 << 20,
    check_seconds=0.2,
    recheck_seconds=0.05,
    connect_seconds=10.0,
    read_seconds=20.0,
    call_seconds=40.0,
)
_numbers = itertools.count(1)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class World:
    """`told` is the progress that was told of."""

    store: Store
    filing: Filing
    s3: S3Store
    folder: Path
    sweeper: Sweeper
    sweeps: Sweeps
    told: list[types_pb2.OperationProgress]

    async def add(
        self, data: bytes = b"", *, engine: str = "sketch", age_ms: int = 0, prompt: str = "a sea", **more: Any
    ) -> OutputRow:
        """An output as a job leaves it: on the disk and in the index."""
        number = next(_numbers)
        data = data or b"picture %d" % number
        filename = f"{hashlib.sha256(b'%d' % number).hexdigest()[:32]}.png"

        async def chunks() -> AsyncIterator[bytes]:
            yield data

        sha256 = hashlib.sha256(data).hexdigest()
        await self.filing.local.write(filename, chunks(), size=len(data), sha256=sha256)
        row = row_of(filename, len(data), sha256, engine=engine, at_ms=now_ms() - age_ms, prompt=prompt, **more)
        await self.store.outputs.put(row)
        return row

    async def row(self, one: OutputRow) -> OutputRow:
        """The row as it is now."""
        found = await self.store.outputs.get(one.filename)
        assert found is not None
        return found

    def on_disk(self, one: OutputRow) -> bool:
        return (self.folder / "outputs" / one.filename).exists()

    async def object(self, one: OutputRow) -> bytes | None:
        """What the bucket holds."""
        try:
            return await self.s3.read(OUTPUTS, one.object_key, limit=1 << 26)
        except NoObjectError:
            return None


def row_of(
    filename: str,
    size: int,
    sha256: str,
    *,
    engine: str = "sketch",
    at_ms: int,
    prompt: str = "a sea",
    model: str = "sketch",
    node_id: str = "agx0",
    job_id: str = "job",
    content_type: str = "image/png",
    making: bytes = b"",
    home: str = HERE,
    job_type: types_pb2.JobType.ValueType = types_pb2.JOB_TYPE_IMAGE_GEN,
) -> OutputRow:
    """A row as the end of a job makes it."""
    record = types_pb2.Output(
        filename=filename,
        url=f"/api/vision/outputs/{filename}",
        sources=["local"],
        content_type=content_type,
        size_bytes=size,
        sha256=sha256,
        node_id=node_id,
        job_id=job_id,
        metadata=types_pb2.OutputMetadata(
            prompt=prompt, engine=engine, model=model, resolved_model=model, job_type=job_type
        ),
    )
    record.create_time.FromMilliseconds(at_ms)
    key = object_key(filename, record.metadata)
    return OutputRow(filename, job_id, at_ms, size, record.SerializeToString(), key=key, making=making, home=home)


async def put_rows(store: Store, rows: Sequence[OutputRow], *, synced: bool = False) -> None:
    """Rows without files."""
    for start in range(0, len(rows), 200):
        part = rows[start : start + 200]
        await asyncio.gather(*(store.outputs.put(row) for row in part))
        if synced:
            await asyncio.gather(*(store.syncs.synced(row.filename, row.object_key) for row in part))


@asynccontextmanager
async def world_on(
    store: Store,
    folder: Path,
    server: EmbeddedProcess | None,
    *,
    wait: bool = True,
    home: str = HERE,
    **settings: Any,
) -> AsyncIterator[World]:
    """The rooms of one server; `server` None: S3 is off."""
    s3 = S3Store(None if server is None else S3Config(server.endpoint, ACCESS, SECRET), LIMITS)
    given = Settings(data_dir=folder, output_reserve_bytes=0)
    filing = Filing(given, store, s3, home, now_ms)
    told: list[types_pb2.OperationProgress] = []
    sweeper = Sweeper(store, filing.local, s3, home)
    sweeps = Sweeps(
        store, filing.local, sweeper, home, clock=now_ms, tell=told.append, settings=SweepSettings(**settings)
    )
    await s3.open()
    await filing.open()
    try:
        if server is not None and wait:
            async with asyncio.timeout(50):
                await s3.wait_well()
        yield World(store, filing, s3, folder, sweeper, sweeps, told)
    finally:
        await sweeps.aclose()
        await filing.finish()
        await filing.close()
        await s3.aclose()


@asynccontextmanager
async def running(loop: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """A loop of the server's, for as long as the block lasts."""
    task = asyncio.create_task(loop())
    try:
        yield
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until_synced(world: World, *rows: OutputRow) -> None:
    """Returns when the index says that the bucket has them."""

    async def synced() -> bool:
        return all([(await world.row(row)).synced for row in rows])

    await wait_until(synced)
