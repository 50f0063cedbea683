"""Folders that a power cut leaves where they were made."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def lasting_folder(path: Path, mode: int = 0o777) -> None:
    """Makes a folder, and those above it, where they are not there; their names are on the disk when it returns.

    A file is sure to be found again when its folder's name is, too. Blocks. Raises OSError.
    """
    missing = []
    above = path
    while not above.is_dir():
        missing.append(above)
        above = above.parent
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)
    if not missing:
        # A crash may have come between its making and the sync; a folder above that we may not read was not made by us.
        with contextlib.suppress(OSError):
            sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """The names in a folder are on the disk when it returns. Blocks. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
