"""Names of receivers to addresses, by the machine's resolver in a bounded number of threads."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections.abc import Sequence
from typing import Protocol

from fleet_server.services.callbacks import Address


class NoSuchNameError(Exception):
    """The name has no address, or nobody could say."""


class Names(Protocol):
    """Finds the addresses of a host."""

    async def addresses(self, host: str) -> Sequence[Address]:
        """All addresses that `host` has now, one at least. Raises NoSuchNameError."""
        ...


def _look_up(host: str) -> list[Address]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    # A zone (fe80::1%eth0) is left out: such an address is judged as what it is.
    texts = dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found)
    return [ipaddress.ip_address(text) for text in texts]


class SystemNames:
    """The machine's own resolver, /etc/hosts included.

    At most `threads` look-ups run at once, one for each name, however many wait for it; a name server that does not
    answer therefore holds one thread, and its caller no longer than the caller's deadline. The threads are no reason to
    stay: they end with the process.
    """

    def __init__(self, threads: int = 16) -> None:
        self._free = asyncio.Semaphore(threads)
        self._under_way: dict[str, asyncio.Task[list[Address]]] = {}

    async def addresses(self, host: str) -> Sequence[Address]:
        """See `Names`."""
        task = self._under_way.get(host)
        if task is None:
            task = asyncio.create_task(self._ask(host), name=f"look-up {host}")
            self._under_way[host] = task
            task.add_done_callback(lambda done: self._done(host, done))
        return await asyncio.shield(task)

    async def aclose(self) -> None:
        """Waits for nobody: look-ups under way are left to their threads."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, host: str, task: asyncio.Task[list[Address]]) -> None:
        del self._under_way[host]
        if not task.cancelled():
            # Seen, even where everybody who asked has left.
            task.exception()

    async def _ask(self, host: str) -> list[Address]:
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[list[Address]] = loop.create_future()

        def settle(found: list[Address] | None) -> None:
            self._free.release()
            if reply.done():
                return
            if found:
                reply.set_result(found)
            else:
                reply.set_exception(NoSuchNameError(host))

        def work() -> None:
            found = None
            # UnicodeError: a label that is too long for the resolver's codec.
            with contextlib.suppress(OSError, UnicodeError, ValueError):
                found = _look_up(host)
            # The loop may be closed by now: then nobody waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, found)

        await self._free.acquire()
        threading.Thread(target=work, name=f"look-up {host}", daemon=True).start()
        return await reply
