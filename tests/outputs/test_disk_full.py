"""A disk that is full: said as it is, nothing half, and well again when there is room."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from fleet.v1 import fleet_pb2
from google.api import httpbody_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.store import Store
from tests.outputs.world import World, world_on
from tests.parts import need

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    need("mount", "umount", root=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], check=True)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 300_000):
        yield data[at : at + 300_000]


async def write(world: World, name: str, data: bytes) -> None:
    sha256 = hashlib.sha256(data).hexdigest()
    await world.filing.local.write(name, chunks(data), size=len(data), sha256=sha256)


async def bring(world: World, data: bytes) -> None:
    async def sent() -> AsyncIterator[fleet_pb2.UploadInputRequest]:
        async for chunk in chunks(data):
            yield fleet_pb2.UploadInputRequest(content=httpbody_pb2.HttpBody(data=chunk))

    await world.filing.calls.inputs.receive(sent())


@pytest.mark.parametrize("room", ["outputs", "inputs"])
async def test_a_full_disk_is_told_and_forgotten(store: Store, small_disk: Path, room: str) -> None:
    async with world_on(store, small_disk, None) as world:
        data = b"x" * MIB

        async def one(name: str, size: int) -> None:
            await (write(world, name, data * size) if room == "outputs" else bring(world, data * size))

        await one("a.png", 2)
        for size in (2, 3, 9):
            with pytest.raises(FleetError) as caught:
                await one("b.png", size)
            assert (caught.value.reason, caught.value.code.name) == ("DISK_FULL", "UNAVAILABLE")
        (left,) = list((small_disk / room).iterdir())
        assert left.stat().st_size == 2 * MIB
        left.unlink()
        await one("b.png", 2)
        assert len(list((small_disk / room).iterdir())) == 1
