"""Posts whose time is over when a test says so: a short one would run out on a busy machine wherever it stands."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from fleet_server.services import webhook_post
from tests.webhooks.receiver import Received, Writer, hang


class Patience:
    """The time of the post that was begun last, for tests with one at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._last: asyncio.Timeout | None = None
        monkeypatch.setattr(webhook_post, "asyncio", SimpleNamespace(timeout=self._timeout))

    def _timeout(self, seconds: float) -> asyncio.Timeout:
        self._last = asyncio.timeout(seconds)
        return self._last

    def over(self) -> None:
        """The time of the post is up."""
        assert self._last is not None
        self._last.reschedule(asyncio.get_running_loop().time())

    async def hang(self, request: Received, writer: Writer) -> None:
        """Never answers: the sender's time is up as soon as its request is here."""
        self.over()
        await hang(request, writer)
