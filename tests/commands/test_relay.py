"""Commands for a node whose stream another server holds: one step between servers, both ways, with its errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from fleet.v1 import command_pb2, fleet_pb2, types_pb2

from fleet_agent.commands import CommandChannel, CommandFault
from fleet_server.domain.errors import FleetError
from fleet_server.enrolling import Enrolment, ServerPair
from fleet_server.rpc.auth import ApiKey
from fleet_server.rpc.server import GrpcServer, Tls
from fleet_server.services.authority import Authority
from fleet_server.services.relay import Relay
from fleet_server.settings import Settings
from fleet_server.store import Store
from tests.commands.node import NODE, node_on
from tests.services.agents.bench import Bench, bench_on
from tests.waiting import wait_until

Command = command_pb2.Command


@dataclass
class Two:
    """`near` is asked, `far` holds the node's stream."""

    near: Bench
    far: Bench


@pytest.fixture
async def two(store: Store, short_path: Path) -> AsyncIterator[Two]:
    async with AsyncExitStack() as stack:
        benches = []
        for name in ("near", "far"):
            (short_path / name).mkdir()
            bench = await stack.enter_async_context(bench_on(store, short_path / name, replica=name))
            relay = Relay(store.doors, grpc.aio.insecure_channel, lambda: None)
            stack.push_async_callback(relay.aclose)
            bench.commands.relay_by(relay, name)
            await store.doors.tell(name, bench.address)
            benches.append(bench)
        yield Two(*benches)


async def known(two: Two, store: Store) -> None:
    """The near server hears of the node as it does from the store's events."""
    row = await store.nodes.get(NODE)
    assert row is not None
    two.near.fleet.told(row)


def execute(command_id: str = "") -> Command:
    return Command(command_id=command_id, exec=fleet_pb2.ExecRequest(node_id=NODE, command="true"))


async def run_it(command: Command, channel: CommandChannel) -> command_pb2.CommandEnd:
    await channel.progress(types_pb2.OperationProgress(progress=50))
    return command_pb2.CommandEnd(exec=fleet_pb2.ExecResponse(stdout=command.command_id))


async def echo(command: Command, channel: CommandChannel) -> command_pb2.CommandEnd:
    async for part in channel.inputs():
        if part.WhichOneof("part") == "close_stdin":
            return command_pb2.CommandEnd(exit=types_pb2.Exit(exit_code=7))
        await channel.stdout(part.stdin.upper())
    return command_pb2.CommandEnd()


async def test_a_command_takes_one_step(two: Two, store: Store, tmp_path: Path) -> None:
    ticks: list[int] = []
    async with node_on(two.far, tmp_path, exec=run_it, exec_stream=echo):
        await known(two, store)
        end = await two.near.commands.run(
            NODE, execute("one"), timeout=50, progress=lambda tick: ticks.append(tick.progress)
        )
        assert end.exec.stdout == "one"
        assert ticks == [50]
        start = Command(exec_stream=fleet_pb2.ExecStart(command="cat"))
        async with two.near.commands.open(NODE, start) as stream:
            parts = aiter(stream)
            await stream.send(command_pb2.ServeCommandResponse(stdin=b"abc"))
            assert (await anext(parts)).stdout == b"ABC"
            await stream.send(command_pb2.ServeCommandResponse(close_stdin=fleet_pb2.CloseStdin()))
            assert (await anext(parts)).end.exit.exit_code == 7


