"""The two servers, once a session each, and a store on either of them."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import S3Config, S3Limits
from tests.s3.differences import DIFFERENCES
from tests.s3.embedded import ACCESS, SECRET, EmbeddedProcess
from tests.s3.rgw import gateway

LIMITS = S3Limits(part_bytes=5 << 20, check_seconds=0.2, recheck_seconds=0.05)


@dataclass(frozen=True)
class Server:
    """One of the two. `config` has its keys."""

    name: str
    config: S3Config

    @property
    def endpoint(self) -> str:
        return self.config.endpoint

    def differs(self, what: str) -> Any:
        """What this server answers where the two differ."""
        return DIFFERENCES[what].of(self.name)


@pytest.fixture(scope="package", params=["embedded", "rgw"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Both servers, with the buckets made."""
    folder = Path(tempfile.mkdtemp(prefix="fleet-s3-", dir="/tmp"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if request.param == "rgw":
            endpoint = stack.enter_context(gateway(folder, ACCESS, SECRET))
        else:
            endpoint = stack.enter_context(EmbeddedProcess(folder / "s3")).endpoint
        config = S3Config(endpoint, ACCESS, SECRET)
        asyncio.run(_made_ready(config))
        yield Server(request.param, config)


async def _made_ready(config: S3Config) -> None:
    async with asyncio.timeout(100):
        store = S3Store(config)
        await store.open()
        await store.wait_well()
        await store.aclose()


@pytest.fixture
async def store(server: Server) -> AsyncIterator[S3Store]:
    """An opened store on that server; objects put by earlier tests are there too."""
    async with asyncio.timeout(50):
        one = S3Store(server.config, LIMITS)
        await one.open()
        await one.wait_well()
    yield one
    await one.aclose()
