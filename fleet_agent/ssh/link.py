"""The SSH connection to a node that has no agent. Its host key is the one that was given; no other is believed."""

from __future__ import annotations

import asyncio
import shlex
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

DOCKER = "/var/run/docker.sock"
"""The node's engine."""
PROGRAMS = 5
"""Programs that share the one connection: sshd lets 10 sessions in on each by default, and some are for readings."""
_DIALS = 4


class LinkError(RuntimeError):
    """The node is not reached; the text says why."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the node is, who logs in, and with what."""

    host: str
    port: int
    user: str
    host_key: str
    identity: Path
    connect_seconds: float = 15.0


Dial = Callable[[], Awaitable[asyncssh.SSHClientConnection]]
Process = asyncssh.SSHClientProcess[bytes]


class SshLink:
    """One connection, and a further one for what finds no place on it. `ended` returns when the first is lost."""

    def __init__(self, connection: asyncssh.SSHClientConnection, dial: Dial) -> None:
        self._connection = connection
        self._dial = dial
        self._dialling = asyncio.Semaphore(_DIALS)
        self._programs = 0

    async def ended(self) -> None:
        """Returns when the connection is lost."""
        await self._connection.wait_closed()

    async def start(self, command: str, **terminal: Any) -> tuple[Process, Callable[[], None]]:
        """A program, and what is to be called when it has ended. Raises asyncssh.Error, LinkError."""
        if self._programs < PROGRAMS:
            self._programs += 1
            try:
                return await self._connection.create_process(command, encoding=None, **terminal), self._left
            except asyncssh.ChannelOpenError:
                # The host lets fewer in.
                self._left()
            except BaseException:
                self._left()
                raise
        connection = await self._another()
        try:
            return await connection.create_process(command, encoding=None, **terminal), connection.close
        except BaseException:
            connection.close()
            raise

    async def run(self, script: str, *arguments: str) -> asyncssh.SSHCompletedProcess:
        """How a text of sh ended. Raises asyncssh.Error, LinkError."""
        words = shlex.join(["sh", "-c", script, "sh", *arguments])
        try:
            return await self._connection.run(words, check=False)
        except asyncssh.ChannelOpenError:
            async with self._extra() as connection:
                return await connection.run(words, check=False)

    def _left(self) -> None:
        self._programs -= 1

    @asynccontextmanager
    async def _extra(self) -> AsyncGenerator[asyncssh.SSHClientConnection, None]:
        async with await self._another() as connection:
            yield connection

    async def _another(self) -> asyncssh.SSHClientConnection:
        # sshd drops some where many knock at once.
        async with self._dialling:
            return await self._dial()

    async def ask(self, script: str, *arguments: str, seconds: float = 15.0) -> str:
        """What a text of sh prints. Raises LinkError."""
        try:
            async with asyncio.timeout(seconds):
                done = await self.run(script, *arguments)
        except (asyncssh.Error, OSError, TimeoutError) as error:
            raise LinkError(str(error) or "no answer") from error
        if done.exit_status:
            raise LinkError(f"the host's shell fails with {done.exit_status}: {str(done.stderr).strip()[:200]}")
        return str(done.stdout)

    async def real(self, path: str) -> tuple[str, int]:
        """The path after every symbolic link, and its mode. Raises FileNotFoundError, PermissionError, LinkError."""
        try:
            return await _real(self._connection, path)
        except asyncssh.ChannelOpenError:
            async with self._extra() as connection:
                return await _real(connection, path)


async def _real(connection: asyncssh.SSHClientConnection, path: str) -> tuple[str, int]:
    try:
        async with connection.start_sftp_client() as sftp:
            found = await sftp.realpath(path)
            mode = (await sftp.stat(found)).permissions
    except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath) as error:
        raise FileNotFoundError(path) from error
    except asyncssh.ChannelOpenError:
        raise
    except asyncssh.SFTPError as error:
        raise PermissionError(path, str(error)) from error
    except (asyncssh.Error, OSError) as error:
        raise LinkError(f"files of the node cannot be looked at: {error or 'no answer'}") from error
    return str(found), mode if mode is not None else stat.S_IFREG


@asynccontextmanager
async def linked(address: Address, socket: Path) -> AsyncIterator[SshLink]:
    """A connection, with the node's Docker socket at `socket` here while it lasts. Raises LinkError."""
    await asyncio.to_thread(socket.unlink, True)
    async with await _dialled(address) as connection:
        forward = await connection.forward_local_path(str(socket), DOCKER)
        try:
            await asyncio.to_thread(socket.chmod, 0o600)
            yield SshLink(connection, lambda: _dialled(address))
        finally:
            forward.close()
            await asyncio.to_thread(socket.unlink, True)


async def _dialled(address: Address) -> asyncssh.SSHClientConnection:
    try:
        keys = [asyncssh.import_public_key(address.host_key.strip() + "\n")], [], []  # type: ignore[var-annotated]
    except (asyncssh.KeyImportError, ValueError) as error:
        raise LinkError(f"host_key: must be TYPE BASE64: {error}") from error
    try:
        return await asyncssh.connect(
            address.host,
            address.port,
            username=address.user,
            known_hosts=keys,
            client_keys=[str(address.identity)],
            agent_path=None,
            config=None,
            connect_timeout=address.connect_seconds,
            keepalive_interval=5,
            keepalive_count_max=2,
        )
    except asyncssh.HostKeyNotVerifiable as error:
        raise LinkError(f"{address.host} shows another host key than the one that was given: {error}") from error
    except asyncssh.PermissionDenied as error:
        raise LinkError(
            f"{address.user}@{address.host} does not let this server in: add its public key to authorized_keys there"
        ) from error
    except (asyncssh.Error, OSError, TimeoutError) as error:
        raise LinkError(f"{address.host} port {address.port}: {error or 'no answer'}") from error
