"""Which folders of a node reached by SSH containers may see: the same rules, judged by the paths that it has there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

from fleet_agent.containers.mounts import MountPolicy
from fleet_agent.ssh.link import SshLink


class SshMounts(MountPolicy):
    """`judge` is called in a thread, as the others' is."""

    def __init__(self, roots: Iterable[Path], link: SshLink, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(roots)
        self._link = link
        self._loop = loop

    def _real(self, path: str) -> tuple[str, int]:
        return asyncio.run_coroutine_threadsafe(self._link.real(path), self._loop).result(15)
