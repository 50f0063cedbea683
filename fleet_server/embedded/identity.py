"""The name of a server among its replicas: the same after every restart on its folder, another on another folder."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

_FILE = "server-id"


def server_name(folder: Path) -> str:
    """This machine's name and a number drawn once for the folder, kept in it.

    The folder is there and locked. Raises OSError where it cannot be written.
    """
    path = folder / _FILE
    try:
        name = path.read_text().strip()
    except FileNotFoundError:
        name = ""
    if not name:
        name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        fresh = path.with_suffix(".new")
        fresh.write_text(name + "\n")
        fresh.replace(path)
    return name
