"""The connection: batches, cancelled callers, unknown outcomes, servers that go and come."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobState
from fleet_server.store import Held, Store, open_store
from fleet_server.store.client import MAX_BATCH_CALLS, Client, gather
from fleet_server.store.job_submit import MAX_ALONG
from fleet_server.store.lua import load_scripts
from tests.store.audit import audit, clear
from tests.store.conftest import Server
from tests.store.making import ERRORS, claim, new_job, running, submit, token, wish
from tests.store.proxy import Proxy, proxied
from tests.waiting import wait_until


@pytest.fixture
async def proxy(plain_server: Server, short_path: Path) -> AsyncIterator[Proxy]:
    async with proxied(plain_server.path, short_path / "p") as running_proxy:
        yield running_proxy


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[Client]:
    one = Client(f"unix://{proxy.path}", name="test", scripts=load_scripts())
    yield one
    await one.aclose()


@pytest.fixture
async def far(proxy: Proxy, plain_server: Server, namespace: str) -> AsyncIterator[Store]:
    """A store behind the proxy, whose indexes must be in order afterwards."""
    async with open_store(f"unix://{proxy.path}", namespace=namespace) as opened:
        yield opened
    client = plain_server.client()
    audit(client, namespace)
    clear(client, namespace)
    client.close()


async def test_what_is_posted_together_travels_together(client: Client) -> None:
    await client.call("PING")
    replies = await gather([client.post_call("ECHO", f"{i}") for i in range(100)])
    assert replies == [b"%d" % i for i in range(100)]
    assert MAX_BATCH_CALLS == 32


async def test_a_cancelled_caller_never_mixes_replies(client: Client) -> None:
    """Whoever leaves, each of the others gets its own reply (I13)."""
    rng = random.Random(7)
    wrong: list[tuple[str, bytes]] = []
    left = 0

    async def caller(number: int) -> None:
        nonlocal left
        text = f"reply-{number}"
        try:
            async with asyncio.timeout(rng.choice((0.0, 0.0005, 0.002, 5.0))):
                answer = await client.call("ECHO", text)
        except TimeoutError:
            left += 1
            return
        if answer != text.encode():
            wrong.append((text, answer))

    for start in range(0, 3000, 300):
        await asyncio.gather(*(caller(number) for number in range(start, start + 300)))
    assert wrong == []
    assert left > 100
    assert await client.call("ECHO", "after") == b"after"


async def test_a_cancelled_call_under_way_leaves_the_socket_alone(client: Client, proxy: Proxy) -> None:
    await client.call("PING")
    proxy.gate.clear()
    waiting = asyncio.ensure_future(client.call("ECHO", "mine"))
    other = asyncio.ensure_future(client.call("ECHO", "other"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    proxy.gate.set()
    assert await other == b"other"
    assert proxy.connections == 1


async def test_flushed_scripts_are_loaded_again(far: Store, plain_raw: Any) -> None:
    await submit(far)
    plain_raw.script_flush()
    await submit(far)
    assert (await far.jobs.counts())[JobState.QUEUED] == 2


async def test_the_server_is_away_and_comes_back(far: Store, proxy: Proxy) -> None:
    await submit(far)
    proxy.down = True
    proxy.drop_all()
    waiting = [asyncio.ensure_future(submit(far)) for _ in range(5)]
    before = proxy.connections
    await wait_until(lambda: proxy.connections > before + 1)
    proxy.down = False
    await asyncio.gather(*waiting)
    assert (await far.jobs.counts())[JobState.QUEUED] == 6


async def test_a_deadline_ends_the_wait(client: Client, proxy: Proxy) -> None:
    proxy.down = True
    with pytest.raises(FleetError) as caught:
        await client.call("PING", seconds=0.05)
    assert caught.value.reason == "STORE_UNAVAILABLE"
    assert caught.value.retry_after_seconds
    assert "unknown" not in caught.value.detail
    proxy.down = False
    assert await client.call("PING") == b"PONG"
    proxy.gate.clear()
    with pytest.raises(FleetError, match="unknown"):
        await client.call("PING", seconds=0.5)
    proxy.gate.set()
    assert await client.call("PING") == b"PONG"


async def test_an_outcome_that_stays_unknown_is_given_up(client: Client, proxy: Proxy) -> None:
    proxy.cut_after(lambda data: b"ECHO" in data, times=1000)
    with pytest.raises(FleetError, match="unknown"):
        await client.call("ECHO", "x")
    assert proxy.cuts == 6


async def test_close_answers_those_who_wait(client: Client, proxy: Proxy) -> None:
    await client.call("PING")
    proxy.gate.clear()
    waiting = [asyncio.ensure_future(client.call("PING")) for _ in range(40)]
    await asyncio.sleep(0)
    await client.aclose()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(one, FleetError) and one.reason == "STORE_UNAVAILABLE" for one in answers)
    with pytest.raises(FleetError):
        await client.call("PING")


async def test_a_fault_of_ours_is_internal(client: Client) -> None:
    with pytest.raises(FleetError) as caught:
        await client.call("NOSUCHCOMMAND")
    assert caught.value.reason == "INTERNAL"
    assert await client.call("PING") == b"PONG"


SHAS = {name: script.sha.encode() for name, script in load_scripts().items()}


def cut(proxy: Proxy, script: str) -> None:
    """The next call of a script takes effect, and its reply is lost."""
    proxy.cut_after(lambda data: SHAS[script] in data)


async def test_a_submit_whose_reply_was_lost_is_one_job(far: Store, proxy: Proxy) -> None:
    cut(proxy, "submit")
    submitted = await far.jobs.submit([new_job()])
    assert proxy.cuts == 1
    assert (submitted.positions, submitted.replayed) == ((1,), False)
    assert (await far.jobs.counts())[JobState.QUEUED] == 1


@pytest.mark.parametrize("script", ["stage", "commit"])
async def test_a_batch_whose_reply_was_lost_is_there_once(far: Store, proxy: Proxy, script: str) -> None:
    cut(proxy, script)
    size = MAX_ALONG + 1 if script == "stage" else 60
    submitted = await far.jobs.submit([new_job() for _ in range(size)])
    assert proxy.cuts == 1
    assert (submitted.positions, submitted.replayed) == (tuple(range(1, size + 1)), False)
    assert (await far.jobs.counts())[JobState.QUEUED] == size


async def test_a_claim_whose_reply_was_lost_takes_one_job(far: Store, proxy: Proxy) -> None:
    ids = [await submit(far), await submit(far)]
    cut(proxy, "claim")
    claimed = await claim(far)
    assert proxy.cuts == 1
    assert claimed.job.job_id == ids[0]
    assert (await far.jobs.counts())[JobState.RUNNING] == 1
    assert (await claim(far)).job.job_id == ids[1]


async def test_reports_whose_replies_were_lost_count_once(far: Store, proxy: Proxy) -> None:
    claimed = await claim_new(far)
    job_id = claimed.job.job_id
    cut(proxy, "started")
    record = await far.jobs.started(job_id, claimed.token)
    assert record is not None
    assert record.version == 3
    cut(proxy, "renew")
    assert await far.jobs.renew([Held(job_id, claimed.token, 5)], 1000) == []
    cut(proxy, "fail")
    failed = await far.jobs.fail(job_id, claimed.token, error=b"e", attempt=b"a", retryable=True)
    assert failed.outcome == "already"
    assert failed.record is not None
    assert failed.record.attempt == 1
    claimed = await claim(far)
    cut(proxy, "release")
    assert await far.jobs.release(job_id, claimed.token)
    claimed = await claim(far)
    assert claimed.job.attempt == 2
    cut(proxy, "complete")
    done = await far.jobs.complete(job_id, claimed.token, result=b"r")
    assert (done.outcome, proxy.cuts) == ("already", 5)
    events, _ = await far.events.read("0")
    assert [event.type for event in events].count("job_complete") == 1


async def claim_new(store: Store) -> Any:
    await submit(store)
    return await claim(store)


async def test_cancel_retry_and_loss_whose_replies_were_lost(far: Store, proxy: Proxy) -> None:
    job_id = await submit(far)
    cut(proxy, "cancel")
    assert (await far.jobs.cancel(job_id)).version == 2
    claimed = await running(far)
    await far.jobs.fail(claimed.job.job_id, claimed.token, error=b"e", attempt=b"a", retryable=False)
    cut(proxy, "retry")
    assert (await far.jobs.retry(claimed.job.job_id)).generation == 2
    claimed = await claim(far, "agx0", session="s1")
    await far.jobs.started(claimed.job.job_id, claimed.token)
    cut(proxy, "lose_session")
    await far.jobs.lose_session("agx0", "s1", error=ERRORS.lost)
    record = await far.jobs.get(claimed.job.job_id)
    assert record is not None
    assert (record.state, record.losses) == (JobState.QUEUED, 1)
    cut(proxy, "node_connect")
    assert await far.nodes.connect("n", session="s", instance_id="i", info=b"", replica="r") is None
    assert proxy.cuts == 4


async def test_random_cuts_lose_and_double_nothing(far: Store, proxy: Proxy) -> None:
    """Twenty callers while connections drop at random: every job ends once."""
    # For each connection its own: by these numbers no call is cut six times in a row, which would be the end of it.
    submits, others = random.Random(11), random.Random(11)

    def unlucky(data: bytes) -> bool:
        return b"EVALSHA" in data and (submits if SHAS["submit"] in data else others).random() < 0.25

    proxy.cut_after(unlucky, times=60)
    ids: list[str] = []
    completed: list[str] = []

    async def producer() -> None:
        for _ in range(6):
            job_id = await submit(far)
            ids.append(job_id)

    async def worker(node_id: str) -> None:
        while len(completed) < 60:
            (claimed,) = await far.jobs.claim([wish(node_id)])
            if claimed is None:
                await asyncio.sleep(0.001)
                continue
            await far.jobs.started(claimed.job.job_id, claimed.token)
            done = await far.jobs.complete(claimed.job.job_id, claimed.token, result=b"r")
            assert done.outcome in {"ok", "already"}
            completed.append(claimed.job.job_id)

    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(producer())
            group.create_task(worker(f"n{number}"))
    assert sorted(completed) == sorted(ids)
    assert len(set(ids)) == 60
    assert proxy.cuts > 5
    events, _ = await far.events.read("0", 10_000)
    assert [event.type for event in events].count("job_complete") == 60


async def test_memory_is_a_limit(plain_server: Server, namespace: str, plain_raw: Any) -> None:
    """Above 80 % of maxmemory submits are refused with QUEUE_FULL; work that runs can still end."""
    async with open_store(plain_server.url, namespace=namespace) as store:
        claimed = await running(store)
        try:
            plain_raw.config_set("maxmemory", plain_raw.info("memory")["used_memory"] + 1024)
            await asyncio.sleep(0)
            store.jobs._memory._read_at = float("-inf")
            with pytest.raises(FleetError) as caught:
                await submit(store)
            assert caught.value.reason == "QUEUE_FULL"
            plain_raw.config_set("maxmemory", 1)
            store.jobs._memory._last = (0, 0)
            for jobs in ([new_job()], [new_job(), new_job()]):
                with pytest.raises(FleetError) as caught:
                    await store.jobs.submit(jobs)
                assert caught.value.reason == "QUEUE_FULL"
            done = await store.jobs.complete(claimed.job.job_id, claimed.token, result=b"r")
            assert done.outcome == "ok"
        finally:
            plain_raw.config_set("maxmemory", 0)
        await submit(store)
    audit(plain_raw, namespace)


async def test_a_read_only_server_is_left_and_asked_again(plain_server: Server, namespace: str, plain_raw: Any) -> None:
    """READONLY (a demoted primary) drops the connection; the call waits until one takes writes."""
    async with open_store(plain_server.url, namespace=namespace) as store:
        await submit(store)
        plain_raw.replicaof("127.0.0.1", 1)
        try:
            waiting = asyncio.ensure_future(submit(store))
            await wait_until(lambda: plain_raw.info("stats")["total_error_replies"] > 1)
            assert not waiting.done()
        finally:
            plain_raw.replicaof("NO", "ONE")
        await waiting
        assert (await store.jobs.counts())[JobState.QUEUED] == 2


async def test_check_says_what_the_server_promises(plain_server: Server, plain_raw: Any) -> None:
    async with open_store(plain_server.url) as store:
        good = await store.check()
        assert (good.mode, bool(good.run_id)) == ("fsync", True)
        plain_raw.config_set("appendfsync", "everysec")
        try:
            weak = await store.check()
        finally:
            plain_raw.config_set("appendfsync", "always")
        assert weak.mode == "best-effort"
        assert "set it to always" in weak.detail
        await store.ping()
        used, most = await store.memory()
        assert used > 0
        assert most == 0
    assert token() != token()


async def test_nothing_listens(short_path: Path) -> None:
    async with open_store(f"unix://{short_path}/none") as store:
        with pytest.raises(FleetError) as caught:
            await store.ping()
    assert caught.value.reason == "STORE_UNAVAILABLE"
