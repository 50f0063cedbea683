"""Many callbacks through receivers that fail, hang, die and lie, with senders that are killed on the way.

FLEET_WEBHOOK_COUNT says how many (500); `make soak` sends 20,000.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from fleet_server.domain.webhook import DeliveryState, RetryPlan
from fleet_server.domain.webhook_signature import SecretBook
from fleet_server.services.callbacks import Address, CallbackRules
from fleet_server.services.webhook_hosts import HostLimits
from fleet_server.store import open_store
from tests.ports import free_port
from tests.waiting import wait_until
from tests.webhooks.receiver import How, Received, Writer, die, hang, receiving, reply, says
from tests.webhooks.works import SECRET, Works

# Read when the tests are collected: while they run, settings of the caller are hidden.
COUNT = int(os.environ.get("FLEET_WEBHOOK_COUNT", "500"))
SECONDS = max(300, COUNT // 10)
SEED = 20_261
RULES = CallbackRules(allowed=tuple(ipaddress.ip_network(f"127.0.0.{host}/32") for host in (2, 3, 4)), public=False)
# The schedule of production, a thousand times faster and more, and patient: bad luck alone must not give up on one.
PLAN = RetryPlan((5, 50, 100, 200, *[200] * 60), longest_ms=200)


class Fickle:
    """Names that lead to allowed receivers, and at every fourth look, or beside them, to the forbidden one."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    async def addresses(self, host: str) -> Sequence[Address]:
        good, bad = ipaddress.ip_address("127.0.0.2"), ipaddress.ip_address("127.0.0.1")
        if not host.startswith("fickle"):
            return [good]
        return self._rng.choice([[good], [good], [bad], [good, bad]])


def nasty(rng: random.Random) -> How:
    """Answers well in two of three cases, else in each of the bad ways."""
    bad: list[How] = [
        reply(500),
        reply(404),
        reply(429, Retry_After="1"),
        reply(503, Retry_After="soon"),
        reply(302, Location="http://127.0.0.1:1/"),
        says(b"no http at all"),
        says(b"HTTP/1.1 200"),
        die,
        hang,
    ]

    async def answer(request: Received, writer: Writer) -> None:
        await (reply(rng.choice([200, 201, 204])) if rng.random() < 0.66 else rng.choice(bad))(request, writer)

    return answer


@pytest.mark.timeout(SECONDS + 60)
async def test_each_of_many_arrives_under_one_id_and_nothing_reaches_a_forbidden_address(works: Works) -> None:
    rng = random.Random(SEED)
    port = free_port()
    async with (
        receiving("127.0.0.2", port) as first,
        receiving("127.0.0.3", port) as second,
        receiving("127.0.0.4", port) as slow,
        receiving("127.0.0.1", port) as forbidden,
        open_store(works.url, namespace=works.namespace) as other,
    ):
        first.otherwise = second.otherwise = nasty(rng)
        slow.answers = [hang] * 8
        first.secret = second.secret = slow.secret = SECRET.text
        hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.4", "steady.example", "fickle.example", "fickle2.example"]
        sent: list[str] = []

        def options() -> dict[str, object]:
            return {
                "rules": RULES,
                "names": Fickle(rng),
                "plan": PLAN,
                "seconds": 0.5,
                "lease_seconds": 1.5,
                "limits": HostLimits(per_host=16, defer_seconds=0.5),
                "book": SecretBook((SECRET,)),
            }

        async with works.sending(works.sender(**options())):  # type: ignore[arg-type]
            while len(sent) < COUNT:
                # A sender that is killed in the middle of what it does, as often as there are batches.
                doomed = asyncio.create_task(works.sender(other, **options()).run())  # type: ignore[arg-type]
                batch = min(100, COUNT - len(sent))
                sent += await works.ended(*(f"http://{rng.choice(hosts)}:{first.port}/" for _ in range(batch)))
                before = len(first.received)
                await wait_until(lambda before=before: len(first.received) > before)  # type: ignore[misc]
                doomed.cancel()
                await asyncio.wait([doomed])
            states: Counter[DeliveryState] = Counter()
            left = list(sent)

            async def over() -> bool:
                # Each is looked at until it has ended, the oldest first.
                while left:
                    found = (await works.row(left[-1])).state
                    if found is DeliveryState.PENDING:
                        return False
                    states[found] += 1
                    left.pop()
                return True

            await wait_until(over, seconds=SECONDS)

    assert states == {DeliveryState.DELIVERED: COUNT}
    received = first.received + second.received + slow.received
    for request in received:
        assert isinstance(request.told, dict), request.told
        job = request.told["data"]
        assert request.webhook_id == f"{job['job_id']}.{job['generation']}"
    arrivals = Counter(request.webhook_id for request in received)
    assert set(arrivals) == {f"{job_id}.1" for job_id in sent}
    # All of the receivers' bad ways were met, and none of them led anybody astray.
    assert len(received) > COUNT * 1.2
    assert forbidden.connections == 0
    print(f"{COUNT} callbacks, {len(received)} requests, at most {max(arrivals.values())} for one")  # noqa: T201
