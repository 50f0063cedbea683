"""Clients' sockets: each hears of its own prompts alone, also when it comes back."""

from __future__ import annotations

import uuid
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from tests.comfy.client import Listener
from tests.comfy.house import House, progress
from tests.comfy_node import Failure

Json = Any


def test_frames_go_to_who_submitted_and_to_nobody_else(house: House) -> None:
    house.nodes["n1"].script.step_seconds = 0.15
    with Listener(house.socket_url, "one") as one, Listener(house.socket_url, "two", metadata=True) as two:
        two.wait(kind="feature_flags")
        first = house.submit(progress(seed=1), client_id="one")
        second = house.submit(progress(seed=2), client_id="two")
        nobody = house.submit(progress(seed=3))
        one.wait(kind="end", prompt_id=first)
        two.wait(kind="end", prompt_id=second)
        house.entry(nobody)
        for client, own, framing in ((one, first, "binary 1"), (two, second, "binary 4")):
            told = {frame["data"].get("prompt_id", own) for frame in client.frames if isinstance(frame, dict)}
            assert told == {own}
            assert {kind for kind in client.kinds() if kind.startswith("binary")} == {framing}
            assert client.kinds().count("end") == 1


def test_without_a_client_id_one_is_made(house: House) -> None:
    with Listener(house.socket_url) as client:
        sid = client.wait(kind="status")[0]["sid"]
        assert len(sid) == 32
        prompt_id = house.submit(progress(seed=4), client_id=sid)
        client.wait(kind="end", prompt_id=prompt_id)


def test_who_comes_back_is_told_where_it_stands_and_the_old_socket_goes(house: House) -> None:
    node = house.nodes["n1"]
    node.script.hold_at = 3
    with Listener(house.socket_url, "back") as first:
        prompt_id = house.submit(progress(seed=5), client_id="back")
        first.wait(2, kind="progress", prompt_id=prompt_id)
        with Listener(house.socket_url, "back") as second:
            assert first.wait_closed() == 1000
            assert second.wait(kind="executing")[0] == {"node": "1", "display_node": "1", "prompt_id": prompt_id}
            states = second.wait(kind="progress_state")[0]["nodes"]
            assert states["1"]["value"] == 2
            node.script.release()
            # The old socket's end has not taken the new one's place away.
            second.wait(kind="end", prompt_id=prompt_id)
            assert second.kinds()[0] == "status"


def test_an_end_that_nobody_heard_is_told_to_who_comes_later_and_once(house: House) -> None:
    prompt_id = house.submit(progress(seed=6), client_id="late")
    house.entry(prompt_id)
    with Listener(house.socket_url, "late") as client:
        client.wait(kind="end", prompt_id=prompt_id)
        assert client.kinds() == ["status", "execution_success", "status", "end"]
    failed = house.submit(progress(seed=7, fail_at=1), client_id="late")
    house.entry(failed)
    with Listener(house.socket_url, "late") as client:
        client.wait(kind="end", prompt_id=failed)
        assert client.of("execution_error")[0]["exception_type"] == "RuntimeError"
        assert not client.of("end", prompt_id)


@pytest.mark.parametrize("said", [{"client_id": "mine"}, {}])
def test_interrupt_without_an_id_stops_ones_own(house: House, said: Json) -> None:
    """Of who says no more than that, without keys: what was submitted from there."""
    node = house.nodes["n1"]
    node.script.hold_at = 1
    with Listener(house.socket_url, "mine") as mine, Listener(house.socket_url, "yours") as yours:
        running = house.submit(progress(seed=80 + len(said)), client_id="mine")
        waiting = house.submit(progress(seed=90 + len(said)), client_id="yours")
        mine.wait(kind="executing", prompt_id=running)
        assert house.post("/interrupt", {"client_id": "yours"}).status_code == 200
        assert [item[1] for item in house.get("/queue")["queue_running"]] == [running], "yours does not run"
        house.post("/interrupt", said)
        mine.wait(kind="end", prompt_id=running)
        assert mine.of("execution_interrupted")[0]["node_id"] == "1"
        node.script.release()
        yours.wait(kind="end", prompt_id=waiting)
        assert yours.of("execution_success")


@pytest.mark.parametrize("error", [Failure(), Failure("boom", "ValueError")])
def test_a_failing_node_class_is_told_with_its_words(house: House, error: Failure) -> None:
    house.nodes["n1"].script.failures["FleetProgress"] = [error]
    with Listener(house.socket_url, "fails") as client:
        prompt_id = house.submit(progress(seed=hash(error.kind) % 1000), client_id="fails")
        client.wait(kind="end", prompt_id=prompt_id)
        (told,) = client.of("execution_error")
        assert (told["exception_message"], told["exception_type"]) == (error.message, error.kind)
        assert client.kinds()[-3:] == ["execution_error", "status", "end"]
    job = httpx.get(f"{house.server.url}/api/queue/jobs/{prompt_id}", timeout=60).json()
    assert job["status"] == "failed" and error.message.strip() in job["error"]["detail"]


def test_the_nodes_own_socket_may_break_and_the_client_sees_the_end(house: House) -> None:
    node = house.nodes["n1"]
    node.script.hold_at = 2
    with Listener(house.socket_url, "broken") as client:
        prompt_id = house.submit(progress(seed=10), client_id="broken")
        client.wait(kind="progress", prompt_id=prompt_id)
        node.drop_sockets()
        node.script.release()
        client.wait(kind="end", prompt_id=prompt_id)
        assert house.entry(prompt_id)["status"]["completed"]


def test_a_page_of_another_site_gets_no_socket(house: House) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}):
        with pytest.raises(InvalidStatus) as refused:
            Listener(house.socket_url, "x", headers=headers)
        assert refused.value.response.status_code == 403
    reply = house.http.get("/queue", headers={"Host": "evil.example"})
    assert reply.status_code == 403
    assert house.http.post("/queue", json={"clear": True}, headers={"Origin": "null"}).status_code == 403


def test_what_a_client_says_besides_is_ignored(house: House) -> None:
    with Listener(house.socket_url, uuid.uuid4().hex) as client:
        client._socket.send("not json")
        client._socket.send(b"\x00" * 100)
        client._socket.send('{"type": "feature_flags", "data": []}')
        prompt_id = house.submit(progress(seed=11))
        house.entry(prompt_id)
        assert not client.closed
