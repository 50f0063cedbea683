"""A receiver of callbacks over real sockets, which answers as a test wants: well, badly, late, or never."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError


@dataclass
class Received:
    """One request as it came, header names in small letters."""

    line: str
    headers: dict[str, str]
    body: bytes
    reader: asyncio.StreamReader
    """What else comes: nothing, and then the end."""
    told: Any = None
    """The body of a good signature, or what is wrong with it; where the receiver checks at once."""

    @property
    def webhook_id(self) -> str:
        return self.headers["webhook-id"]

    def verified(self, secret: str) -> Any:
        """The body, once its signature is seen to be good."""
        return Webhook(secret).verify(self.body, self.headers)


Writer = asyncio.StreamWriter
How = Callable[[Received, Writer], Awaitable[None]]


def reply(status: int, body: bytes = b"", **headers: str) -> How:
    """Answers with a status."""

    async def answer(_: Received, writer: Writer) -> None:
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    return answer


def says(text: bytes) -> How:
    """Answers with these very bytes, and closes."""

    async def answer(_: Received, writer: Writer) -> None:
        writer.write(text)

    return answer


async def hang(request: Received, _: Writer) -> None:
    """Never answers; ends when the other side goes."""
    with contextlib.suppress(ConnectionError):
        await request.reader.read()


async def die(_: Received, writer: Writer) -> None:
    """Cuts the connection."""
    writer.transport.abort()


def endless(piece: bytes, start: bytes = b"") -> How:
    """Sends a piece over and over, for as long as anybody listens."""

    async def answer(_: Received, writer: Writer) -> None:
        writer.write(start)
        with contextlib.suppress(ConnectionError):
            while not writer.transport.is_closing():
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)

    return answer


OK = reply(200)


@dataclass
class Receiver:
    """What came, and how the next requests are answered: the first of `answers`, `otherwise` when there is none."""

    host: str
    port: int = 0
    scheme: str = "http"
    received: list[Received] = field(default_factory=list)
    answers: list[How] = field(default_factory=list)
    otherwise: How = OK
    secret: str = ""
    """Where given, each signature is checked as it comes: some minutes later it would be too old."""
    connections: int = 0
    open: int = 0
    most_open: int = 0

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}/hook"

    @property
    def ids(self) -> list[str]:
        """The webhook-ids in the order in which they came."""
        return [one.webhook_id for one in self.received]

    async def serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        """One connection."""
        self.connections += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            pairs = (line.split(": ", 1) for line in head[1:] if line)
            headers = {name.lower(): value for name, value in pairs}
            body = await reader.readexactly(int(headers["content-length"]))
            request = Received(head[0], headers, body, reader)
            if self.secret:
                try:
                    request.told = request.verified(self.secret)
                except WebhookVerificationError as error:
                    request.told = error
            self.received.append(request)
            answer = self.answers.pop(0) if self.answers else self.otherwise
            await answer(request, writer)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


@asynccontextmanager
async def receiving(
    host: str = "127.0.0.1", port: int = 0, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Receiver]:
    """A receiver that listens until the context ends."""
    receiver = Receiver(host, scheme="https" if tls else "http")
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: Writer) -> None:
        task = asyncio.ensure_future(receiver.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, host, port, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
