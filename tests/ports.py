"""Ports for what is started again at the same address; everything else listens at port 0."""

from __future__ import annotations

import itertools
import os
import socket

# Below those that systems give to outgoing connections: there one of another test could take a port between its
# choice and its use, or while what listened on it is down.
_FIRST, _LAST, _WORKERS = 12_000, 32_000, 16
_SHARE = (_LAST - _FIRST) // _WORKERS
_BASE = _FIRST + _SHARE * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS)
# Each worker has ports of its own, and begins where another run of the tests hardly does.
_next = itertools.count(os.getpid() * 37)


def free_ports(count: int) -> list[int]:
    """So many ports that nobody listens on and that no other test is given."""
    found: list[int] = []
    for number in itertools.islice(_next, _SHARE):
        port = _BASE + number % _SHARE
        with socket.socket() as attempt:
            try:
                attempt.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} free ports from {_BASE} on")


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]
