"""The clients' calls about callbacks: where they go, and what `fleet jobs` shows of them."""

from __future__ import annotations

import pytest
from fleet_client import AsyncFleetCommander, FleetCommander

from tests.clients.serving import Scripted, reply, serving
from tests.e2e.commands import fleet_command

DELIVERY = {
    "delivery_id": "d-1", "job_id": "j/1", "generation": 1, "webhook_id": "j/1.1", "url": "https://your-app.com/webhook",
    "status": "failed", "attempts": [{"time": "", "status_code": 410, "duration_seconds": 0.1, "detail": "410 Gone"}],
    "next_attempt_time": None, "create_time": "2026-11-23T00:00:00Z", "end_time": "2026-11-23T00:00:01Z",
}  # fmt: skip
PAGE = {"deliveries": [DELIVERY], "next_page_token": ""}


def asked(server: Scripted) -> list[tuple[str, str, str]]:
    scopes = [request.scope for request in server.asked]
    return [(scope["method"], scope["raw_path"].decode(), scope["query_string"].decode()) for scope in scopes]


WANTED = [
    ("GET", "/api/queue/jobs/j%2F1/deliveries", "limit=5"),
    ("POST", "/api/queue/jobs/j%2F1/deliveries/d-1/redeliver", ""),
    ("POST", "/api/queue/jobs/j%2F1/deliveries/d-1/redeliver", "request_id=once"),
]


def test_the_blocking_client_asks_rightly() -> None:
    with serving(reply(PAGE), reply(DELIVERY)) as server, FleetCommander(server.url) as client:
        assert client.list_deliveries("j/1", limit=5, page_token=None) == PAGE
        assert client.redeliver("j/1", "d-1") == DELIVERY
        assert client.redeliver("j/1", "d-1", "once") == DELIVERY
    assert asked(server) == WANTED


async def test_the_asynchronous_client_asks_the_same() -> None:
    with serving(reply(PAGE), reply(DELIVERY)) as server:
        async with AsyncFleetCommander(server.url) as client:
            assert await client.list_deliveries("j/1", limit=5) == PAGE
            assert await client.redeliver("j/1", "d-1") == DELIVERY
            assert await client.redeliver("j/1", "d-1", "once") == DELIVERY
    assert asked(server) == WANTED


@pytest.mark.parametrize(("page", "shown"), [(PAGE, "410 Gone"), ({**PAGE, "deliveries": []}, "no callbacks")])
def test_the_command_shows_them(page: dict[str, object], shown: str) -> None:
    with serving(reply(page)) as server:
        result = fleet_command("jobs", "deliveries", "j", url=server.url)
    assert result.exit_code == 0
    assert shown in result.output
