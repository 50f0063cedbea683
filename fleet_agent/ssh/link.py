"""The SSH connection to a node that has no agent. Its host key is the one that was given; no other is believed."""

from __future__ import annotations

import asyncio
import shlex
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncssh

_DOCKER = "/var/run/docker.sock"


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


class SshLink:
    """One connection. `ended` returns when it is lost."""

    def __init__(self, connection: asyncssh.SSHClientConnection) -> None:
        self.connection = connection

    async def ended(self) -> None:
        """Returns when the connection is lost."""
        await self.connection.wait_closed()

    async def ask(self, script: str, *arguments: str, seconds: float = 15.0) -> str:
        """What a text of sh prints. Raises LinkError."""
        words = shlex.join(["sh", "-c", script, "sh", *arguments])
        try:
            async with asyncio.timeout(seconds):
                done = await self.connection.run(words, check=True)
        except (asyncssh.Error, OSError, TimeoutError) as error:
            raise LinkError(str(error) or "no answer") from error
        return str(done.stdout)

    async def real(self, path: str) -> tuple[str, int]:
        """The path after every symbolic link, and its mode. Raises FileNotFoundError, OSError."""
        try:
            async with self.connection.start_sftp_client() as sftp:
                found = await sftp.realpath(path)
                attributes = await sftp.stat(found)
        except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath) as error:
            raise FileNotFoundError(path) from error
        except asyncssh.Error as error:
            raise OSError(str(error)) from error
        mode = attributes.permissions
        return str(found), mode if mode is not None else stat.S_IFREG


@asynccontextmanager
async def linked(address: Address, socket: Path) -> AsyncIterator[SshLink]:
    """A connection, with the node's Docker socket at `socket` here while it lasts. Raises LinkError."""
    try:
        keys = [asyncssh.import_public_key(address.host_key.strip() + "\n")], [], []  # type: ignore[var-annotated]
    except (asyncssh.KeyImportError, ValueError) as error:
        raise LinkError(f"host_key: must be TYPE BASE64: {error}") from error
    await asyncio.to_thread(socket.unlink, True)
    try:
        connection = await asyncssh.connect(
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
    async with connection:
        forward = await connection.forward_local_path(str(socket), _DOCKER)
        try:
            await asyncio.to_thread(socket.chmod, 0o600)
            yield SshLink(connection)
        finally:
            forward.close()
            await asyncio.to_thread(socket.unlink, True)
