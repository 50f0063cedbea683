"""HTTP requests of the server to the program that an engine wraps: what a node's ComfyUI offers, and its files."""

from __future__ import annotations

import httpx
import structlog
from fleet.v1 import command_pb2

from fleet_agent.commands import CommandChannel, CommandDesk, CommandFault

_log = structlog.get_logger("fleet.agent.engines")
_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE"})
_CHUNK = 256 << 10
_PASSED_ON = ("content-disposition", "etag", "last-modified", "content-length", "accept-ranges", "cache-control")
_CONNECT_SECONDS = 5.0
_SECONDS = 30.0


class EngineRequests:
    """Answers `engine_request`. `urls` has the address of each engine's program, by the engine's name."""

    def __init__(self, urls: dict[str, str]) -> None:
        self._urls = {name: url.rstrip("/") for name, url in urls.items() if url}
        # All authorities are read where a program speaks TLS alone; redirects are not followed.
        secure = any(url.lower().startswith("https:") for url in self._urls.values())
        self._http = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=32), verify=secure)

    def register(self, desk: CommandDesk) -> None:
        desk.register("engine_request", self.serve)

    async def aclose(self) -> None:
        """Closes the connections; requests under way are over by then."""
        await self._http.aclose()

    async def serve(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        """The program's reply, head and body as they come. Raises CommandFault where it does not answer.

        Nothing but a path of the program itself is asked for: never another host, however the target is written.
        """
        request = command.engine_request
        base = self._urls.get(request.engine)
        if base is None:
            raise CommandFault("NODE_OFFLINE", f"this node has no engine {request.engine!r} with a program of its own")
        if request.method not in _METHODS or not request.target.startswith("/") or "\\" in request.target:
            raise CommandFault("INVALID_FIELD", f"{request.method} {request.target[:100]!r} is no request to an engine")
        seconds = command.timeout_seconds if command.timeout_seconds > 0 else _SECONDS
        # As it came: the length that is passed on is that of these bytes.
        headers = {"accept-encoding": "identity"}
        if request.content_type:
            headers["content-type"] = request.content_type
        try:
            async with self._http.stream(
                request.method,
                base + request.target,
                content=request.body or None,
                headers=headers,
                timeout=httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS)),
                follow_redirects=False,
            ) as reply:
                await channel.reply(
                    command_pb2.EngineReply(
                        status_code=reply.status_code,
                        content_type=reply.headers.get("content-type", ""),
                        headers={name: reply.headers[name] for name in _PASSED_ON if name in reply.headers},
                    )
                )
                async for chunk in reply.aiter_raw(_CHUNK):
                    await channel.body(chunk)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = str(error) or type(error).__name__
            _log.warning("an engine's program does not answer", engine=request.engine, url=base, why=why)
            raise CommandFault("NODE_OFFLINE", f"{request.engine} at {base} does not answer: {why}") from error
        return command_pb2.CommandEnd()
