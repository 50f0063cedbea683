"""The server is killed and started again with prompts queued and running: nothing is lost, and clients see the end."""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from tests.comfy.client import Listener
from tests.comfy.house import house_in, progress
from tests.comfy_node import Script
from tests.ports import free_ports


def test_twenty_queued_and_three_running_survive_the_server() -> None:
    with (
        ExitStack() as stack,
        tempfile.TemporaryDirectory(prefix="fleet-") as folder,
        house_in(Path(folder), ports=free_ports(3)) as house,
    ):
        nodes = [house.join(name, Script(hold_at=2)) for name in ("a", "b", "c")]
        house.settled()
        listener = stack.enter_context(Listener(house.socket_url, "me"))
        ids = [house.submit(progress(seed=seed), client_id="me") for seed in range(23)]
        house.until(lambda: len(house.get("/queue")["queue_running"]) == 3, "three run")
        house.until(lambda: all(node.script.held.is_set() for node in nodes), "all hold")
        before = house.get("/queue")
        house.server.kill()
        listener.wait_closed()
        # One of the three ends while nobody listens; the others when the client is back.
        nodes[0].script.hold_at = None
        nodes[0].script.wake()
        house.start()
        after = house.get("/queue")
        left = {item[1] for item in after["queue_running"] + after["queue_pending"]}
        assert left | set(house.get("/history")) == set(ids)
        assert {item[1]: item for item in after["queue_pending"]}.items() <= {
            item[1]: item for item in before["queue_pending"]
        }.items()
        house.until(lambda: house.get("/history"), "the first has ended")
        again = stack.enter_context(Listener(house.socket_url, "me"))
        assert again.wait(kind="status")[0]["sid"] == "me"
        for node in nodes:
            node.script.release()
        for prompt_id in ids:
            again.wait(kind="end", prompt_id=prompt_id)
        assert Counter(data["prompt_id"] for data in again.of("end")) == Counter(ids)
        assert list(house.get("/prompt").values()) == [{"queue_remaining": 0}]
        assert set(house.get("/history")) == set(ids)
        third = stack.enter_context(Listener(house.socket_url, "me"))
        third.wait(kind="status")
        last = house.submit(progress(seed=99), client_id="me")
        third.wait(kind="end", prompt_id=last)
        assert [data["prompt_id"] for data in third.of("end")] == [last], "an end is told once"
