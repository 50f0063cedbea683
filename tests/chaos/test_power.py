"""A power cut loses nothing that was accepted; with a store that syncs each second it would."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.chaos.power import cut, synced_bytes

CUTS = int(os.environ.get("FLEET_POWER_CUTS", "3"))

TRACE = """\
7  write(9</d/appendonly.aof.1.incr.aof>, ""..., 100) = 100
7  write(3</d/valkey.log>, ""..., 999) = 999
7  fdatasync(9</d/appendonly.aof.1.incr.aof>) = 0
8  fdatasync(9</d/appendonly.aof.1.incr.aof> <unfinished ...>
7  write(9</d/appendonly.aof.1.incr.aof>, ""..., 50) = 50
8  <... fdatasync resumed>) = 0
7  write(9</d/appendonly.aof.1.incr.aof>, ""..., 25) = 25
"""


def test_only_what_was_written_before_a_sync_began_counts_as_synced() -> None:
    assert synced_bytes(TRACE) == 100
    assert synced_bytes(TRACE + "7  fdatasync(9</d/appendonly.aof.1.incr.aof>) = 0\n") == 175


@pytest.fixture
def strace() -> None:
    if shutil.which("strace") is None:
        if os.environ.get("CI"):
            pytest.fail("strace is not installed: apt install strace")
        pytest.skip("strace is not installed: apt install strace")


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("number", range(CUTS))
async def test_a_power_cut_loses_no_accepted_job(number: int, tmp_path: Path) -> None:
    count = 30 + 20 * (number % 7)
    accepted, lost = await cut(tmp_path, appendfsync="always", count=count)
    assert accepted >= count
    assert lost == 0


@pytest.mark.usefixtures("strace")
async def test_a_store_that_syncs_each_second_loses_accepted_jobs(tmp_path: Path) -> None:
    lost = 0
    for number in range(5):
        # A cut right after the sync of a second takes nothing along.
        accepted, lost = await cut(tmp_path / str(number), appendfsync="everysec", count=30)
        assert accepted >= 30
        if lost:
            break
    assert lost > 0
