"""Two servers on one store: a client listens at one of them, its node's stream is held by the other."""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from tests.comfy.client import Listener
from tests.comfy.house import progress
from tests.comfy_node import ComfyNode, Script
from tests.e2e.fleet_process import FleetProcess
from tests.e2e.test_crashes import until
from tests.store.conftest import run_server


def test_a_client_hears_of_its_prompt_at_the_other_server() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-")))
        (folder / "store").mkdir()
        store = stack.enter_context(contextmanager(run_server)(folder / "store", cluster=False))
        servers = []
        for name in "ab":
            command = ("server", "--redis-url", store.url, "--port", "0", "--grpc-port", "0")
            more = {"FLEET_COMFY_PORT": "0"}
            servers.append(stack.enter_context(FleetProcess(folder / name, command=command, environment=more)))
        ports = [int(re.findall(r"ComfyUI: localhost:(\d+)", server.ready)[0]) for server in servers]
        node = stack.enter_context(ComfyNode(Script(step_seconds=0.15)))
        agent = FleetProcess(
            folder / "agent",
            command=("agent", "--server", f"127.0.0.1:{servers[0].grpc_port}", "--node-id", "far"),
            environment={"FLEET_AGENT_COMFYUI_URL": node.url, "FLEET_AGENT_ENGINES": "comfyui"},
        )
        agent.spawn()
        stack.callback(agent.stop)
        here, there = (
            stack.enter_context(httpx.Client(base_url=f"http://localhost:{port}", timeout=60)) for port in ports
        )
        until(lambda: here.get("/object_info").json(), "the node is known")
        with (
            Listener(f"ws://localhost:{ports[1]}/ws", "me") as mine,
            Listener(f"ws://localhost:{ports[0]}/ws", "other") as other,
        ):
            ids: list[str] = []

            def run() -> str:
                """A prompt that has ended, as its client has heard."""
                asked = {"prompt": progress(seed=len(ids)), "client_id": "me"}
                ids.append(here.post("/prompt", json=asked).json()["prompt_id"])
                mine.wait(kind="end", prompt_id=ids[-1])
                return ids[-1]

            # A server finds out within seconds that there is another, and says nothing to it before.
            until(lambda: mine.of("progress", run()), "the one knows of the other")
            before = len(mine.frames)
            run()
            kinds = mine.kinds()[before:]
            assert [kind for kind in kinds if kind in ("execution_start", "executed", "execution_success", "end")] == [
                *("execution_start", "executed", "execution_success", "end")
            ]
            assert kinds.count("progress") == 4 and kinds.count("binary 1") == 4
            assert set(other.kinds()) == {"status"}
        assert set(there.get("/history").json()) == set(ids)
        assert there.get("/prompt").json() == {"exec_info": {"queue_remaining": 0}}
