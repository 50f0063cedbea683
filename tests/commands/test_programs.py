"""Programs on the node itself, as the agent runs them."""

from __future__ import annotations

import asyncio
import os
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
