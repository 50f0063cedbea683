"""Programs on the node itself, as the agent runs them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import aclosing

import pytest

from fleet_agent.shell import node
from fleet_agent.shell.node import start_on_node


async def test_a_slow_reader_gets_all_that_a_program_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_LINGER_SECONDS", 0.01)
    size = 250_000
    program = await start_on_node(["head", "-c", str(size), "/dev/zero"], os.environ)
    total = 0
    async with aclosing(program.output()) as output:
        async for _, data in output:
            # It has ended by now, or will while this reader dawdles.
            await asyncio.sleep(0.05)
            total += len(data)
    assert total == size
    assert (await program.wait()).exit_code == 0
    await program.close()


async def test_closing_ends_a_program_that_runs_on() -> None:
    program = await start_on_node(["sh", "-c", "trap '' HUP TERM; echo here; sleep 1000"], os.environ)
    async with aclosing(program.output()) as output:
        assert await anext(output) == ("stdout", b"here\n")
    await program.close()
    assert (await program.wait()).signal == "SIGKILL"


_BESIDE_GRPC = """
import fleet_agent
import asyncio, os, grpc, uvloop
from fleet_agent.shell.node import start_on_node

async def main():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        for _ in range(10):
            program = await start_on_node(["true"], os.environ, stdin=True)
            assert (await program.wait()).exit_code == 0
            await program.close()
    await server.stop(0)

uvloop.run(main())
"""


def test_programs_are_started_without_what_grpc_does_in_forks() -> None:
    """It says so where its handlers are there; where they run, the child may die before its program begins."""
    environment = {name: text for name, text in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    command = [sys.executable, "-c", _BESIDE_GRPC]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    # It may also say how its connection ended.
    about_forks = [line for line in done.stderr.splitlines() if "fork" in line.lower()]
    assert (done.returncode, about_forks) == (0, []), done.stderr
