"""A real Valkey for the session, and a namespace of its own for each test."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from fleet_server.store import open_store
from tests.store.conftest import Server, run_server
from tests.webhooks.works import Works

_numbers = itertools.count(1)


@pytest.fixture(scope="package")
def valkey() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        yield from run_server(Path(folder), cluster=False)


@pytest.fixture
async def works(valkey: Server) -> AsyncIterator[Works]:
    namespace = f"w{next(_numbers)}"
    async with open_store(valkey.url, namespace=namespace) as store:
        yield Works(store, valkey.url, namespace)
