"""Names of keys, and the scripts that are built of them."""

from __future__ import annotations

from typing import Any

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.store import Store, open_store
from fleet_server.store.keys import NAMES, Keys, table
from fleet_server.store.lua import build, load_scripts
from fleet_server.store.store import Store as StoreClass
from tests.store.conftest import Server
from tests.store.making import new_job, submit


def test_the_table_lists_every_key() -> None:
    assert {row.name for row in table()} == set(NAMES)


def test_all_keys_carry_the_tag() -> None:
    keys = Keys("fleet")
    whole = [*keys.whole_job("x"), keys.state("queued"), keys.held("n"), keys.idempotency("a", "b", "c"), keys.events]
    assert all(key.startswith("{fleet}:") for key in whole)
    with pytest.raises(ValueError, match="namespace"):
        Keys("a}b")


def test_idempotency_keys_do_not_run_together() -> None:
    keys = Keys("fleet")
    assert keys.idempotency("a", "bc", "d") != keys.idempotency("ab", "c", "d")


def test_scripts_are_whole() -> None:
    for script in load_scripts().values():
        assert script.source.startswith("#!lua")
        assert "K." not in script.source.replace("K.call", "")
        assert "include" not in script.source
    with pytest.raises(KeyError):
        build("x", "#!lua\nreturn K.nosuchkey", {})
    with pytest.raises(KeyError):
        build("x", "#!lua\n-- include: nosuchlib\n", {})


def test_what_frees_memory_may_run_without_any() -> None:
    may = {name for name, script in load_scripts().items() if "allow-oom" in script.source.split("\n", 1)[0]}
    assert {"cancel", "complete", "fail", "release", "renew", "reap", "purge", "started", "claim"} <= may
    assert not may & {"submit", "stage", "commit", "retry"}


async def test_a_key_outside_the_tag_is_refused_by_the_tests_user(server: Server, namespace: str) -> None:
    """The user of the tests may touch one namespace; a script that built another key would fail like this."""
    url = server.user_url(namespace)
    async with open_store(url, namespace=namespace) as store:
        await submit(store)
    async with open_store(url, namespace=f"{namespace}x") as other:
        with pytest.raises(FleetError) as caught:
            await submit(other)
    assert caught.value.reason == "INTERNAL"
    assert "NOPERM" in caught.value.detail


async def test_a_key_in_another_slot_fails_in_cluster_mode(cluster_server: Server, namespace: str, raw: Any) -> None:
    """The cluster run of these tests is worth something: a second slot is an error there."""
    scripts = dict(load_scripts())
    scripts["submit"] = build("submit", "#!lua\nredis.call('GET', '{elsewhere}:x') return {'ok', 0, 'x', false}", {})
    store = StoreClass(cluster_server.url, namespace, None, lambda row: b"", scripts)
    try:
        with pytest.raises(FleetError, match=r"slot|non local key"):
            await store.jobs.submit([new_job()])
    finally:
        await store.aclose()


async def test_namespaces_share_nothing(plain_server: Server, namespace: str) -> None:
    one: Store
    async with (
        open_store(plain_server.url, namespace=f"{namespace}a") as one,
        open_store(plain_server.url, namespace=f"{namespace}b") as two,
    ):
        job_id = await submit(one)
        assert await two.jobs.get(job_id) is None
