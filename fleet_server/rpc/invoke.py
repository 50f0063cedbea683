"""The chain that every call passes, gRPC and REST: key, limits, defaults, validation, deadline, metrics, errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable
from contextlib import aclosing
from typing import Any

import grpc
import structlog
import uuid_utils
from google.protobuf.message import Message

from fleet_server.domain.errors import Code, FleetError
from fleet_server.protojson import apply_defaults
from fleet_server.rpc.auth import KeyRing, key_in
from fleet_server.rpc.caller import NOBODY, Caller, read_metadata, set_caller
from fleet_server.rpc.deadline import ExpiredError, within
from fleet_server.rpc.identity import NODE_METHODS, Identities, identity_of
from fleet_server.rpc.methods import Method
from fleet_server.rpc.metrics import RpcMetrics
from fleet_server.rpc.scopes import Scope, scope_missing
from fleet_server.rpc.validation import validate
from fleet_server.services.refusals import forbidden

_log = structlog.get_logger("fleet.rpc")
Context = grpc.aio.ServicerContext[Any, Any]
Request = Message | AsyncIterator[Message] | Callable[[], Message]
"""A request, a stream of them, or the way to make one of what was sent."""


class Invoker:
    """Calls servicers. Raises FleetError alone (and CancelledError, where the caller went away).

    `identities` judges calls that come with a node's certificate; without it all such are refused. Methods of
    `open_scopes` may be called without a key, keys or not.
    """

    def __init__(
        self,
        methods: Iterable[Method],
        *,
        keys: KeyRing,
        metrics: RpcMetrics,
        identities: Identities | None = None,
        open_scopes: Collection[Scope] = (),
    ) -> None:
        self._methods = {method.path: method for method in methods}
        self._keys = keys
        self._metrics = metrics
        self._identities = identities
        self._open_scopes = frozenset(open_scopes)

    @property
    def methods(self) -> Iterable[Method]:
        return self._methods.values()

    def authenticate(self, metadata: dict[str, str], peer: str) -> str:
        """The owner of the key in `metadata`; for doors that are no RPC."""
        return self._keys.owner(key_in(metadata), peer)

    async def unary(self, path: str, request: Request, context: Context) -> Message:
        """One reply. The deadline is the caller's or the method's, whichever is earlier.

        A request that is still to be made is made once the caller was let in.
        """
        method = self._methods[path]
        started = time.perf_counter()
        caller = NOBODY
        try:
            caller = self._admit(method, context)
            if caller.node_id:
                await self._judge(caller)
            if callable(request):
                request = request()
            prepared = self._prepare(method, request, caller)
            reply: Message = await within(_seconds(method, context), method.handler(prepared, context))
        except BaseException as error:
            mapped = _mapped(error, method, caller, isinstance(error, ExpiredError))
            self._metrics.observe(path, mapped, time.perf_counter() - started)
            if mapped is error:
                raise
            raise mapped from error
        self._metrics.observe(path, None, time.perf_counter() - started)
        return reply

    async def stream(self, path: str, request: Request, context: Context) -> AsyncGenerator[Message, None]:
        """Replies as they come; the request as in `unary`. Closing it closes the servicer's generator."""
        method = self._methods[path]
        started = time.perf_counter()
        caller = NOBODY
        outcome: BaseException | None = None
        expired = False
        try:
            caller = self._admit(method, context)
            if caller.node_id:
                await self._judge(caller)
            if callable(request):
                request = request()
            prepared = self._prepare(method, request, caller)
            seconds = _seconds(method, context)
            ends = None if seconds is None else asyncio.get_running_loop().time() + seconds
            watch = _Watch()
            with self._keys.watching(key_in(caller.metadata), watch.tell):
                async with aclosing(method.handler(prepared, context)) as replies:
                    while True:
                        watch.check()
                        try:
                            async with asyncio.timeout_at(ends) as watch.deadline:
                                reply = await anext(replies)
                        except StopAsyncIteration:
                            break
                        except TimeoutError:
                            watch.check()
                            expired = watch.deadline is not None and watch.deadline.expired()
                            raise
                        finally:
                            watch.pause()
                        yield reply
        except GeneratorExit:
            raise
        except BaseException as error:
            outcome = _mapped(error, method, caller, expired)
            if outcome is error:
                raise
            raise outcome from error
        finally:
            self._metrics.observe(path, outcome, time.perf_counter() - started)

    def _admit(self, method: Method, context: Context) -> Caller:
        metadata = read_metadata(context)
        request_id = metadata.get("x-request-id") or str(uuid_utils.uuid7())
        node = identity_of(context)
        if node is not None:
            if method.path not in NODE_METHODS:
                raise forbidden("a node's certificate is for its agent alone: call with an API key")
            caller = Caller("", request_id, "grpc", metadata, False, node.node_id, node.identity)
            set_caller(caller)
            return caller
        owner = ""
        key = key_in(metadata)
        if self._keys.required and not method.public and not (key is None and method.scope in self._open_scopes):
            owner = self._keys.owner(key, context.peer())
        admin = self._keys.is_admin(owner)
        if method.admin and not method.public and not admin:
            raise scope_missing(method.scope)
        caller = Caller(owner, request_id, metadata.get("fleet-transport", "grpc"), metadata, admin)
        set_caller(caller)
        return caller

    async def _judge(self, caller: Caller) -> None:
        """Raises CERTIFICATE_REFUSED where a node's certificate is worth nothing any more."""
        if self._identities is None:
            raise forbidden("this server takes no certificates")
        await self._identities.check(caller.node_id, caller.identity)

    def _prepare(
        self, method: Method, request: Message | AsyncIterator[Message], caller: Caller
    ) -> Message | AsyncIterator[Message]:
        if isinstance(request, Message):
            # The bridge has judged the body's length before decoding it.
            if caller.transport != "rest" and request.ByteSize() > method.max_request_bytes:
                raise FleetError(
                    "BODY_TOO_LARGE",
                    f"the request is larger than {method.max_request_bytes:,} bytes: send less",
                )
            apply_defaults(request)
            validate(request)
            return request
        return _validated(request)


