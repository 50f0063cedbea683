"""The API key that `--lan` makes at the first start and keeps in the data folder."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

_FILE = "api-key"


class OwnKeyError(RuntimeError):
    """The file cannot be used; the text says why and what to do."""


def own_key(folder: Path) -> tuple[str, bool]:
    """The key in the folder, and whether it was made just now: then it is told once. Raises OwnKeyError.

    The folder is there and locked.
    """
    path = folder / _FILE
    try:
        mode = path.stat().st_mode
        if stat.S_IMODE(mode) & 0o077:
            raise OwnKeyError(f"{path}: others may read it: chmod 600 {path}, and better remove it to get another key")
        key = path.read_text().strip()
        if len(key) < 16:
            raise OwnKeyError(f"{path}: holds no key: remove it to get another")
        return key, False
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OwnKeyError(f"{path}: {error.strerror}") from error
    key = f"fc_{secrets.token_urlsafe(32)}"
    fresh = path.with_suffix(".new")
    try:
        fresh.unlink(missing_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as stream:
            stream.write(key + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
    except OSError as error:
        raise OwnKeyError(f"{path}: {error.strerror}") from error
    return key, True
