"""A program that stores files by the product's own code, and says on its standard output what it may count on.

`python -m tests.outputs.storing FOLDER`. Each line is JSON: in which store, which name, the hash of its bytes; without
a hash it is being removed, and may be there or not from now on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from fleet.v1 import node_pb2

from fleet_agent import journal
from fleet_agent.disk import lasting_folder
from fleet_agent.model_shelf import ModelShelf, Source
from fleet_agent.spool import Spool
from fleet_server.embedded.s3_shelf import Shelf
from fleet_server.storage import outputs as module
from fleet_server.storage.outputs import LocalOutputs, OutputLimits

STORES = ("outputs", "spool", "shelf", "models")
SMALL = b"a small picture"
LARGE = b"".join(b"%07d " % number for number in range(2_500))
"""More than is received before the first write: see `main`."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def say(store: str, name: str, data: bytes | None) -> None:
    """One line, at once."""
    word = {"store": store, "name": name, "sha256": "" if data is None else sha256(data)}
    os.write(1, json.dumps(word).encode() + b"\n")


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 4096):
        yield data[at : at + 4096]


async def outputs(folder: Path) -> None:
    """The server's folder of outputs: small, large, again, of unknown size, removed, opened again."""
    limits = OutputLimits(reserve_bytes=0)
    local = LocalOutputs(folder / "data" / "outputs", limits)
    await local.open()
    for name, data in (("small.png", SMALL), ("large.png", LARGE), ("small.png", SMALL), ("empty.bin", b"")):
        await local.write(name, pieces(data), size=len(data), sha256=sha256(data))
        say("outputs", name, data)
    await local.take("taken.bin", pieces(LARGE))
    say("outputs", "taken.bin", LARGE)
    say("outputs", "small.png", None)
    await local.delete("small.png")
    await local.aclose()
    again = LocalOutputs(folder / "data" / "outputs", limits)
    await again.open()
    await again.write("late.png", pieces(SMALL), size=len(SMALL), sha256=sha256(SMALL))
    say("outputs", "late.png", SMALL)
    await again.aclose()


async def spool(folder: Path) -> None:
    """The agent's spool: ends with files, ends without, some of them forgotten, the journal written anew."""
    kept = Spool(folder / "agent" / "spool")
    for token, contents in (("t1", [SMALL, LARGE]), ("t2", [LARGE]), ("t3", [SMALL])):
        work = kept.work_folder(token)
        complete = node_pb2.JobComplete(job_id=token, token=token)
        for number, data in enumerate(contents):
            (work / f"{number}.png").write_bytes(data)
            complete.outputs.add(content_type="image/png")
        kept.add(complete, [(work / f"{number}.png", "image/png") for number in range(len(contents))])
        say("spool", token, b"".join(contents))
    say("spool", "t1", None)
    kept.remove("t1")
    for number in range(6):
        token = f"j{number}"
        await kept.keep(node_pb2.JobComplete(job_id=token, token=token))
        say("spool", token, b"")
        if number % 2:
            say("spool", token, None)
            kept.remove(token)
    await kept.aclose()


def shelf(folder: Path) -> None:
    """The embedded S3: objects, one in another's place, in parts, one removed."""
    shelf = Shelf(folder / "data" / "s3")
    shelf.add_bucket("b", 1)
    for key, data in (("small", SMALL), ("large", LARGE)):
        new = shelf.new_blob()
        new.write(data)
        blob = new.finish()
        shelf.put("b", key, blob, etag=blob.md5, headers={}, now_ms=2)
        say("shelf", key, data)
    blobs = []
    upload = shelf.begin("b", "joined", {}, 3)
    for number, data in enumerate((LARGE, SMALL), 1):
        new = shelf.new_blob()
        new.write(data)
        blobs.append(new.finish())
        shelf.add_part(upload, number, blobs[-1], 4)
    whole = shelf.joined([blob.name for blob in blobs])
    shelf.put("b", "joined", whole, etag=whole.md5, headers={}, now_ms=5)
    shelf.end(upload)
    say("shelf", "joined", LARGE + SMALL)
    say("shelf", "small", None)
    shelf.delete("b", "small")
    shelf.close()


def models(folder: Path) -> None:
    """The agent's folder of models: one brought in two goes, in a folder below."""
    lasting_folder(folder / "agent" / "models")
    shelf = ModelShelf(folder / "agent" / "models", sync_bytes=4096)
    shelf.open()
    source = Source("checkpoint", "sub/a.safetensors", "s3://fleet-models/sub/a.safetensors", len(LARGE), etag="e1")
    for until in (6_000, len(LARGE)):
        partial = shelf.partial(source)
        partial.open()
        for at in range(partial.size, until, 3_000):
            partial.write(LARGE[at : min(at + 3_000, until)])
        if until < len(LARGE):
            partial.close()
    partial.publish(shelf.path("checkpoint", source.name))
    say("models", source.name, LARGE)


def main() -> None:
    """All of them, one after the other."""
    # Small files go the ways of large ones.
    module._PIECE_BYTES = module.CHUNK_BYTES = 8192
    journal._TIDY_BYTES = 50
    root = Path(sys.argv[1])
    asyncio.run(outputs(root / "outputs"))
    asyncio.run(spool(root / "spool"))
    shelf(root / "shelf")
    models(root / "models")


if __name__ == "__main__":
    main()
