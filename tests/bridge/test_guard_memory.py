"""The guard remembers what it admitted by Host alone."""

from __future__ import annotations

from typing import Any

from tests.bridge.test_guard import Reached, make


async def test_what_was_admitted_once_admits_nothing_else() -> None:
    app = Reached()
    guard = make(app)
    statuses: list[int] = []

    async def ask(*headers: tuple[str, str], server: tuple[str, int] = ("192.0.2.1", 80)) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/api/x",
            "scheme": "http",
            "server": server,
            "headers": [(name.encode(), value.encode()) for name, value in headers],
        }
        await guard(scope, None, send)  # type: ignore[arg-type]
        status: int = sent[0]["status"]
        return status

    own = ("host", "192.0.2.1")
    for _ in range(2):
        statuses += [
            await ask(own),
            await ask(own, server=("192.0.2.2", 80)),
            await ask(own, ("origin", "https://evil.example")),
            await ask(own, ("sec-fetch-site", "cross-site")),
            await ask(own, own),
            await ask(("origin", "192.0.2.1")),
        ]
    assert statuses == [200, 403, 403, 403, 403, 403] * 2
