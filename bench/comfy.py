"""The ComfyUI gateway: what POST /prompt costs over the same call straight to ComfyUI, and 200 sockets with 20 pictures
in the making.

    python -m bench.comfy [--calls 500] [--seconds 60] [--sockets 200] [--running 20]

A real server with fsync, a real agent, and the replaying ComfyUI of the tests, which takes prompts at once. First the
median of `--calls` submits, one after the other over a connection kept open, here and straight to that ComfyUI. Then
`--running` prompts, each on a node of its own, send previews of 20 kB ten times a second for `--seconds`; every socket
listens. Counted is what each owner got of what its node sent, what anybody got of others', and the server's processor
time.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from websockets.sync.client import ClientConnection, connect

from bench._machine import heading
from tests.comfy.house import House, house_in, progress
from tests.comfy_node import Script

TARGET_MS = 15.0
TARGET_SHARE = 0.95
PREVIEW_BYTES = 20_000
_WARM_UP = 20
_A_SECOND = 10


def main() -> None:
    """Both measurements, each with its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--sockets", type=int, default=200)
    parser.add_argument("--running", type=int, default=20)
    options = parser.parse_args()
    sys.stdout.write(heading() + "\n")
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder, house_in(Path(folder)) as house:
        submits(house, options.calls)
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder, house_in(Path(folder)) as house:
        sockets(house, options.sockets, options.running, options.seconds)


# POST /prompt


def submits(house: House, calls: int) -> None:
    """Prints the medians and their difference."""
    # Prompts wait: the call alone is measured, not what runs beside it.
    node = house.join("n1", Script(queue_held=True))
    house.settled()
    ours = [timed(house.port, seed) for seed in range(_WARM_UP + calls)][_WARM_UP:]
    straight = [timed(node.port, seed) for seed in range(_WARM_UP + calls)][_WARM_UP:]
    over = statistics.median(ours) - statistics.median(straight)
    row = "| POST /prompt, ms | median | p95 |\n|---|---|---|\n"
    for name, times in (("gateway", ours), ("straight to ComfyUI", straight)):
        row += f"| {name} | {statistics.median(times):.2f} | {statistics.quantiles(times, n=20)[18]:.2f} |\n"
    verdict = "met" if over <= TARGET_MS else "MISSED"
    sys.stdout.write(f"{row}\nOver the straight call: {over:.2f} ms (target {TARGET_MS:g} ms: {verdict})\n\n")
    sys.stdout.flush()
    house.post("/queue", {"clear": True})
    node.script.release()


def timed(port: int, seed: int) -> float:
    """Milliseconds of one submit; the connection is kept for the next one."""
    connection = _connections.setdefault(port, http.client.HTTPConnection("127.0.0.1", port, timeout=30))
    body = json.dumps({"prompt": progress(seed=seed), "client_id": "bench"})
    began = time.perf_counter()
    connection.request("POST", "/prompt", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    answer = reply.read()
    taken = (time.perf_counter() - began) * 1000
    assert reply.status == 200, answer
    return taken


_connections: dict[int, http.client.HTTPConnection] = {}


# Sockets


class Ear:
    """One socket: how many pictures and which prompts it heard of."""

    def __init__(self, house: House, name: str) -> None:
        self.name = name
        self.pictures = 0
        self.prompts: set[str] = set()
        self._connecting = connect(f"{house.socket_url}?clientId={name}", max_size=None, compression=None, proxy=None)
        self._socket: ClientConnection = self._connecting.__enter__()
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        with contextlib.suppress(Exception):
            for message in self._socket:
                if isinstance(message, bytes):
                    self.pictures += 1
                elif '"prompt_id"' in message:
                    self.prompts.add(json.loads(message)["data"]["prompt_id"])

    def close(self) -> None:
        self._connecting.__exit__(None, None, None)


@contextlib.contextmanager
def ears(house: House, count: int) -> Iterator[list[Ear]]:
    """So many sockets."""
    with ExitStack() as stack:
        found = []
        for number in range(count):
            found.append(Ear(house, f"client-{number}"))
            stack.callback(found[-1].close)
        yield found


def sockets(house: House, count: int, running: int, seconds: float) -> None:
    """Prints what owners and others got, and what it cost."""
    step = 1 / _A_SECOND
    script = {"step_seconds": step, "preview_bytes": PREVIEW_BYTES}
    nodes = [house.join(f"n{number}", Script(**script)) for number in range(running)]  # type: ignore[arg-type]
    # Each agent's start takes seconds of processor time.
    house.settled(50 + 20 * running)
    steps = int(seconds * _A_SECOND)
    with ears(house, count) as all_ears:
        owners: dict[str, Ear] = {}
        for number in range(running):
            graph: Any = progress(seed=number, steps=min(1000, steps))
            owners[house.submit(graph, client_id=all_ears[number].name)] = all_ears[number]
        house.until(lambda: len(house.get("/queue")["queue_running"]) == running, "all run", 120)
        server = _serving(house)
        cpu, began = server.cpu_times(), time.monotonic()
        house.until(lambda: house.get("/prompt")["exec_info"]["queue_remaining"] == 0, "all are over", seconds * 2 + 60)
        wall, after = time.monotonic() - began, server.cpu_times()
        used = after.user + after.system - cpu.user - cpu.system
        shares = [ear.pictures / steps for ear in owners.values()]
        strangers = sum(bool(ear.prompts - {one for one, owner in owners.items() if owner is ear}) for ear in all_ears)
        strangers += sum(ear.pictures > 0 for ear in all_ears if ear not in owners.values())
    share = min(shares)
    met = share >= TARGET_SHARE and not strangers and used < wall
    sys.stdout.write(
        f"| sockets | running | previews sent | least share of an owner | sockets with others' frames | server CPU |\n"
        f"|---|---|---|---|---|---|\n"
        f"| {count} | {running} | {steps * running} | {share:.1%} | {strangers} | {used / wall:.0%} of one core |\n\n"
        f"Targets (95 %, none, below one core): {'met' if met else 'MISSED'}\n"
    )
    for node in nodes:
        node.script.release()


def _serving(house: House) -> psutil.Process:
    return psutil.Process(house.server.pid)


if __name__ == "__main__":
    main()
