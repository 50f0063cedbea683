"""The fleet of this tutorial: what `make up` starts, on free ports."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_client import FleetCommander

from tests.e2e.fleet_process import FleetProcess


@pytest.fixture(scope="package")
def address() -> Iterator[str]:
    """Where the fleet is, such as http://localhost:8765."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder, FleetProcess(Path(folder) / "data") as process:
        yield process.url


@pytest.fixture
def fleet(address: str) -> Iterator[FleetCommander]:
    """A client of the fleet."""
    with FleetCommander(address) as client:
        yield client
