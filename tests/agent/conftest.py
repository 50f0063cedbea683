"""Engines for tests beside the built-in ones, and a server to talk to."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from tests.agent.helpers import PLUGINS, ScriptedServer


@pytest.fixture(autouse=True)
def probe_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots' children find the test engines by their entry points."""
    known = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{PLUGINS}{os.pathsep}{known}" if known else str(PLUGINS))


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer()
    await server.start()
    yield server
    await server.stop()
