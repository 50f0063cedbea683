"""These tests run on uvloop, as the server does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import uvloop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loops of the tests in this folder."""
    return {"uvloop": uvloop.new_event_loop}
