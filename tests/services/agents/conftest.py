"""A real Valkey for the session; a namespace of its own and a bench on it for each test."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from fleet_server.store import Store, open_store
from tests.services.agents.bench import Bench, bench_on
from tests.services.agents.pair import Pair, opened
from tests.store.conftest import Server, run_server

_numbers = itertools.count(1)


@pytest.fixture(scope="package")
def valkey() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        yield from run_server(Path(folder), cluster=False)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for a unix socket's name."""
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
async def store(valkey: Server) -> AsyncIterator[Store]:
    async with open_store(valkey.url, namespace=f"a{next(_numbers)}") as opened:
        yield opened


@pytest.fixture
async def bench(store: Store, short_path: Path) -> AsyncIterator[Bench]:
    async with bench_on(store, short_path) as opened:
        yield opened


@pytest.fixture
async def pair(store: Store) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        yield Pair(await opened(stack, store, "a"), await opened(stack, store, "b"), stack)
