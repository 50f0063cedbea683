"""One fleet for all tests of this folder that only use it; those that hurt it start their own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.fleet_process import FleetProcess


@pytest.fixture(scope="package")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetProcess]:
    """A running `fleet up`, with S3. The documented calls name a receiver on the internet: from here nobody writes to
    it."""
    within = {"FLEET_CALLBACK_ALLOW": "loopback", "FLEET_S3_PORT": "0"}
    with (
        tempfile.TemporaryDirectory(prefix="fleet-") as folder,
        FleetProcess(Path(folder) / "data", environment=within) as process,
    ):
        yield process


@pytest.fixture(scope="package")
def quiet() -> Iterator[httpx.Client]:
    """The door of a fleet on which nothing ever runs: nobody's job may end while what is stored is counted."""
    with (
        tempfile.TemporaryDirectory(prefix="fleet-") as folder,
        FleetProcess(Path(folder) / "data") as process,
        httpx.Client(base_url=process.url, timeout=60) as session,
    ):
        yield session


@pytest.fixture
def nothing_stored(quiet: httpx.Client) -> Iterator[None]:
    """The test may leave no job or output behind on it."""

    def stored() -> tuple[int, int]:
        jobs = quiet.get("/api/status").json()["jobs"]
        images = quiet.get("/api/vision/gallery", params={"limit": 1000}).json()["images"]
        return sum(jobs.values()), len(images)

    before = stored()
    yield
    assert stored() == before
