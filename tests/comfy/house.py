"""A fleet with the ComfyUI door open, and replaying nodes behind real agents."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.comfy_node import ComfyNode, Script
from tests.e2e.fleet_process import FleetProcess
from tests.waiting import pause

_PORT = re.compile(r"ComfyUI: localhost:(\d+)")
Json = Any


class House:
    """A server without an agent of its own; `join` brings nodes."""

    def __init__(self, folder: Path, stack: ExitStack, environment: Mapping[str, str], ports: Sequence[int]) -> None:
        self.folder = folder
        self._stack = stack
        http, grpc, comfy = (str(port) for port in ports)
        self.server = FleetProcess(
            folder / "server",
            environment={"FLEET_COMFY_PORT": comfy, "FLEET_AGENT": "false", **environment},
            command=("up", "--port", http, "--grpc-port", grpc),
        )
        self.nodes: dict[str, ComfyNode] = {}
        self.agents: dict[str, FleetProcess] = {}
        self.http = httpx.Client(timeout=60)
        stack.callback(self.http.close)

    def start(self) -> None:
        """Starts the server; its ports are the same again where they were given."""
        self.server.start()
        found = _PORT.search(self.server.ready)
        assert found is not None, self.server.ready
        self.port = int(found[1])
        self.http.base_url = httpx.URL(self.url)

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    @property
    def socket_url(self) -> str:
        return f"ws://localhost:{self.port}/ws"

    def join(self, node_id: str, script: Script | None = None, **environment: str) -> ComfyNode:
        """A node with an agent; `settled` waits for them."""
        node = self.nodes[node_id] = self._stack.enter_context(ComfyNode(script or Script()))
        self.attach(node_id, node.url, **environment)
        return node

    def attach(self, node_id: str, url: str, **environment: str) -> None:
        """An agent for the ComfyUI at this address."""
        agent = self.agents[node_id] = FleetProcess(
            self.folder / node_id,
            command=("agent", "--server", f"127.0.0.1:{self.server.grpc_port}", "--node-id", node_id),
            environment={"FLEET_AGENT_COMFYUI_URL": url, "FLEET_AGENT_ENGINES": "comfyui", **environment},
        )
        agent.spawn()
        self._stack.callback(agent.stop)

    def settled(self, seconds: float = 150) -> None:
        """Returns when the fleet knows what the nodes' ComfyUIs have."""
        for node_id, node in self.nodes.items():
            self.until(lambda node=node: node.called("GET", "/features"), f"{node_id} is looked at", seconds)  # type: ignore[misc]
        # Each has one device; it is told of once the node's answers are in the store.
        self.until(lambda: len(self.get("/system_stats")["devices"]) >= len(self.nodes), "all nodes are known", seconds)

    def until(self, condition: Callable[[], Json], what: str, seconds: float = 100) -> Json:
        """The first true value of a condition."""
        begun = time.monotonic()
        while time.monotonic() < begun + seconds:
            found = condition()
            if found:
                return found
            time.sleep(pause(begun))
        raise AssertionError(f"not within {seconds:g} s: {what}\n{self.server.log.read_text()[-3000:]}")

    # ComfyUI's calls.

    def get(self, path: str, **params: str) -> Json:
        """The JSON of a GET."""
        reply = self.http.get(path, params=params)
        assert reply.status_code == 200, (path, reply.status_code, reply.text)
        return reply.json()

    def post(self, path: str, body: Json = None) -> httpx.Response:
        """A POST of JSON."""
        return self.http.post(path, json=body)

    def submit(self, graph: Json, **more: Json) -> str:
        """The id of a prompt that is taken."""
        reply = self.post("/prompt", {"prompt": graph, **more})
        assert reply.status_code == 200, reply.text
        prompt_id: str = reply.json()["prompt_id"]
        return prompt_id

    def entry(self, prompt_id: str, seconds: float = 100) -> Json:
        """The prompt's entry in the history, once it is there."""
        return self.until(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), f"{prompt_id} is over", seconds)


@contextmanager
def house_in(
    folder: Path, environment: Mapping[str, str] | None = None, *, ports: Sequence[int] = (0, 0, 0)
) -> Iterator[House]:
    """A house with its server started (`ports`: HTTP, gRPC, ComfyUI); all of it is stopped at the end."""
    with ExitStack() as stack:
        house = House(folder, stack, environment or {}, ports)
        house.start()
        stack.callback(house.server.stop)
        yield house


def progress(*, steps: int = 4, seed: int = 0, step_ms: int = 0, fail_at: int = 0, size: int = 64) -> Json:
    """The recorded graph with steps, as small as it can be."""
    inputs = {"width": size, "height": size, "steps": steps, "seed": seed, "step_ms": step_ms, "fail_at": fail_at}
    return {
        "1": {"class_type": "FleetProgress", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "comfyui/fleet"}},
    }
