"""A page of the gallery with 100,000 outputs in the index: time on the server for each single filter.

    python -m bench.gallery [--outputs 100000] [--pages 300] [--limit 100]

No files are made: rows go into a real Valkey (fsync off while they are written), the index is built from them as a
server's is at its first start, and each page is asked for as the call does: what is new is taken from the store, the
page is found, and the reply is made JSON. Pages are asked for one after another, each with another value or place. What
other processes take of the cores is in the times; the cost in CPU is beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleet.v1 import types_pb2, vision_pb2

from bench._machine import heading
from fleet_server.filing import Filing
from fleet_server.protojson import JsonCodec, apply_defaults
from fleet_server.settings import Settings
from fleet_server.storage.s3 import S3Store
from fleet_server.store import OutputRow, Store, open_store
from tests.store.conftest import run_server

WORDS = tuple(f"{a}{b}" for a in ("sea", "sky", "moon", "glass", "iron", "rust", "pine", "salt") for b in "abcdefghij")
MODELS, NODES = 12, 20
START_MS = 1_763_805_600_000


def main() -> None:
    """Runs it and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--outputs", type=int, default=100_000)
    parser.add_argument("--pages", type=int, default=300, help="pages of each filter")
    parser.add_argument("--limit", type=int, default=100, help="pictures of a page")
    options = parser.parse_args()
    sys.stdout.write(heading() + "\n")
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        (Path(folder) / "store").mkdir()
        with contextmanager(run_server)(Path(folder) / "store", cluster=False, fsync="no") as server:
            asyncio.run(_run(server.url, Path(folder), options.outputs, options.pages, options.limit))


async def _run(url: str, folder: Path, outputs: int, pages: int, limit: int) -> None:
    async with open_store(url) as store:
        await _fill(store, outputs)
        filing = Filing(Settings(data_dir=folder), store, S3Store(None), "bench", lambda: time.time_ns() // 1_000_000)
        await filing.open()
        try:
            began, cpu = time.perf_counter(), time.process_time()
            await filing.gallery.list(_request({}, limit))
            _say(f"the index of {outputs:,} outputs was built in {time.perf_counter() - began:.1f} s, "
                 f"{time.process_time() - cpu:.1f} s of CPU\n")  # fmt: skip
            _say(
                f"{'':<16}{'wall ms':>16}{'CPU ms':>16}\n{'filter':<16}" + f"{'p50':>8}{'p99':>8}" * 2 + f"{'rows':>7}"
            )
            for name, draw in _filters(outputs).items():
                await _measure(filing, name, draw, pages, limit)
        finally:
            await filing.close()


async def _measure(
    filing: Filing, name: str, draw: Callable[[random.Random], dict[str, Any]], pages: int, limit: int
) -> None:
    codec, dice = JsonCodec(), random.Random(11)
    times, costs, rows = [], [], 0
    for _ in range(pages):
        request = _request(draw(dice), limit)
        began, cpu = time.perf_counter(), time.process_time()
        images, token = await filing.gallery.list(request)
        codec.encode_bytes(vision_pb2.ListGalleryResponse(images=images, next_page_token=token))
        times.append(1000 * (time.perf_counter() - began))
        costs.append(1000 * (time.process_time() - cpu))
        rows += len(images)
    _say(
        f"{name:<16}"
        + "".join(f"{value:>8.1f}" for value in (*_parts(times), *_parts(costs)))
        + f"{rows / pages:>7.0f}"
    )


def _parts(values: list[float]) -> tuple[float, float]:
    """The median and the 99th of a hundred."""
    values.sort()
    return values[len(values) // 2], values[min(len(values) - 1, int(len(values) * 0.99))]


def _filters(outputs: int) -> dict[str, Callable[[random.Random], dict[str, Any]]]:
    def moment(dice: random.Random) -> str:
        at = START_MS + dice.randrange(outputs) * 1_000
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at / 1_000))

    return {
        "none": lambda dice: {},
        "model": lambda dice: {"model": f"model-{dice.randrange(MODELS)}"},
        "node_id": lambda dice: {"node_id": f"node-{dice.randrange(NODES)}"},
        "starred": lambda dice: {"starred": True},
        "not starred": lambda dice: {"starred": False},
        "one word": lambda dice: {"prompt": dice.choice(WORDS)},
        "three words": lambda dice: {"prompt": " ".join(dice.sample(WORDS, 3))},
        "no such word": lambda dice: {"prompt": "unheard"},
        "job_id": lambda dice: {"job_id": f"job-{dice.randrange(outputs)}"},
        "created_before": lambda dice: {"created_before": moment(dice)},
        "created_after": lambda dice: {"created_after": moment(dice)},
    }


def _request(fields: dict[str, Any], limit: int) -> vision_pb2.ListGalleryRequest:
    request = vision_pb2.ListGalleryRequest()
    JsonCodec().decode_into(request, {**fields, "limit": limit})
    apply_defaults(request)
    return request


async def _fill(store: Store, outputs: int) -> None:
    dice = random.Random(7)
    for start in range(0, outputs, 500):
        rows = [_row(number, dice) for number in range(start, min(outputs, start + 500))]
        await asyncio.gather(*(store.outputs.put(row) for row in rows))
        await asyncio.gather(*(store.outputs.star(row.filename, True) for row in rows if dice.random() < 0.02))


def _row(number: int, dice: random.Random) -> OutputRow:
    filename = f"{dice.getrandbits(128):032x}.png"
    at_ms = START_MS + number * 1_000
    model = f"model-{dice.randrange(MODELS)}"
    record = types_pb2.Output(
        filename=filename,
        url=f"/api/vision/outputs/{filename}",
        thumbnail_url=f"/api/vision/outputs/{filename}?width=256",
        sources=["local"],
        content_type="image/png",
        size_bytes=1_489_220,
        sha256=f"{dice.getrandbits(256):064x}",
        width=1024,
        height=1024,
        seed=dice.randrange(1 << 53),
        job_id=f"job-{number}",
        node_id=f"node-{dice.randrange(NODES)}",
        metadata=types_pb2.OutputMetadata(
            job_type=types_pb2.JOB_TYPE_IMAGE_GEN, prompt=" ".join(dice.choices(WORDS, k=12)),
            negative_prompt="blurry, bad quality", model=model, resolved_model=model, steps=20, guidance_scale=7.5,
            engine="diffusers", engine_version="1.0.0", model_sha256="ab" * 32,
        ),
    )  # fmt: skip
    record.create_time.FromMilliseconds(at_ms)
    return OutputRow(filename, f"job-{number}", at_ms, 1_489_220, record.SerializeToString(), home="bench")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
