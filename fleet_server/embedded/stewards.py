"""Nodes that are reached by SSH: for each a steward, a child process that is an agent to us and an SSH client to it."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.embedded.agent import EmbeddedAgent
from fleet_server.store import NodeRow, Store

_log = structlog.get_logger("fleet.ssh")
_LOOK_SECONDS = 2.0
_making = threading.Lock()


class ServerKeyError(RuntimeError):
    """The key with which this server logs in cannot be used; the text says why."""


def server_key(folder: Path) -> tuple[Path, str]:
    """The private key's file, made at the first need, and the public key. Blocks. Raises ServerKeyError."""
    # Most servers reach no node by SSH, and the library takes its time: it asks a compiler for what it may use.
    import asyncssh

    path = folder / "id_ed25519"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _making:
            if not path.exists():
                key = asyncssh.generate_private_key("ssh-ed25519", comment="fleet-commander")
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(fd, "wb") as stream:
                    stream.write(key.export_private_key())
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ServerKeyError(f"{path}: others may read it: chmod 600 {path}")
        public = asyncssh.read_private_key(str(path)).export_public_key().decode().strip()
    except (OSError, asyncssh.KeyImportError) as error:
        raise ServerKeyError(f"{path}: {error}") from error
    return path, public


class Stewards:
    """Keeps a steward for each SSH node that was added here: rows of the store are the wish, `run` makes them so."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        replica: str,
        *,
        environment: Callable[[], Mapping[str, str]],
        lock_fd: int,
    ) -> None:
        self._store = store
        self._folder = folder
        self._replica = replica
        self._environment = environment
        self._lock_fd = lock_fd
        self._kept: dict[str, tuple[str, asyncio.Task[None]]] = {}
        self._look = asyncio.Event()

    @property
    def public_key(self) -> str:
        """What must stand in authorized_keys of the nodes. Blocks."""
        return server_key(self._folder)[1]

    def described(self, *, address: str, port: int, user: str, host_key: str) -> str:
        """How a node is reached, for the store. Blocks. Raises INVALID_FIELD for what is no public key."""
        import asyncssh

        try:
            key = asyncssh.import_public_key(host_key.strip() + "\n")
        except (asyncssh.KeyImportError, ValueError) as error:
            raise invalid_field("host_key", f"must be TYPE BASE64, as in known_hosts: {error}") from None
        whole = {"address": address, "port": port, "user": user, "home": self._replica}
        return json.dumps({**whole, "host_key": key.export_public_key().decode().strip()})

    def wake(self) -> None:
        """A node was added or deleted: look now."""
        self._look.set()

    async def release(self, node_id: str) -> None:
        """Ends the node's steward, which says goodbye; nothing where there is none."""
        kept = self._kept.pop(node_id, None)
        if kept is not None:
            await _ended(kept[1])

    async def run(self) -> None:
        """Until cancelled; then all stewards end."""
        try:
            while True:
                self._look.clear()
                try:
                    await self._settle(await self._store.nodes.list())
                except FleetError as error:
                    _log.warning("SSH nodes not looked at", detail=error.detail)
                try:
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await self._look.wait()
                except TimeoutError:
                    continue
        finally:
            kept, self._kept = self._kept, {}
            await asyncio.gather(*(_ended(task) for _, task in kept.values()))

    async def _settle(self, rows: list[NodeRow]) -> None:
        wanted = {row.node_id: row.ssh for row in rows if row.ssh and json.loads(row.ssh)["home"] == self._replica}
        for node_id, (ssh, _) in tuple(self._kept.items()):
            if wanted.get(node_id) != ssh:
                await self.release(node_id)
        for node_id, ssh in wanted.items():
            if node_id not in self._kept:
                self._kept[node_id] = ssh, asyncio.create_task(self._keep(node_id, ssh), name=f"steward {node_id}")

    async def _keep(self, node_id: str, ssh: str) -> None:
        about = json.loads(ssh)
        identity, _ = await asyncio.to_thread(server_key, self._folder)
        environment = {
            **self._environment(),
            "FLEET_AGENT_NODE_ID": node_id,
            "FLEET_AGENT_DATA_DIR": str(self._folder / node_id),
            "FLEET_SSH_HOST": about["address"],
            "FLEET_SSH_PORT": str(about["port"]),
            "FLEET_SSH_USER": about["user"],
            "FLEET_SSH_HOST_KEY": about["host_key"],
            "FLEET_SSH_IDENTITY": str(identity),
        }
        await EmbeddedAgent(environment, lock_fd=self._lock_fd, stop_seconds=15, module="fleet_agent.ssh").run()


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
