"""Which folders of a node reached by SSH containers may see: the same rules, judged by the paths that it has there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

from fleet_agent.commands.faults import CommandFault
from fleet_agent.containers.mounts import MountPolicy
from fleet_agent.ssh.link import LinkError, SshLink

_SECONDS = 15.0


class SshMounts(MountPolicy):
    """`judge` is called in a thread, as the others' is. It raises NODE_OFFLINE too."""

    def __init__(self, roots: Iterable[Path], link: SshLink, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(roots)
        self._link = link
        self._loop = loop
        self._kept: frozenset[Path] | None = None

    def _closed(self) -> frozenset[Path]:
        """Asked once for each connection."""
        if self._kept is None:
            self._kept = frozenset((*self._trees, *map(self._real_root, self._trees)))
        return self._kept

    def _real(self, path: str) -> tuple[str, int]:
        try:
            return asyncio.run_coroutine_threadsafe(self._link.real(path), self._loop).result(_SECONDS)
        except (LinkError, TimeoutError) as error:
            raise CommandFault("NODE_OFFLINE", f"{error or 'the node does not answer by SSH'}: try again") from None
