"""A store and an S3 server for the session; a namespace and an empty bucket for each test."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from fleet_server.storage.buckets import OUTPUTS, WORKSPACE
from fleet_server.storage.s3 import S3Store
from fleet_server.store import Store, open_store
from tests.outputs.world import World, world_on
from tests.s3.embedded import EmbeddedProcess
from tests.store.conftest import Server, run_server

_numbers = itertools.count(1)


@pytest.fixture(scope="package")
def valkey() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        yield from run_server(Path(folder), cluster=False, fsync="no")


@pytest.fixture(scope="package")
def bucket_server() -> Iterator[EmbeddedProcess]:
    folder = Path(tempfile.mkdtemp(prefix="fleet-s3-", dir="/tmp"))
    try:
        with EmbeddedProcess(folder / "s3") as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3_server(bucket_server: EmbeddedProcess) -> Iterator[EmbeddedProcess]:
    """The server, up again for the next test however this one leaves it."""
    yield bucket_server
    if not bucket_server.running:
        bucket_server.start()


@pytest.fixture
async def store(valkey: Server) -> AsyncIterator[Store]:
    async with open_store(valkey.url, namespace=f"o{next(_numbers)}") as opened:
        yield opened


@pytest.fixture
async def world(store: Store, tmp_path: Path, s3_server: EmbeddedProcess) -> AsyncIterator[World]:
    async with world_on(store, tmp_path, s3_server) as opened:
        await emptied(opened.s3)
        yield opened


async def emptied(s3: S3Store) -> None:
    """The buckets without what earlier tests left."""
    for bucket in (OUTPUTS, WORKSPACE):
        found = await s3.list(bucket)
        await asyncio.gather(*(s3.delete(bucket, one.key) for one in found))