class _Watch:
    """Ends a stream whose key is withdrawn, also while it waits for something to tell."""

    def __init__(self) -> None:
        self.deadline: asyncio.Timeout | None = None
        self._waiting = True
        self._withdrawn = False

    def tell(self) -> None:
        self._withdrawn = True
        if self._waiting and self.deadline is not None and not self.deadline.expired():
            self.deadline.reschedule(asyncio.get_running_loop().time())

    def pause(self) -> None:
        """Nothing is waited for now: the deadline of the last wait is over."""
        self._waiting = False

    def check(self) -> None:
        """Raises API_KEY_INVALID once the key has been withdrawn."""
        if self._withdrawn:
            raise FleetError("API_KEY_INVALID", "the API key has been withdrawn: call again with one that is valid")
        self._waiting = True


async def _validated(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
    async for request in requests:
        apply_defaults(request)
        validate(request)
        yield request


def _seconds(method: Method, context: Context) -> float | None:
    """Time that the call has, None for no end."""
    remaining = context.time_remaining()
    if remaining is None:
        return method.timeout_seconds
    return remaining if method.timeout_seconds is None else min(remaining, method.timeout_seconds)


def _mapped(error: BaseException, method: Method, caller: Caller, expired: bool) -> BaseException:
    if expired:
        return FleetError("TIMEOUT", "the call took longer than its deadline: try again, or give it more time")
    if isinstance(error, FleetError):
        if error.code is Code.INTERNAL and error.reason == "INTERNAL":
            _log.error("call failed", method=method.path, request_id=caller.request_id, detail=error.detail)
        return error
    if not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
        return error
    _log.exception("call failed", method=method.path, request_id=caller.request_id)
    return FleetError("INTERNAL", f"internal error: see the server's log at request {caller.request_id}")
