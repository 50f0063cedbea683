"""The program of the embedded S3: `python -m fleet_server.embedded.s3_server FOLDER FD...`, on sockets it inherits.

Keys and settings come by the environment (FLEET_S3_ACCESS_KEY, FLEET_S3_SECRET_KEY, FLEET_S3_REGION,
FLEET_DISK_FLOOR_BYTES). It ends in order at SIGTERM.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from pathlib import Path

import uvicorn

from fleet_server.embedded.s3_buckets import Buckets
from fleet_server.embedded.s3_gate import Gate
from fleet_server.embedded.s3_objects import Objects
from fleet_server.embedded.s3_shelf import Shelf
from fleet_server.storage.buckets import PUBLIC

_STALE_UPLOAD_MS = 7 * 86_400_000
_GRACE_SECONDS = 5
_IDLE_SECONDS = 75
"""Longer than clients keep an idle connection, which so is never closed in the moment of its next request."""


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


def gate(folder: Path, access_key: str, secret_key: str, *, region: str = "us-east-1", floor: int = 0) -> Gate:
    """The application over a folder."""
    shelf = Shelf(folder, stale_upload_ms=now_ms() - _STALE_UPLOAD_MS)
    return Gate(
        Buckets(shelf, clock=now_ms, region=region, public=PUBLIC),
        Objects(shelf, clock=now_ms, disk_floor_bytes=floor),
        {access_key: secret_key},
        PUBLIC,
    )


def main() -> None:
    """Runs until SIGTERM."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    os.umask(0o077)
    folder, *descriptors = sys.argv[1:]
    environment = os.environ
    app = gate(
        Path(folder),
        environment["FLEET_S3_ACCESS_KEY"],
        environment["FLEET_S3_SECRET_KEY"],
        region=environment.get("FLEET_S3_REGION", "us-east-1"),
        floor=int(environment.get("FLEET_DISK_FLOOR_BYTES", "0")),
    )
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    sockets = [socket.socket(fileno=int(number)) for number in descriptors]
    uvicorn.Server(config).run(sockets=sockets)


if __name__ == "__main__":
    main()
