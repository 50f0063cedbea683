"""The lists of ComfyUI's prompts: nothing is in two of them, each end is told once, names are each owner's own."""

from __future__ import annotations

import asyncio

import pytest

from fleet_server.store import Store
from fleet_server.store.comfy import HISTORY


async def test_a_prompt_goes_from_the_open_ones_into_the_history_once(store: Store) -> None:
    comfy = store.comfy
    assert [await comfy.next_number() for _ in range(3)] == [0, 1, 2]
    assert await comfy.number() == 3
    for number, job_id in enumerate(("a", "b", "c")):
        await comfy.begin(job_id, 100 + number, owner="ann", client_id="me")
    assert await comfy.open() == [("a", 100), ("b", 101), ("c", 102)]
    assert (await comfy.end("b", 200), await comfy.end("b", 999)) == (True, False)
    assert await comfy.end("a", 300) and await comfy.end("c", None)
    assert await comfy.open() == [] and not await comfy.is_open("a")
    assert await comfy.ended(0, 10, newest=False) == ["b", "a"]
    assert await comfy.ended(0, 1, newest=True) == ["a"]
    assert await comfy.in_history(["a", "b", "c"]) == [True, True, False]
    await comfy.hide(["a", "nope"])
    assert await comfy.ended(0, 10, newest=True) == ["b"]
    assert not await comfy.end("never", 400) and await comfy.ended(0, 10, newest=True) == ["b"]


async def test_the_history_has_a_length(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet_server.store.comfy.HISTORY", 3)
    assert HISTORY == 10_000
    for number in range(5):
        await store.comfy.begin(str(number), number, owner="", client_id="")
        await store.comfy.end(str(number), number)
    assert await store.comfy.ended(0, 10, newest=False) == ["2", "3", "4"]


async def test_who_tells_an_end_is_decided_once(store: Store) -> None:
    await store.comfy.begin("a", 1, owner="ann", client_id="me")
    await store.comfy.begin("b", 1, owner="bob", client_id="me")
    await store.comfy.begin("c", 1, owner="ann", client_id="")
    assert await store.comfy.untold("ann", "me") == ["a"]
    told = await asyncio.gather(*(store.comfy.told("ann", "me", "a") for _ in range(20)))
    assert sum(told) == 1
    assert (await store.comfy.untold("ann", "me"), await store.comfy.untold("bob", "me")) == ([], ["b"])


async def test_names_and_what_nodes_have(store: Store) -> None:
    assert await store.comfy.put_file("ann", "input//a", b"1", only_new=True)
    assert not await store.comfy.put_file("ann", "input//a", b"2", only_new=True)
    assert await store.comfy.put_file("bob", "input//a", b"3", only_new=True)
    await store.comfy.put_file("bob", "input//a", b"4", only_new=False)
    assert (await store.comfy.file("ann", "input//a"), await store.comfy.file("bob", "input//a")) == (b"1", b"4")
    await store.comfy.drop_file("ann", "input//a")
    assert await store.comfy.file("ann", "input//a") is None
    await store.comfy.put_catalogue("n1", b"x")
    await store.comfy.put_catalogue("n2", b"y")
    await store.comfy.drop_catalogue("n1")
    assert dict(await store.comfy.catalogues()) == {"n2": b"y"}
    await store.comfy.note("a", b"note")
    assert await store.comfy.notes(["a", "b"]) == [b"note", None] and await store.comfy.notes([]) == []
