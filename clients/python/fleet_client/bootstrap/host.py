"""A machine over SSH: programs run there, files brought there. Its key is always checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncssh

Said = Callable[[str], None]
Bytes = Callable[[int], None]
_CONNECT_SECONDS = 40


class HostError(RuntimeError):
    """Something on the host did not go; the text says what, and what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to, and as whom. `host_key` (TYPE BASE64) is the one key that is believed; else those of known_hosts."""

    host: str
    user: str | None = None
    port: int = 22
    host_key: str | None = None
    identities: tuple[Path, ...] = ()

    @classmethod
    def of(cls, text: str, *, port: int, host_key: str | None, identities: Sequence[Path]) -> Target:
        """USER@HOST or HOST. Raises HostError."""
        user, at, host = text.rpartition("@")
        if not host or (at and not user) or any(letter.isspace() for letter in text) or host.startswith("-"):
            raise HostError(f"{text!r}: must be USER@HOST")
        return cls(host.strip("[]"), user or None, port, host_key, tuple(identities))


class Host:
    """A connection; every method raises HostError."""

    def __init__(self, connection: asyncssh.SSHClientConnection) -> None:
        self._connection = connection

    async def run(self, *argv: str, given: str = "", fine: Sequence[int] = (0,)) -> str:
        """What the program printed, run without a shell's eyes on its words. `given` is its input, which it need not
        read."""
        process = await self._connection.create_process(shlex.join(argv))
        if given:
            # It may have ended already.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(given)
                process.stdin.write_eof()
        done = await process.wait()
        code = done.exit_status
        if code not in fine:
            said = _text(done.stderr) or _text(done.stdout) or f"exit code {code}"
            raise HostError(f"{argv[0]} on the host: {said.strip()[-2000:]}")
        return _text(done.stdout)

    async def script(self, text: str, *arguments: str, given: str = "") -> str:
        """The same for a text of sh; `given` is what it may read."""
        return await self.run("sh", "-c", text, "sh", *arguments, given=given)

    async def bring(self, files: Sequence[Path], folder: str, sent: Bytes) -> int:
        """Brings files that are not there whole already; how many were brought. `sent` hears of each part's bytes."""
        have = json.loads(await self.run("python3", "-c", _HASHES, folder))
        brought = 0
        async with self._connection.start_sftp_client() as sftp:
            for path in files:
                size = path.stat().st_size
                if have.get(path.name) == hashlib.sha256(path.read_bytes()).hexdigest():
                    sent(size)
                    continue
                done = [0]

                def heard(_from: bytes, _to: bytes, now: int, _size: int, done: list[int] = done) -> None:
                    sent(now - done[0])
                    done[0] = now

                fresh = f"{folder}/.{path.name}.part"
                await sftp.put(str(path), fresh, progress_handler=heard)
                await sftp.posix_rename(fresh, f"{folder}/{path.name}")
                brought += 1
        return brought

    async def write(self, path: str, text: str, *, mode: int = 0o644) -> bool:
        """Writes a file whole; False where it said so already."""
        async with self._connection.start_sftp_client() as sftp:
            try:
                async with sftp.open(path, "r") as stream:
                    if await stream.read() == text:
                        return False
            except asyncssh.SFTPError:
                pass
            fresh = f"{path}.new"
            async with sftp.open(fresh, "w", asyncssh.SFTPAttrs(permissions=mode)) as stream:
                await stream.write(text)
            await sftp.posix_rename(fresh, path)
        return True


@asynccontextmanager
async def connected(target: Target) -> AsyncIterator[Host]:
    """The host. Raises HostError where it is not reached, not the one it should be, or does not let us in."""
    options = asyncssh.SSHClientConnectionOptions(connect_timeout=_CONNECT_SECONDS, keepalive_interval=15)
    words: dict[str, object] = {}
    if target.user is not None:
        words["username"] = target.user
    if target.host_key is not None:
        words["known_hosts"] = trusted(target.host_key)
    if target.identities:
        words["client_keys"] = [str(path) for path in target.identities]
    try:
        async with asyncssh.connect(target.host, target.port, options=options, **words) as connection:
            try:
                yield Host(connection)
            except (asyncssh.Error, OSError) as error:
                raise HostError(f"{target.host}: {error}") from error
    except asyncssh.HostKeyNotVerifiable as error:
        raise HostError(
            f"{target.host}: its host key is not known here: look at it on the machine itself, then give it with "
            f"--host-key 'TYPE BASE64', or add it to known_hosts ({error})"
        ) from error
    except asyncssh.PermissionDenied as error:
        raise HostError(f"{target.host}: it does not let us in: {error}; name a key with --identity") from error
    except (asyncssh.Error, OSError, TimeoutError) as error:
        raise HostError(f"{target.host} port {target.port}: {error or 'no answer'}") from error


def trusted(host_key: str) -> tuple[list[asyncssh.SSHKey], list[asyncssh.SSHKey], list[asyncssh.SSHKey]]:
    """One public host key as all that is believed. Raises HostError."""
    try:
        return [asyncssh.import_public_key(host_key.strip() + "\n")], [], []
    except (asyncssh.KeyImportError, ValueError) as error:
        raise HostError(f"host key: must be TYPE BASE64 as in known_hosts: {error}") from error


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")


_HASHES = """
import hashlib, json, os, sys
folder = sys.argv[1]
os.makedirs(folder, mode=0o700, exist_ok=True)
found = {}
for name in os.listdir(folder):
    path = os.path.join(folder, name)
    if name.endswith(".whl") and os.path.isfile(path):
        with open(path, "rb") as stream:
            found[name] = hashlib.sha256(stream.read()).hexdigest()
print(json.dumps(found))
"""
