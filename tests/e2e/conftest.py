"""One fleet for all tests of this folder that only use it; those that hurt it start their own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.fleet_process import FleetProcess


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetProcess]:
    """A running `fleet up`. The documented calls name a receiver on the internet: from here nobody writes to it."""
    within = {"FLEET_CALLBACK_ALLOW": "loopback"}
    with (
        tempfile.TemporaryDirectory(prefix="fleet-") as folder,
        FleetProcess(Path(folder) / "data", environment=within) as process,
    ):
        yield process
