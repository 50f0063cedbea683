"""Where the secrets of callbacks come from: settings, a file of endpoints, and a file of our own at the first start."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from fleet_server.domain.webhook_signature import (
    LEAST_BYTES,
    Secret,
    SecretBook,
    SecretError,
    parse_endpoints,
    parse_secrets,
)

FILE_NAME = "webhook-secret"


@dataclass(frozen=True, slots=True)
class LoadedSecrets:
    """The secrets, and the file that was written because no default was given and none was there."""

    book: SecretBook
    made: Path | None = None


def load_secrets(data_dir: Path, given: str | None, endpoints_file: Path | None) -> LoadedSecrets:
    """The secrets of FLEET_WEBHOOK_SECRET and FLEET_WEBHOOK_SECRETS_FILE.

    Without the first, the one in `data_dir`/webhook-secret, made there if need be, readable by its owner alone. Raises
    SecretError, whose text names what to mend and holds no secret.
    """
    endpoints = () if endpoints_file is None else parse_endpoints(_read(endpoints_file, "FLEET_WEBHOOK_SECRETS_FILE"))
    if given is not None:
        return LoadedSecrets(SecretBook(parse_secrets(given), endpoints))
    path = data_dir / FILE_NAME
    made = _make(path)
    try:
        book = SecretBook(parse_secrets(_read(path, "the secret of callbacks")), endpoints)
    except SecretError as error:
        raise SecretError(f"{path}: {error}; mend it, or remove it for a new one") from None
    return LoadedSecrets(book, path if made else None)


def _make(path: Path) -> bool:
    """Writes a fresh secret unless the file is there; whether it did. No reader ever sees half of it."""
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(Secret(secrets.token_bytes(LEAST_BYTES + 8)).text + "\n")
            file.flush()
            os.fsync(file.fileno())
        # Fails where another server of this folder was quicker: then its secret counts.
        os.link(part, path)
    except FileExistsError:
        return False
    finally:
        part.unlink()
    return True


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SecretError(f"{name}: {path} cannot be read: {why}") from None
