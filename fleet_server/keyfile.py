"""FLEET_API_KEYS_FILE: who may call, a line each, read again when it changes."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from fleet_server.rpc.auth import ApiKey

_log = structlog.get_logger("fleet.keys")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_KEY = re.compile(r"[!-9;-~]{16,256}")
_FORM = "must be name:key or name:key:admin"
_MOST_BYTES = 1 << 20
_KEYS_OF_A_NAME = 2
RESERVED = frozenset({"fleet-agent"})
"""Names that this server gives to keys of its own."""


class KeyFileError(Exception):
    """The file cannot be used; the text names it, the line where one is at fault, and what to do. Never a key."""


class KeyFile:
    """The keys of one file, beside `others` that were set otherwise. `on_change` is given all keys after each change.

    A file that has become unreadable or wrong changes nothing: the keys before stay, and the log says why.
    """

    def __init__(
        self,
        path: Path,
        others: Sequence[ApiKey],
        on_change: Callable[[Sequence[ApiKey]], None],
        *,
        poll_seconds: float = 2.0,
        published: frozenset[str] = frozenset(),
    ) -> None:
        self._path = path
        self._others = tuple(others)
        self._on_change = on_change
        self._poll_seconds = poll_seconds
        self._published = published
        self._seen: tuple[int, int, int] | None = None
        self._told = asyncio.Event()

    def load(self) -> None:
        """Reads the file and hands on the keys. Raises KeyFileError."""
        self._seen = _mark(self._path)
        keys = [*self._others, *parse(self._path, _text(self._path), published=self._published)]
        taken = {key.name for key in self._others}
        for key in keys[len(self._others) :]:
            if key.name in taken:
                raise KeyFileError(
                    f"{self._path}: the name {key.name} is the one of FLEET_API_KEY: give it another name, "
                    "or leave FLEET_API_KEY out"
                )
        if len({key.digest for key in keys}) < len(keys):
            raise KeyFileError(f"{self._path}: FLEET_API_KEY stands there under another name: one key has one name")
        self._on_change(keys)

    def reload(self) -> None:
        """Reads it again at once, as SIGHUP asks; to be called in the loop's thread."""
        self._seen = None
        self._told.set()

    async def run(self) -> None:
        """Looks for changes until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._poll_seconds):
                    await self._told.wait()
            except TimeoutError:
                pass
            self._told.clear()
            if self._seen == await asyncio.to_thread(_mark, self._path):
                continue
            try:
                self.load()
            except KeyFileError as error:
                _log.error("the keys stay as they were", why=str(error))
            else:
                _log.info("the API keys have been read again", file=str(self._path))


def parse(path: Path, text: str, *, published: frozenset[str] = frozenset()) -> list[ApiKey]:
    """The keys of the file's text. A name may have two keys at a time, so that one can be replaced.

    Raises KeyFileError naming file and line; keys in `published` are refused.
    """
    keys: list[ApiKey] = []
    lines: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        key = _line(words, f"{path}:{number}", published)
        if key.digest in lines:
            raise KeyFileError(f"{path}:{number}: this key stands in line {lines[key.digest]} too: give each its own")
        lines[key.digest] = number
        keys.append(key)
        same = [other for other in keys if other.name == key.name]
        if len(same) > _KEYS_OF_A_NAME:
            raise KeyFileError(f"{path}:{number}: {key.name} has two keys already: remove the old one")
        if len({other.admin for other in same}) > 1:
            raise KeyFileError(f"{path}:{number}: {key.name} is an admin in one line alone: add :admin to both")
    if not keys:
        raise KeyFileError(f"{path}: there is no key in it: write a line such as ann:KEY:admin")
    return keys


def _line(words: str, where: str, published: frozenset[str]) -> ApiKey:
    name, _, rest = words.partition(":")
    key, colon, role = rest.partition(":")
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"{where}: {_FORM}; a name is 1 to 63 letters, digits, '.', '_' and '-'")
    if name in RESERVED:
        raise KeyFileError(f"{where}: the name {name} is taken by this server: choose another")
    if not _KEY.fullmatch(key):
        raise KeyFileError(
            f"{where}: {_FORM}; a key is 16 to 256 visible ASCII characters without ':', "
            "for instance from `openssl rand -hex 32`"
        )
    if colon and role != "admin":
        raise KeyFileError(f"{where}: {_FORM}; the third word can only be admin")
    if key in published:
        raise KeyFileError(f"{where}: this key is a published example: choose one of your own")
    return ApiKey.of(name, key, admin=bool(colon))


def _text(path: Path) -> str:
    try:
        # A pipe would otherwise keep us waiting for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}: correct FLEET_API_KEYS_FILE") from None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise KeyFileError(f"{path}: is no file: correct FLEET_API_KEYS_FILE")
        if mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise KeyFileError(f"{path}: others may read or change it: chmod 600 {path}")
        with open(fd, "rb", closefd=False) as stream:
            data = stream.read(_MOST_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > _MOST_BYTES:
        raise KeyFileError(f"{path}: is larger than {_MOST_BYTES:,} bytes: it should hold keys alone")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise KeyFileError(f"{path}: is no UTF-8 text: write a line name:key for each key") from None


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
