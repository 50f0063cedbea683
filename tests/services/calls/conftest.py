"""A real Valkey for the session; a namespace of its own and a desk on it for each test."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from fleet_server.store import Store, open_store
from tests.services.calls.desk import Desk, desk_on
from tests.store.conftest import Server, run_server

_numbers = itertools.count(1)


@pytest.fixture(scope="package")
def valkey() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        yield from run_server(Path(folder), cluster=False)


@pytest.fixture
async def store(valkey: Server) -> AsyncIterator[Store]:
    async with open_store(valkey.url, namespace=f"c{next(_numbers)}") as opened:
        yield opened


@pytest.fixture
async def desk(store: Store, tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_on(store, tmp_path) as opened:
        yield opened
