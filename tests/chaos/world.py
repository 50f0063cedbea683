"""The fleet that the faults happen to: a server with its store, agents apart from it behind lines of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import psutil

from tests.chaos.courses import CLUSTER
from tests.chaos.proxies import Errs, Line, Post
from tests.chaos.receiver import SECRET
from tests.e2e.fleet_process import FleetProcess
from tests.ports import free_ports
from tests.waiting import wait_until

PLUGINS = Path(__file__).parent / "plugins"
START_SECONDS = 100.0
STARTS = 4
DURATIONS = {
    "FLEET_AGENT_RESEND_SECONDS": "1",
    "FLEET_AGENT_WRITE_SECONDS": "3",
    "FLEET_AGENT_WELCOME_SECONDS": "3",
    "FLEET_AGENT_UPLOAD_RETRY_SECONDS": "0.5",
    "FLEET_ACCEPT_SECONDS": "1.5",
}
WEBHOOKS = {
    "FLEET_WEBHOOK_SECRET": SECRET,
    "FLEET_WEBHOOK_SCHEDULE_SECONDS": " ".join(["0", "0.2", "0.4", *["0.8"] * 30]),
    "FLEET_WEBHOOK_TIMEOUT_SECONDS": "1",
    "FLEET_WEBHOOK_LEASE_SECONDS": "2",
    "FLEET_WEBHOOK_DEFER_SECONDS": "0.3",
    "FLEET_WEBHOOK_POLL_SECONDS": "0.2",
}
LEASE_SECONDS = 3.0


class World:
    """`agents` agents of one slot, a server and its store, all processes of their own. `done` counts the faults.

    `code` is put before everything on the server's path: a mutated copy of its package.
    """

    def __init__(self, folder: Path, *, agents: int = 3, seed: int = 0, code: Path | None = None) -> None:
        self.folder = folder
        self._resting = False
        self.up = False
        """The server is not being started just now."""
        self.runs = folder / "runs"
        self.runs.touch()
        self.done: Counter[str] = Counter()
        self.errs = Errs(seed)
        self._stack = AsyncExitStack()
        environment = {**DURATIONS, "CHAOS_RUNS": str(self.runs)}
        port, grpc_port = free_ports(2)
        command = ("up", "--no-agent", "--port", str(port), "--grpc-port", str(grpc_port))
        # The folder that this runs in would come before all: it may hold the package, and not the mutated one.
        server_environment = {
            **environment,
            **WEBHOOKS,
            "FLEET_LEASE_SECONDS": str(LEASE_SECONDS),
            "FLEET_REAP_GRACE_SECONDS": "1",
            "PYTHONPATH": _path(code),
            "PYTHONSAFEPATH": "1",
        }
        server_environment["PYTHONDONTWRITEBYTECODE"] = ""
        self.server = FleetProcess(folder / "server", command=command, environment=server_environment)
        self.post = Post(grpc_port, self.errs)
        self.lines: dict[str, Line] = {}
        self.agents: dict[str, FleetProcess] = {}
        self._agent_environment = environment
        self._names = [f"node{n}" for n in range(agents)]

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _begin(self) -> None:
        self._stack.push_async_callback(self._end)
        await self._started()
        await self._stack.enter_async_context(self.post)
        for name in self._names:
            line = self.lines[name] = await self._stack.enter_async_context(Line(self.post.port))
            self.agents[name] = self._agent(name, line, self._agent_environment)
            self.agents[name].spawn()
        await wait_until(lambda: self.post.seen["welcome"] >= len(self.agents), seconds=START_SECONDS)

    async def _started(self) -> None:
        """The server, ready. A store that is killed while it starts takes its server along: then both start once
        more; so they do where the machine has no time for them."""
        self.up = False
        for _ in range(STARTS):
            await asyncio.to_thread(_buried, self.server)
            # (A ValueError where it is killed, and its output closed, while that is being read.)
            with contextlib.suppress(AssertionError, ValueError):
                await asyncio.to_thread(self.server.start, START_SECONDS)
                self.up = True
                return
        raise AssertionError(f"the server does not start: {self.server.log}")

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _agent(self, name: str, line: Line, environment: Mapping[str, str]) -> FleetProcess:
        where = ("--server", f"127.0.0.1:{line.port}", "--node-id", name, "--clusters", f"vision,{CLUSTER}")
        command = ("agent", *where, "--engines", "chaos")
        return FleetProcess(
            self.folder / name, command=command, environment={**environment, "PYTHONPATH": _path(PLUGINS)}
        )

    # What may be done to it. Each returns whether there was something to do it to.

    def kill_server(self) -> bool:
        """SIGKILL; the store dies with it."""
        if not _alive(self.server):
            return False
        self.server.kill()
        return self._count("kill server")

    def kill_store(self) -> bool:
        return self._kill(self.server.pids("valkey-server"), "kill store")

    def kill_agent(self, name: str) -> bool:
        """SIGKILL of the agent, its engines end with it; it comes again."""
        if not _alive(self.agents[name]):
            return False
        self.agents[name].kill()
        return self._count("kill agent")

    def kill_engine(self, name: str) -> bool:
        return self._kill(self.agents[name].pids("fleet_agent.slot"), "kill engine")

    def stop_agent(self, name: str) -> bool:
        """SIGSTOP: it says nothing, its line stands, its engine works on."""
        return self._signal(self.agents[name], signal.SIGSTOP, "stop agent")

    def continue_agent(self, name: str) -> bool:
        return self._signal(self.agents[name], signal.SIGCONT, "continue agent")

    def stop_server(self) -> bool:
        return self._signal(self.server, signal.SIGSTOP, "stop server")

    def continue_server(self) -> bool:
        return self._signal(self.server, signal.SIGCONT, "continue server")

    def cut(self, name: str) -> bool:
        self.lines[name].cut()
        return self._count("cut")

    def stall(self, name: str) -> bool:
        self.lines[name].stall()
        return self._count("stall")

    def resume(self, name: str) -> bool:
        self.lines[name].resume()
        return True

    # Its healing.

    async def keep(self) -> None:
        """Starts again whatever is dead, until `rest`."""
        while not self._resting:
            await self.revive()
            await asyncio.sleep(0.05)

    def rest(self) -> None:
        """`keep` returns when it has started what it is just starting."""
        self._resting = True

    async def revive(self) -> None:
        """Starts again whatever is dead now."""
        if not _alive(self.server):
            await self._started()
        for agent in self.agents.values():
            if not _alive(agent):
                _buried(agent)
                agent.spawn()

    def heal(self) -> None:
        """Ends what holds or errs; does not start the dead again."""
        self.errs.rate = 0.0
        for name, line in self.lines.items():
            line.resume()
            if _alive(self.agents[name]):
                self.continue_agent(name)
        if _alive(self.server):
            self.continue_server()

    def leftovers(self) -> list[str]:
        """Processes of engines whose agent is gone."""
        orphans = []
        for process in psutil.process_iter(["pid", "ppid", "cmdline"]):
            words = process.info["cmdline"] or []
            if "fleet_agent.slot" in words and any(str(self.folder) in word for word in words):
                parents = {agent.pid for agent in self.agents.values() if agent.process is not None}
                if process.info["ppid"] not in parents:
                    orphans.append(" ".join(words))
        return orphans

    def _kill(self, pids: list[int], what: str) -> bool:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self._count(what) if pids else False

    def _signal(self, process: FleetProcess, number: signal.Signals, what: str) -> bool:
        if not _alive(process):
            return False
        os.kill(process.pid, number)
        return self._count(what)

    def _count(self, what: str) -> bool:
        self.done[what] += 1
        return True

    async def _end(self) -> None:
        self.heal()
        outcomes: list[int | BaseException] = []
        for processes in (tuple(self.agents.values()), (self.server,)):
            stops = [asyncio.to_thread(process.stop, START_SECONDS) for process in processes if _alive(process)]
            outcomes += await asyncio.gather(*stops, return_exceptions=True)
        for process in (*self.agents.values(), self.server):
            _buried(process)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome


def _alive(process: FleetProcess) -> bool:
    return process.process is not None and process.process.poll() is None


def _buried(process: FleetProcess) -> None:
    """Closes what is left of one that has ended, or is ending."""
    if process.process is not None:
        process.process.wait(START_SECONDS)
        if process.process.stdout is not None:
            process.process.stdout.close()


def _path(first: Path | None) -> str:
    """Where Python looks: there first, then where it does anyway."""
    return os.pathsep.join(filter(None, [str(first or ""), os.environ.get("PYTHONPATH")]))
