"""One POST to a receiver whom nobody trusts: only to addresses that were judged, for a short while, a short answer."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import certifi
import httpcore

from fleet_server.domain.errors import FleetError
from fleet_server.domain.webhook import Answer, retry_after_ms, status_line
from fleet_server.services.callbacks import Address, CallbackRules, Receiver, parse_receiver, refusal_of
from fleet_server.services.webhook_names import Names, NoSuchNameError

Headers = list[tuple[str, str]]

_CHUNK = 4_096
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class PostSettings:
    """`seconds` are for everything: name, connection, request and answer. `answer_bytes` are read at most, head and
    body together. Of a name's addresses the first `addresses` are tried, each for `connect_seconds`.
    """

    seconds: float = 15.0
    connect_seconds: float = 5.0
    answer_bytes: int = 65_536
    addresses: int = 4


class _Bounded(httpcore.AsyncNetworkStream):
    """A stream that ends in an error once more than so many bytes were read of it."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, most: int) -> None:
        self._stream = stream
        self._left = most

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore's name
        if self._left <= 0:
            raise httpcore.ReadError("the answer is too long")
        # In small pieces, so that one that is all tiny parts never holds the loop for long.
        data = await self._stream.read(min(max_bytes, _CHUNK, self._left), timeout)
        self._left -= len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        return _Bounded(await self._stream.start_tls(ssl_context, server_hostname, timeout), self._left)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to given addresses, whatever host is asked for: between judging and connecting no name is read again."""

    def __init__(self, addresses: Sequence[Address], settings: PostSettings) -> None:
        self._addresses = addresses
        self._settings = settings
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError("no address")
        for address in self._addresses:
            try:
                stream = await self._inner.connect_tcp(str(address), port, self._settings.connect_seconds)
                return _Bounded(stream, self._settings.answer_bytes)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class Poster:
    """Sends requests. Redirects are answers like any other, no proxy of the environment is asked, nothing is kept open.

    An address is judged for every request anew: a connection that outlived its judgement would dodge it.
    """

    def __init__(
        self,
        rules: CallbackRules,
        names: Names,
        *,
        clock: Callable[[], int],
        settings: PostSettings | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._rules = rules
        self._names = names
        self._clock = clock
        self._settings = settings or PostSettings()
        if tls is not None:
            self._tls = tls

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Of the first receiver with TLS: many have none, and reading all authorities takes its time."""
        own = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
        return ssl.create_default_context(cafile=own[0] or (None if own[1] else certifi.where()), capath=own[1])

    async def post(self, url: str, headers: Headers, body: bytes) -> Answer:
        """What came of it; never raises for what a receiver does."""
        answer: list[Answer] = []
        try:
            async with asyncio.timeout(self._settings.seconds):
                await self._post(url, headers, body, answer)
        except TimeoutError:
            pass
        except FleetError as error:
            return Answer(None, f"not called: {error.detail}")
        except NoSuchNameError:
            return Answer(None, "not called: the name of the receiver has no address")
        except (httpcore.NetworkError, httpcore.TimeoutException) as error:
            answer.append(Answer(None, _why(error)))
        except httpcore.ProtocolError:
            answer.append(Answer(None, "the connection ended without an answer in HTTP"))
        # What comes after a status cannot take it back.
        return answer[0] if answer else Answer(None, f"no answer within {self._settings.seconds:g} s")

    async def _judged(self, receiver: Receiver) -> Sequence[Address]:
        """The addresses to try. Raises CALLBACK_FORBIDDEN if any that the name has may not be called."""
        literal = receiver.literal
        found = [literal] if literal is not None else await self._names.addresses(receiver.host)
        for address in found:
            refusal = refusal_of(address, receiver.port, self._rules)
            if refusal is not None:
                raise FleetError("CALLBACK_FORBIDDEN", refusal)
        return found[: self._settings.addresses]

    async def _post(self, url: str, headers: Headers, body: bytes, answer: list[Answer]) -> None:
        receiver = parse_receiver(url)
        addresses = await self._judged(receiver)
        host = receiver.host if receiver.literal is None else str(receiver.literal)
        shown = f"[{host}]" if ":" in host else host
        if receiver.port != _DEFAULT_PORTS[receiver.scheme]:
            shown += f":{receiver.port}"
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        address = httpcore.URL(
            scheme=receiver.scheme.encode(), host=host.encode(), port=receiver.port, target=target.encode()
        )
        request = httpcore.Request(
            "POST",
            address,
            headers=[("Host", shown), ("Content-Length", str(len(body))), ("Connection", "close"), *headers],
            content=body,
        )
        connection = httpcore.AsyncHTTPConnection(
            address.origin,
            ssl_context=self._tls if receiver.scheme == "https" else None,
            network_backend=_Pinned(addresses, self._settings),
        )
        async with connection:
            response = await connection.handle_async_request(request)
            answer.append(self._answer(response))
            # Read to its end, so that a good receiver is not cut off; the stream is bounded.
            async for _ in response.aiter_stream():
                pass

    def _answer(self, response: httpcore.Response) -> Answer:
        asked = None
        for name, value in response.headers:
            if name.lower() == b"retry-after":
                asked = retry_after_ms(value.decode("latin-1"), self._clock())
        return Answer(response.status, status_line(response.status), asked)


def _why(error: BaseException) -> str:
    """What broke, without a word of the receiver's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the receiver's certificate is not good: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return "no TLS connection could be made"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpcore.ConnectError):
        return "no connection could be made"
    if isinstance(error, httpcore.ConnectTimeout):
        return "the connection was not answered in time"
    return "the connection broke before an answer came"
