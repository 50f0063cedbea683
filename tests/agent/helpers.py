"""A scripted server that speaks fleet.v1.Node over real gRPC, and agents to meet it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
from fleet.v1 import command_pb2, node_pb2, types_pb2

from fleet_agent.commands import CommandDesk, CommandJournal
from fleet_agent.inventory import Inventory
from fleet_agent.metrics.reader import MetricsReader
from fleet_agent.runner import Runner
from fleet_agent.session import Session
from fleet_agent.settings import AgentSettings
from fleet_agent.spool import Spool
from tests.ports import free_port
from tests.waiting import wait_until

PLUGINS = Path(__file__).parent / "plugins"
Reply = node_pb2.ServerMessage
Context = grpc.aio.ServicerContext[Any, Any]


class Conversation:
    """One Connect as the server sees it."""

    def __init__(self, session: str, metadata: Mapping[str, str]) -> None:
        self.session = session
        self.metadata = metadata
        self.heard: list[node_pb2.AgentMessage] = []
        self.closed = False
        self._outgoing: asyncio.Queue[Reply | None] = asyncio.Queue()

    @property
    def hello(self) -> node_pb2.Hello:
        return self.heard[0].hello

    def say(self, *, session: str | None = None, **message: Any) -> None:
        self._outgoing.put_nowait(Reply(session=self.session if session is None else session, **message))

    def end(self) -> None:
        """Ends the stream as a server that is shut down without a word."""
        self._outgoing.put_nowait(None)

    async def outgoing(self) -> AsyncIterator[Reply]:
        while (message := await self._outgoing.get()) is not None:
            yield message

    def all(self, kind: str) -> list[Any]:
        """What was heard of one kind, in order."""
        return [getattr(message, kind) for message in list(self.heard) if message.WhichOneof("message") == kind]

    def kinds(self, *left_out: str) -> list[str]:
        """The kinds of what was heard after the Hello, in order."""
        kinds = [str(message.WhichOneof("message")) for message in self.heard[1:]]
        return [kind for kind in kinds if kind not in left_out]

    async def first(self, kind: str, test: Callable[[Any], bool] = lambda message: True) -> Any:
        """Waits for a message of that kind."""
        return await wait_until(lambda: next((found for found in self.all(kind) if test(found)), None))

    async def about(self, kind: str, token: str) -> Any:
        """Waits for a message of that kind about that attempt."""
        return await self.first(kind, lambda message: bool(message.token == token))


@dataclass
class Upload:
    """What came of one UploadOutput."""

    header: node_pb2.UploadHeader
    data: bytes


@dataclass
class ScriptedServer:
    """Welcomes every agent; what else it does, the test says."""

    heartbeat_seconds: float = 0.1
    lease_seconds: float = 30
    kill_tokens: list[str] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)
    upload_refusals: list[grpc.StatusCode] = field(default_factory=list)
    upload_ban: grpc.StatusCode | None = None
    upload_metadata: list[Mapping[str, str]] = field(default_factory=list)
    upload_gate: asyncio.Event = field(default_factory=asyncio.Event)
    first_message: Reply | None = None
    outputs: dict[str, bytes] = field(default_factory=dict)
    output_refusals: list[grpc.StatusCode] = field(default_factory=list)
    downloads: list[str] = field(default_factory=list)
    deaf: bool = False
    deafened: int = 0
    """Conversations that are not listened to."""
    silent: bool = False
    _server: grpc.aio.Server | None = None
    port: int = field(default_factory=free_port)

    async def start(self) -> None:
        """Listens, on the port it had before where there was one, and which nobody has taken meanwhile."""
        server = self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Connect": grpc.stream_stream_rpc_method_handler(
                self.Connect, node_pb2.AgentMessage.FromString, Reply.SerializeToString
            ),
            "UploadOutput": grpc.stream_unary_rpc_method_handler(
                self.UploadOutput,
                node_pb2.UploadOutputRequest.FromString,
                node_pb2.UploadOutputResponse.SerializeToString,
            ),
            "ReadFile": grpc.unary_stream_rpc_method_handler(
                self.ReadFile,
                command_pb2.ReadFileRequest.FromString,
                command_pb2.ReadFileResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fleet.v1.Node", handlers),))
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        await server.start()
        self.upload_gate.set()

    async def stop(self) -> None:
        """Cuts every stream."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def conversation(self, index: int = 0) -> Conversation:
        """Waits for the agent's connection of that number."""
        await wait_until(lambda: len(self.conversations) > index)
        return self.conversations[index]

    async def Connect(self, requests: Any, context: Context) -> AsyncIterator[Reply]:
        talk = Conversation(f"session-{len(self.conversations)}", _metadata(context))
        talk.heard.append(await anext(aiter(requests)))
        self.conversations.append(talk)
        if self.silent:
            await asyncio.Event().wait()
        welcome = node_pb2.Welcome(
            heartbeat_seconds=self.heartbeat_seconds, lease_seconds=self.lease_seconds, kill_tokens=self.kill_tokens
        )
        yield self.first_message or Reply(session=talk.session, welcome=welcome)
        if self.deaf:
            self.deafened += 1
            await asyncio.Event().wait()
        listening = asyncio.create_task(self._listen(requests, talk))
        try:
            async for message in talk.outgoing():
                yield message
        finally:
            talk.closed = True
            listening.cancel()

    async def _listen(self, requests: Any, talk: Conversation) -> None:
        async for message in requests:
            talk.heard.append(message)
            self.on_heard(talk, message)
        talk.end()

    def on_heard(self, talk: Conversation, message: node_pb2.AgentMessage) -> None:
        """For scripts that answer."""

    async def UploadOutput(self, requests: Any, context: Context) -> node_pb2.UploadOutputResponse:
        self.upload_metadata.append(_metadata(context))
        header = (await anext(aiter(requests))).header
        await self.upload_gate.wait()
        if self.upload_ban is not None:
            await context.abort(self.upload_ban, "refused by the script")
        if self.upload_refusals:
            await context.abort(self.upload_refusals.pop(0), "refused by the script")
        data = b"".join([part.chunk async for part in requests])
        self.uploads.append(Upload(header, data))
        digest = hashlib.sha256(data).hexdigest()
        receipt = node_pb2.OutputReceipt(filename=f"{header.token}-{header.index}", sha256=digest, size_bytes=len(data))
        return node_pb2.UploadOutputResponse(receipt=receipt)

    async def ReadFile(self, request: command_pb2.ReadFileRequest, context: Context) -> AsyncIterator[Any]:
        filename = request.reference.removeprefix("output:")
        self.downloads.append(filename)
        if self.output_refusals:
            await context.abort(self.output_refusals.pop(0), "refused by the script")
        data = self.outputs.get(filename)
        if data is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such file")
        assert data is not None
        yield command_pb2.ReadFileResponse(size_bytes=len(data))
        for start in range(request.offset, len(data), 4):
            yield command_pb2.ReadFileResponse(chunk=data[start : start + 4])