async def test_errors_come_back_as_they_are(two: Two, store: Store, tmp_path: Path) -> None:
    async def refuse(command: Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        raise CommandFault("PORT_IN_USE", "host_port: 8080 is taken")

    async with node_on(two.far, tmp_path, exec=refuse, exec_stream=refuse):
        await known(two, store)
        with pytest.raises(FleetError) as caught:
            await two.near.commands.run(NODE, execute(), timeout=50)
        assert (caught.value.reason, caught.value.detail) == ("PORT_IN_USE", "host_port: 8080 is taken")
        with pytest.raises(FleetError) as caught:
            async with two.near.commands.open(NODE, Command(exec_stream=fleet_pb2.ExecStart(command="x"))) as stream:
                async for _ in stream:
                    pass
        assert caught.value.reason == "PORT_IN_USE"


async def test_who_leaves_ends_the_program_at_the_far_end(two: Two, store: Store, tmp_path: Path) -> None:
    begun, over = asyncio.Event(), asyncio.Event()

    async def wait(command: Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            over.set()
        return command_pb2.CommandEnd()

    async with node_on(two.far, tmp_path, exec_stream=wait):
        await known(two, store)
        async with two.near.commands.open(NODE, Command(exec_stream=fleet_pb2.ExecStart(command="x"))):
            await begun.wait()
        async with asyncio.timeout(50):
            await over.wait()


async def test_a_node_that_moved_here_meanwhile_is_looked_for_again(
    two: Two, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node_on(two.far, tmp_path, exec=run_it):
        await known(two, store)
    await wait_until(lambda: two.far.sessions.live(NODE) is None)
    relayed = two.near.commands._relayed
    async with AsyncExitStack() as stack:

        async def and_then_it_is_here(*args: Any, **more: Any) -> None:
            assert await relayed(*args, **more) is None
            await stack.enter_async_context(node_on(two.near, tmp_path, exec=run_it))

        monkeypatch.setattr(two.near.commands, "_relayed", and_then_it_is_here)
        assert (await two.near.commands.run(NODE, execute("one"), timeout=50)).exec.stdout == "one"


async def test_a_command_never_takes_a_second_step(two: Two, store: Store, tmp_path: Path) -> None:
    async with node_on(two.far, tmp_path, exec=run_it, exec_stream=echo):
        await known(two, store)
        with pytest.raises(FleetError) as caught:
            await two.near.commands.run(NODE, execute(), timeout=50, relayed=True)
        assert caught.value.reason == "NODE_OFFLINE"
        start = Command(exec_stream=fleet_pb2.ExecStart(command="cat"))
        with pytest.raises(FleetError) as caught:
            async with two.near.commands.open(NODE, start, relayed=True):
                pass
        assert caught.value.reason == "NODE_OFFLINE"


async def test_a_server_that_is_away(two: Two, store: Store, tmp_path: Path) -> None:
    async with node_on(two.far, tmp_path, exec=run_it):
        await known(two, store)
    await store.doors.tell("far", "unix:/nowhere")
    with pytest.raises(FleetError) as caught:
        await two.near.commands.run(NODE, execute(), timeout=50)
    assert caught.value.reason == "NODE_OFFLINE"


ADMIN, ORDINARY = "0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210"


def by_key(key: str) -> tuple[tuple[str, str], ...]:
    return (("x-api-key", key),)


async def test_over_tls_a_server_shows_its_key_to_servers_of_its_own_authority_alone(
    store: Store, short_path: Path, tmp_path: Path
) -> None:
    """The way it is put together where servers listen on a network: keys, TLS, one authority."""
    keys = [ApiKey.of("fleet", ADMIN), ApiKey.of("bob", ORDINARY, admin=False)]
    given: list[str] = []

    def enrolment(pki: str) -> Enrolment:
        return Enrolment(Settings(data_dir=tmp_path, pki_dir=tmp_path / pki, tls=True), store)

    async def listen(server: GrpcServer) -> None:
        authority = Authority.open(tmp_path / "pki")
        tls = Tls(ServerPair(authority, ["localhost", "127.0.0.1"]).now, authority.pem)
        given.append(f"127.0.0.1:{await server.listen('127.0.0.1:0', tls=tls)}")

    async with AsyncExitStack() as stack:
        for name in ("near", "far"):
            (short_path / name).mkdir()
        near = await stack.enter_async_context(bench_on(store, short_path / "near", replica="near"))
        far = await stack.enter_async_context(
            bench_on(store, short_path / "far", replica="far", keys=keys, listen=listen)
        )
        (door,) = given
        await store.doors.tell("far", door)
        await stack.enter_async_context(node_on(far, tmp_path, by_key(ADMIN), exec=run_it, exec_stream=echo))
        await known(Two(near, far), store)

        async def asked(key: str | None, pki: str = "pki") -> str:
            relay = Relay(store.doors, enrolment(pki).dial, lambda: key)
            near.commands.relay_by(relay, "near")
            try:
                end = await near.commands.run(NODE, execute(f"by {key} {pki}"), timeout=50)
                async with near.commands.open(NODE, Command(exec_stream=fleet_pb2.ExecStart(command="cat"))) as stream:
                    await stream.send(command_pb2.ServeCommandResponse(stdin=b"abc"))
                    assert (await anext(aiter(stream))).stdout == b"ABC"
                return end.exec.stdout
            except FleetError as error:
                return error.reason
            finally:
                await relay.aclose()

        assert await asked(ADMIN) == f"by {ADMIN} pki"
        assert await asked(ORDINARY) == "SCOPE_MISSING"
        assert await asked(None) == "API_KEY_MISSING"
        assert await asked(ADMIN, "another") == "NODE_OFFLINE", "another authority is not believed"
        # In clear nothing goes out to a door that speaks TLS.
        near.commands.relay_by(plain := Relay(store.doors, grpc.aio.insecure_channel, lambda: ADMIN), "near")
        with pytest.raises(FleetError) as caught:
            await near.commands.run(NODE, execute(), timeout=50)
        assert caught.value.reason == "NODE_OFFLINE"
        await plain.aclose()
