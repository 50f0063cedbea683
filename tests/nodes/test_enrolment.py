"""Join tokens, certificates and what they are worth, over real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from fleet.v1 import command_pb2, fleet_pb2, node_pb2_grpc, types_pb2
from fleet.v1 import node_pb2 as pb
from pydantic import SecretStr

from fleet_agent.enrol import enrolled, keep_fresh
from fleet_agent.identity import Door, Identity, IdentityError, Token, key_and_request
from fleet_agent.joining import join, renew
from fleet_agent.settings import AgentSettings
from fleet_server.enrolling import ServerPair
from fleet_server.rpc.auth import ApiKey
from fleet_server.rpc.server import GrpcServer, Tls
from fleet_server.services.authority import Authority, AuthorityError
from fleet_server.services.joins import Joins
from fleet_server.store import Store
from tests.services.agents.agent import ScriptedAgent, status_lost, wait_until
from tests.services.agents.bench import QUICK, Bench, bench_on

NONE = command_pb2.Containers()
KEY = "0123456789abcdef0123456789abcdef"


@dataclass
class Yard:
    """A bench with TLS doors."""

    bench: Bench
    joins: Joins
    authority: Authority
    door: str
    agents_door: str

    async def token(self) -> Token:
        return Token.read((await self.joins.token()).token)

    async def text(self) -> SecretStr:
        return SecretStr((await self.joins.token()).token)

    async def joined(self, node_id: str = "agx0") -> Identity:
        return await join(await self.token(), node_id)

    def agent(self, identity: Identity, node_id: str | None = None, instance_id: str = "boot-1") -> ScriptedAgent:
        channel = Door(identity.server, identity=identity).channel([("grpc.use_local_subchannel_pool", 1)])
        agent = ScriptedAgent(channel, node_id or identity.node_id, instance_id)
        self.bench.agents.append(agent)
        return agent


@asynccontextmanager
async def yard_on(
    store: Store, folder: Path, *, token_seconds: float = 900, node_days: float = 30, **more: Any
) -> AsyncIterator[Yard]:
    authority = Authority.open(folder / "pki", node_days=node_days)
    joins = Joins(store.joins, authority, token_seconds=token_seconds)
    tls = Tls(ServerPair(authority, ["localhost", "127.0.0.1"]).now, authority.pem)
    ports: list[int] = []

    async def listen(server: GrpcServer) -> None:
        ports.append(await server.listen("127.0.0.1:0", tls=tls))
        ports.append(await server.listen("127.0.0.1:0", tls=tls, certificates=True))
        joins.doors, joins.agents_port = [f"127.0.0.1:{ports[0]}"], ports[1]

    async with bench_on(store, folder, joins=joins, keys=[ApiKey.of("ops", KEY)], listen=listen, **more) as bench:
        yield Yard(bench, joins, authority, joins.doors[0], f"127.0.0.1:{ports[1]}")


@pytest.fixture
async def yard(store: Store, short_path: Path) -> AsyncIterator[Yard]:
    async with yard_on(store, short_path) as opened:
        yield opened


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def turned_away(agent: ScriptedAgent) -> grpc.StatusCode:
    """The status of a stream that the server does not take."""
    return (await refused(agent.dial())).code()


async def test_a_machine_joins_with_a_token_and_is_its_certificates_node(yard: Yard) -> None:
    identity = await yard.joined()
    assert identity.agents_server == yard.agents_door
    agent = yard.agent(identity)
    await agent.dial()
    job = await yard.bench.submit()
    assign = await agent.start()
    assert assign.job_id == job
    receipt = await agent.upload(assign, b"picture")
    assert await agent.complete(assign, outputs=[pb.UploadedOutput(receipt=receipt, content_type="image/png")]) == (
        pb.COMPLETE_OUTCOME_OK
    )


async def test_a_token_is_good_once_and_for_the_same_machine_again(yard: Yard) -> None:
    token = await yard.token()
    key, request = key_and_request()
    stub: Any = node_pb2_grpc.NodeStub(Door(yard.door, authority=yard.authority.pem).channel([]))
    asked = pb.JoinRequest(secret=token.secret, node_id="agx0", certificate_request=request)
    first, again = await stub.Join(asked), await stub.Join(asked)
    identity = Identity(
        "agx0", yard.door, yard.agents_door, key, again.certificate.decode(), yard.authority.pem.decode()
    )
    assert first.certificate != again.certificate, "a reply that was lost is given again"
    await yard.agent(identity).dial()
    for other in (replace_name(asked, "agx1"), with_request(asked, key_and_request()[1])):
        error = await refused(stub.Join(other))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "used" in str(error.details())
    unknown = pb.JoinRequest(secret="guess", node_id="agx2", certificate_request=request)
    assert (await refused(stub.Join(unknown))).code() is grpc.StatusCode.UNAUTHENTICATED


def replace_name(asked: pb.JoinRequest, node_id: str) -> pb.JoinRequest:
    return pb.JoinRequest(secret=asked.secret, node_id=node_id, certificate_request=asked.certificate_request)


def with_request(asked: pb.JoinRequest, request: bytes) -> pb.JoinRequest:
    return pb.JoinRequest(secret=asked.secret, node_id=asked.node_id, certificate_request=request)


async def test_a_token_is_over_after_its_time(store: Store, short_path: Path) -> None:
    async with yard_on(store, short_path, token_seconds=0.05) as yard:
        token = await yard.token()

        key = store.joins._key(token.secret)

        async def gone() -> bool:
            return not await store.joins._room.bulk.call("EXISTS", key)

        await wait_until(gone, "the token's end")
        with pytest.raises(IdentityError, match="older than 15 minutes or used"):
            await join(token, "agx0")


async def test_a_server_with_another_authority_is_not_believed(yard: Yard) -> None:
    """Somebody in between: the secret never leaves this machine."""
    token = replace(await yard.token(), authority_sha256="0" * 64)
    with pytest.raises(IdentityError, match="another server answers"):
        await join(token, "agx0")
    assert await yard.bench.store.joins.identity("agx0") is None


async def test_a_name_is_given_once(yard: Yard) -> None:
    await yard.joined()
    with pytest.raises(IdentityError, match="there is a node agx0 already"):
        await yard.joined()


async def test_the_agents_door_takes_certificates_of_ours_alone(yard: Yard, tmp_path: Path) -> None:
    identity = await yard.joined()
    other = Authority.open(tmp_path / "other")
    key, request = key_and_request()
    foreign = replace(identity, key=key, certificate=other.for_node("agx0", "x", request).pem.decode())
    pair = yard.authority.for_server(["localhost"])
    server = replace(identity, key=pair.key.decode(), certificate=pair.chain.decode())
    for bad in (foreign, server):
        assert await turned_away(yard.agent(bad)) in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED}
    none = Door(yard.agents_door, authority=yard.authority.pem).channel([("grpc.use_local_subchannel_pool", 1)])
    bare = ScriptedAgent(none)
    yard.bench.agents.append(bare)
    assert await turned_away(bare) is grpc.StatusCode.UNAVAILABLE
    await yard.agent(identity).dial()


async def test_over_tls_a_key_does_what_it_does_elsewhere_and_nothing_goes_without_one(yard: Yard) -> None:
    channel = Door(yard.door, authority=yard.authority.pem).channel([("grpc.use_local_subchannel_pool", 1)])
    bare = ScriptedAgent(channel)
    yard.bench.agents.append(bare)
    assert await turned_away(bare) is grpc.StatusCode.UNAUTHENTICATED
    keyed = ScriptedAgent(channel, metadata=(("x-api-key", KEY),))
    yard.bench.agents.append(keyed)
    await keyed.dial()
    plain = ScriptedAgent(yard.door, metadata=(("x-api-key", KEY),))
    yard.bench.agents.append(plain)
    assert await turned_away(plain) is grpc.StatusCode.UNAVAILABLE, "no key goes out in clear"


async def test_an_agent_speaks_for_its_own_node_alone(yard: Yard) -> None:
    identity = await yard.joined()
    error = await refused(yard.agent(identity, node_id="agx1").dial())
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "its own node" in str(error.details())
    await yard.agent(identity).dial()


async def test_an_agent_calls_nothing_but_its_own_doors(yard: Yard) -> None:
    agent = yard.agent(await yard.joined())
    for call in (
        agent.stub.ListNodes(pb.NodeListNodesRequest()),
        agent.stub.DeleteNode(pb.DeleteNodeRequest(node_id="agx1")),
        agent.stub.CreateJoinToken(pb.CreateJoinTokenRequest()),
    ):
        assert (await refused(call)).code() is grpc.StatusCode.PERMISSION_DENIED


async def test_an_agent_uploads_for_its_own_attempts_alone(yard: Yard) -> None:
    thief, worker = yard.agent(await yard.joined("thief")), yard.agent(await yard.joined("worker"))
    await worker.dial()
    await yard.bench.submit()
    assign = await worker.start()
    await thief.dial()
    error = await refused(thief.upload(assign, b"forged"))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert (await worker.upload(assign, b"mine")).size_bytes == 4


async def test_an_agent_reads_the_files_of_its_own_jobs_alone(yard: Yard) -> None:
    worker, thief = yard.agent(await yard.joined("worker")), yard.agent(await yard.joined("thief"))
    await worker.dial()
    await yard.bench.submit()
    first = await worker.start()
    receipt = await worker.upload(first, b"\x89PNG picture")
    made = pb.UploadedOutput(receipt=receipt, content_type="image/png")
    await worker.complete(first, outputs=[made])
    reference = f"output:{receipt.filename}"
    picture = types_pb2.ImagePayload(prompt="again", init_image=reference)
    await yard.bench.submit(payload=types_pb2.Payload(image_gen=picture))
    assign = await worker.start()
    await thief.dial()

    async def read(agent: ScriptedAgent, wanted: str) -> bytes:
        parts = agent.stub.ReadFile(command_pb2.ReadFileRequest(reference=wanted))
        return b"".join([part.chunk async for part in parts])

    assert await read(worker, reference) == b"\x89PNG picture"
    for agent, wanted in ((thief, reference), (worker, "s3://fleet-workspace/plan.txt"), (worker, "input:guess")):
        assert (await refused(read(agent, wanted))).code() is grpc.StatusCode.PERMISSION_DENIED
    await worker.complete(assign)
    assert (await refused(read(worker, reference))).code() is grpc.StatusCode.PERMISSION_DENIED, "its job has ended"
    models = await refused(read(thief, "s3://fleet-models/sketch.safetensors"))
    assert models.code() is not grpc.StatusCode.PERMISSION_DENIED, "models are for all"


async def test_an_agent_answers_its_own_commands_alone(yard: Yard) -> None:
    thief, worker = yard.agent(await yard.joined("thief")), yard.agent(await yard.joined("worker"))
    await worker.dial()
    command = command_pb2.Command(command_id="c-1", list_containers=fleet_pb2.ListContainersRequest())
    running = asyncio.create_task(yard.bench.commands.run("worker", command, timeout=100))
    await worker.next("command")

    async def serve(agent: ScriptedAgent) -> Any:
        call = agent.stub.ServeCommand()
        head = command_pb2.CommandHead(session=worker.session, command_id="c-1")
        # Who is refused hears of it while writing, or when reading.
        with contextlib.suppress(asyncio.InvalidStateError):
            await call.write(command_pb2.ServeCommandRequest(head=head))
            await call.initial_metadata()
            await call.write(command_pb2.ServeCommandRequest(end=command_pb2.CommandEnd(containers=NONE)))
        return await call.read()

    while status_lost(refusal := await refused(serve(thief))):
        pass
    assert refusal.code() is grpc.StatusCode.PERMISSION_DENIED
    assert not running.done()
    await serve(worker)
    assert (await running).WhichOneof("result") == "containers"


async def test_a_cloned_identity_is_refused_and_the_first_goes_on(store: Store, short_path: Path) -> None:
    # The server waits so long for a word of the first: on a busy machine the next one may be late.
    settings = replace(QUICK, heartbeat_seconds=20)
    async with yard_on(store, short_path, settings=settings) as yard:
        identity = await yard.joined()
        first, clone = yard.agent(identity), yard.agent(identity, instance_id="boot-2")
        await first.dial()

        async def beats() -> None:
            while True:
                await first.beat()
                await asyncio.sleep(0.05)

        beating = asyncio.create_task(beats())
        for _ in range(3):
            assert await turned_away(clone) is grpc.StatusCode.ALREADY_EXISTS
        beating.cancel()
        assert not first.ended.is_set()
        row = await yard.bench.store.nodes.get("agx0")
        assert row is not None
        assert (row.session, row.instance_id) == (first.session, "boot-1"), "never flapping"


async def test_a_deleted_nodes_certificate_is_worth_nothing_until_it_joins_again(yard: Yard) -> None:
    identity = await yard.joined()
    agent = yard.agent(identity)
    await agent.dial()
    await agent.hang_up()
    await wait_until(lambda: yard.bench.status_is("disconnected"), "the loss is written down")
    await yard.bench.store.nodes.delete("agx0")
    error = await refused(agent.dial())
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "join again" in str(error.details())
    fresh = await yard.joined()
    assert await turned_away(agent) is grpc.StatusCode.UNAUTHENTICATED, "the old one stays worthless"
    await yard.agent(fresh).dial()


async def test_a_certificate_is_renewed_in_time_and_the_stream_goes_on(
    store: Store, short_path: Path, tmp_path: Path
) -> None:
    async with yard_on(store, short_path, node_days=0) as yard:
        # Ten minutes of its life lie before now: two thirds have passed.
        with pytest.raises(IdentityError, match="has expired"):
            await enrolled(AgentSettings(data_dir=tmp_path / "late", join=await yard.text(), node_id="late"))
    async with yard_on(store, short_path, node_days=1 / 288) as yard:
        settings = AgentSettings(data_dir=tmp_path, join=await yard.text(), node_id="agx0")
        settings, door = await enrolled(settings)
        assert door.identity is not None
        before = door.identity
        agent = yard.agent(before)
        await agent.dial()
        task = asyncio.create_task(keep_fresh(settings, door))
        await wait_until(lambda: door.identity is not before, "a fresh certificate")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        kept = Identity.load(tmp_path)
        assert kept == door.identity
        assert kept is not None
        assert kept.key != before.key
        await agent.beat()
        assert (await renew(Door(kept.server, identity=kept))).certificate != kept.certificate


async def test_an_identity_is_kept_and_the_token_not_needed_again(yard: Yard, tmp_path: Path) -> None:
    settings = AgentSettings(data_dir=tmp_path, join=await yard.text(), node_id="agx0")
    joined, door = await enrolled(settings)
    assert (joined.node_id, joined.server) == ("agx0", yard.agents_door)
    assert stat.S_IMODE((tmp_path / "identity.json").stat().st_mode) == 0o600
    assert (await enrolled(AgentSettings(data_dir=tmp_path)))[1].identity == door.identity
    assert (await enrolled(settings))[1].identity == door.identity
    with pytest.raises(IdentityError, match="identity of the node agx0, not of agx7"):
        await enrolled(AgentSettings(data_dir=tmp_path, node_id="agx7"))
    (tmp_path / "identity.json").chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        await enrolled(settings)


def test_the_authority_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first = Authority.open(tmp_path / "pki")
    assert Authority.open(tmp_path / "pki").sha256 == first.sha256
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "pki").iterdir()} == {0o600}
    assert stat.S_IMODE((tmp_path / "pki").stat().st_mode) == 0o700
    (tmp_path / "pki" / "ca.key").chmod(0o640)
    with pytest.raises(AuthorityError, match="chmod 600"):
        Authority.open(tmp_path / "pki")
    (tmp_path / "pki" / "ca.key").unlink()
    with pytest.raises(AuthorityError, match="belong together"):
        Authority.open(tmp_path / "pki")


def test_a_request_names_nothing_but_its_key(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path / "pki")
    issued = authority.for_node("agx0", "abc", key_and_request()[1])
    read = x509.load_pem_x509_certificate(issued.pem)
    assert read.subject.rfc4514_string() == "CN=agx0"
    days = read.not_valid_after_utc - dt.datetime.now(dt.UTC)
    assert dt.timedelta(days=29) < days <= dt.timedelta(days=30)
    with pytest.raises(ValueError, match=r"."):
        authority.for_node(
            "agx0", "abc", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"
        )