def _metadata(context: Context) -> dict[str, str]:
    return {key: str(value) for key, value in context.invocation_metadata() or ()}


def settings_of(folder: Path, server: str = "127.0.0.1:1", **more: Any) -> AgentSettings:
    """An agent in a hurry, with the probe engine alone."""
    quick: dict[str, Any] = {
        "server": server,
        "node_id": "node-1",
        "data_dir": folder,
        "engines": ("probe",),
        "reconnect_seconds": 0.05,
        "cancel_grace_seconds": 0.3,
        "stop_grace_seconds": 50,
        "upload_retry_seconds": 0.1,
        "rescan_seconds": 0.05,
        "disk_floor_bytes": 0,
        # Most tests are about uploads.
        "inline_bytes": 0,
    }
    return AgentSettings(**{**quick, **more})


class Agent:
    """An agent in this process, its slots in real children."""

    def __init__(self, settings: AgentSettings, metrics: MetricsReader | None = None) -> None:
        self.settings = settings
        self.inventory = Inventory(settings)
        self.runner = Runner(settings, self.inventory, Spool(settings.data_dir / "spool"))
        reader = metrics or MetricsReader(settings.data_dir, 5)
        self.desk = CommandDesk(CommandJournal(settings.data_dir / "commands.db"))
        self.session = Session(settings, self.inventory, self.runner, reader, self.desk)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await self.desk.open()
            await self.inventory.load()
            async with asyncio.TaskGroup() as tasks:
                await self.runner.open(tasks)
                tasks.create_task(self.session.run())
                tasks.create_task(self.inventory.watch())
        finally:
            await self.desk.aclose()
            await self.runner.close()


@contextlib.asynccontextmanager
async def agent_running(settings: AgentSettings, metrics: MetricsReader | None = None) -> AsyncIterator[Agent]:
    """An agent for the time of the block; it must still be alive at the end."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    agent = Agent(settings, metrics)
    task = asyncio.create_task(agent.run())
    try:
        yield agent
        assert not task.done(), f"the agent has ended: {task}"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class AgentProcess:
    """`python -m fleet_agent` with the settings given."""

    def __init__(self, settings: AgentSettings, **environment: str) -> None:
        given = settings.model_dump(mode="json", exclude_defaults=True, exclude={"api_key", "labels"})
        self.environment = {f"FLEET_AGENT_{name.upper()}": _text(value) for name, value in given.items()}
        self.environment |= environment
        self.process: asyncio.subprocess.Process | None = None
        self.errors = b""

    async def __aenter__(self) -> AgentProcess:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fleet_agent",
            env={**os.environ, **self.environment},
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        self.errors += (await self.process.communicate())[1]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def wait(self) -> int:
        """The exit code."""
        assert self.process is not None
        self.errors += (await self.process.communicate())[1]
        assert self.process.returncode is not None
        return self.process.returncode

    def children(self) -> list[int]:
        """Processes that it has started."""
        return children_of(self.pid)


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def children_of(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    """A process that is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assign_of(
    token: str,
    prompt: str = "paint",
    *,
    timeout_seconds: float = 60,
    model: str = "",
    loras: Mapping[str, float] = MappingProxyType({}),
    previews: bool = False,
    **fields: Any,
) -> node_pb2.Assign:
    """Work for the probe engine (or, by `model`, another)."""
    image = types_pb2.ImagePayload(prompt=prompt, seed=2**64 - 1, **fields)
    for name, weight in loras.items():
        image.loras.add(name=name, weight=weight)
    return node_pb2.Assign(
        job_id=f"job-{token}",
        token=token,
        generation=1,
        attempt=1,
        job_type=types_pb2.JOB_TYPE_IMAGE_GEN,
        payload=types_pb2.Payload(image_gen=image),
        model=model,
        timeout_seconds=timeout_seconds,
        previews=previews,
    )


def let_go(settings: AgentSettings, token: str) -> None:
    """Lets a waiting job of the probe engine finish."""
    (settings.data_dir / f"go-job-{token}").touch()
