"""A power cut at any point: what was acknowledged is there and whole, and no half file has its final name.

The stores of files run once, under strace; then each point of the trace is a cut, with all that may be left then, and
the product's own code opens it. For the store of jobs see tests/chaos/test_power.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleet_agent.model_shelf import ModelShelf, Source
from fleet_agent.spool import Spool
from fleet_server.embedded.s3_shelf import Shelf
from fleet_server.storage.outputs import LocalOutputs, OutputLimits
from tests.outputs.disk import STRACE, Call, Disk, Image, calls_of, word_of
from tests.outputs.storing import LARGE, STORES, sha256
from tests.parts import need

Kept = dict[str, str]
Dropped = Callable[[Call, Disk], bool]


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Path, list[Call]]]:
    """The calls of tests.outputs.storing, and the folder that it had."""
    need("strace")
    with tempfile.TemporaryDirectory(prefix="fleet-power-") as folder:
        root, trace = Path(folder) / "root", Path(folder) / "trace"
        for name in STORES:
            (root / name).mkdir(parents=True)
        program = [sys.executable, "-m", "tests.outputs.storing", str(root)]
        done = subprocess.run([*STRACE, "-o", str(trace), *program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        yield root, list(calls_of(trace.read_text()))


@pytest.fixture(autouse=True)
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What opens an image waits for no disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)


def outputs(folder: Path) -> Kept:
    async def look() -> Kept:
        local = LocalOutputs(folder / "data" / "outputs", OutputLimits(reserve_bytes=0))
        await local.open()
        try:
            return {one.filename: await local.sha256(one.filename) or "" for one in await local.listing()}
        finally:
            await local.aclose()

    return asyncio.run(look())


def spool(folder: Path) -> Kept:
    found = {}
    for entry in Spool(folder / "agent" / "spool").entries():
        contents = [(entry.folder / file.name).read_bytes() for file in entry.files]
        same = [sha256(data) for data in contents] == [file.sha256 for file in entry.files]
        found[entry.token] = sha256(b"".join(contents)) if same else "other bytes than it says"
    return found


def shelf(folder: Path) -> Kept:
    opened = Shelf(folder / "data" / "s3")
    try:
        found = {}
        for one in opened.keys("b", "", "", 100):
            if item := opened.get("b", one.key):
                with os.fdopen(opened.open_blob(item.blob), "rb") as file:
                    found[one.key] = hashlib.file_digest(file, "sha256").hexdigest()
        return found
    finally:
        opened.close()


def models(folder: Path) -> Kept:
    opened = ModelShelf(folder / "agent" / "models", sync_bytes=1 << 30)
    opened.open()
    found = {one.name: sha256(one.path.read_bytes()) for one in opened.survey()}
    if not found:
        # What counts as surely there is: the rest makes it whole.
        partial = opened.partial(
            Source("checkpoint", "sub/a.safetensors", "s3://fleet-models/sub/a.safetensors", len(LARGE), etag="e1")
        )
        partial.open()
        partial.write(LARGE[partial.size :])
        if partial.sha256 != sha256(LARGE):
            found["half"] = partial.sha256
        partial.close()
    return found


LOOKS: dict[str, Callable[[Path], Kept]] = {"outputs": outputs, "spool": spool, "shelf": shelf, "models": models}


class Cuts:
    """One store's images, each opened once."""

    def __init__(self, store: str, root: Path, calls: list[Call]) -> None:
        self._store, self._root, self._calls = store, root / store, calls
        words = [word for word in map(word_of, calls) if word is not None and word["store"] == store]
        self._whole = {word["name"]: word["sha256"] for word in words if word["sha256"]}
        self._seen: dict[Image, Kept] = {}
        self.points = 0

    def broken(self, dropped: Dropped | None = None) -> str:
        """The first promise that a cut breaks; "" where there is none. `dropped` are calls that are not made."""
        disk, acknowledged = Disk(self._root), set[str]()
        for call in self._calls:
            word = word_of(call)
            if word is not None:
                if word["store"] == self._store:
                    (acknowledged.add if word["sha256"] else acknowledged.discard)(word["name"])
                    if error := self._judged(disk, acknowledged, f"after {word}"):
                        return error
            elif (dropped is None or not dropped(call, disk)) and disk.play(call):
                self.points += 1
                if error := self._judged(disk, acknowledged, f"after {call.name} of {call.paths()}"):
                    return error
        return ""

    def _judged(self, disk: Disk, acknowledged: set[str], where: str) -> str:
        for image in set(disk.images()):
            if image not in self._seen:
                self._seen[image] = self._look(image)
            kept = self._seen[image]
            if missing := acknowledged - kept.keys():
                return f"lost {where}: {missing}"
            if half := {name for name, its in kept.items() if its != self._whole.get(name)}:
                return f"not whole {where}: {half}"
        return ""

    def _look(self, image: Image) -> Kept:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="fleet-power-", dir=memory) as folder:
            for path, data in sorted(image, key=lambda one: one[0]):
                if data is None:
                    (Path(folder) / path).mkdir()
                else:
                    (Path(folder) / path).write_bytes(data)
            try:
                return LOOKS[self._store](Path(folder))
            except (OSError, sqlite3.DatabaseError) as error:
                return {"all of it": str(error)}


@pytest.mark.parametrize("store", STORES)
def test_what_was_acknowledged_is_there_and_nothing_is_half(store: str, traced: tuple[Path, list[Call]]) -> None:
    cuts = Cuts(store, *traced)
    assert cuts.broken() == ""
    assert cuts.points >= 30
    renamed = [call.path(1) for call in traced[1] if call.name == "rename"]
    assert any(path.endswith("/journal") for path in renamed), "the journal was written anew"


def files_are_not_synced(call: Call, disk: Disk) -> bool:
    return call.name in ("fsync", "fdatasync") and not disk.is_folder(call)


def folders_are_not_synced(call: Call, disk: Disk) -> bool:
    return call.name in ("fsync", "fdatasync") and disk.is_folder(call)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dropped", [files_are_not_synced, folders_are_not_synced])
def test_without_its_syncs_a_store_breaks_its_word(
    store: str, dropped: Dropped, traced: tuple[Path, list[Call]]
) -> None:
    assert Cuts(store, *traced).broken(dropped) != ""
